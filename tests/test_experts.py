"""The experts, against typed-out tensors and a loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import e

import pytest
import torch
from torch import Tensor

from moepp_ds.experts import Backend, FFNExperts


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-14)


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """-4..4: few enough and small enough that every sum of products here is exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(device, dtype)


# FFN experts, on every backend


def oracle(leaves: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Row by row, in plain differentiable steps. leaves: rows, gate and up, down."""
    rows_RD, gate_up_EDG, down_EFD = leaves
    width, out, start = down_EFD.shape[1], [], 0
    for expert, count in enumerate(counts):
        for row_D in rows_RD[start : start + count]:
            product_G = row_D @ gate_up_EDG[expert]
            gate_F, value_F = product_G[:width], product_G[width:]
            out.append((gate_F * torch.sigmoid(gate_F) * value_F) @ down_EFD[expert])
        start += count
    return torch.stack(out) if out else rows_RD + 0 * (gate_up_EDG.sum() + down_EFD.sum())


LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest error over the largest number of what is compared; products are summed in fp32 at least."""


def check_against_oracle(
    counts: Sequence[int], dtype: torch.dtype, backend: Backend, device: str = "cpu"
) -> None:
    """Values and gradients, also of experts without rows; all from the same numbers, which `dtype` holds."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    experts = FFNExperts(len(counts), 8, 16).to(device, dtype)
    for parameter in experts.parameters():
        parameter.data = numbers(*parameter.shape)
    rows_RD, grad_RD = numbers(sum(counts), 8).requires_grad_(), numbers(sum(counts), 8)
    leaves = [rows_RD, experts.gate_up_EDG, experts.down_EFD]
    # Memory that held NaN a moment ago is what an expert without rows gets, whose gradient nobody writes.
    for tensor in leaves:
        torch.full_like(tensor, torch.nan)
    out_RD = experts(rows_RD, counts, backend=backend)
    out_RD.backward(grad_RD)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected_RD = oracle(wide, counts)
    expected_RD.backward(grad_RD.double())
    with torch.no_grad():
        assert torch.equal(experts(rows_RD, counts, backend=backend), out_RD)
    assert out_RD.dtype == dtype
    for found, expected in [(out_RD, expected_RD), *((leaf.grad, like.grad) for leaf, like in zip(leaves, wide))]:
        assert found is not None and expected is not None and found.shape == expected.shape
        largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=LIMITS[dtype] * largest)


COUNTS = [(3, 1, 2), (2, 0, 3), (0, 0, 4), (5, 0, 0), (0, 0, 0), (4,), (0,)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("slices", torch.float64),
        ("slices", torch.float32),
        ("slices", torch.bfloat16),
        ("grouped_mm", torch.float32),
        ("grouped_mm", torch.bfloat16),
        ("auto", torch.float64),
        ("auto", torch.bfloat16),
    ],
    ids=str,
)
def test_every_backend_is_the_oracle(counts: Sequence[int], backend: Backend, dtype: torch.dtype) -> None:
    check_against_oracle(counts, dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "slices"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_is_the_oracle_on_a_gpu(
    counts: Sequence[int], backend: Backend, dtype: torch.dtype
) -> None:
    check_against_oracle(counts, dtype, backend, device="cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_grouped_mm_refuses_are_multiplied_all_the_same(dtype: torch.dtype, device: str) -> None:
    # Rows of 3 and of 5 numbers are no multiple of 16 bytes.
    experts = FFNExperts(2, 3, 5).to(device, dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_RD = torch.randn(4, 3, device=device).to(dtype)
    expected_RD = oracle([leaf.double() for leaf in (rows_RD, *experts.parameters())], [1, 3])
    assert (experts(rows_RD, [1, 3]) - expected_RD).abs().max() < 1e-2 * expected_RD.abs().max()


@pytest.mark.parametrize("frozen", ["rows", "gate_up_EDG", "down_EFD"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    experts, rows_RD = two_ffn_experts(), torch.ones(3, 2, dtype=torch.float64, requires_grad=frozen != "rows")
    if frozen != "rows":
        getattr(experts, frozen).requires_grad_(False)
    experts(rows_RD, [1, 2]).sum().backward()
    leaves = {"rows": rows_RD, **dict(experts.named_parameters())}
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == [frozen]


@pytest.mark.parametrize("backend", ["slices", "grouped_mm"])
def test_counts_that_are_not_for_these_rows_and_experts_are_refused(backend: Backend) -> None:
    rows_RD, experts = torch.zeros(5, 8), FFNExperts(3, 8, 8)
    with pytest.raises(ValueError, match="5 rows for 3 experts, but 3 counts that sum to 4; the dispatch"):
        experts(rows_RD, [1, 1, 2], backend=backend)
    # Two counts for three experts would leave the third without a gradient, four would lose rows.
    with pytest.raises(ValueError, match="5 rows for 3 experts, but 2 counts that sum to 5"):
        experts(rows_RD, [2, 3], backend=backend)
    with pytest.raises(ValueError, match="5 rows for 3 experts, but 4 counts that sum to 5"):
        experts(rows_RD, [2, 1, 1, 1], backend=backend)


def two_ffn_experts() -> FFNExperts:
    """D = 2, F = 1. Expert 0 is that of test_reference.py: gate [1, 2], value [3, 4], down [1, -1]."""
    experts = FFNExperts(2, 2, 1).double()
    experts.gate_up_EDG.data = tensor([[[1, 3], [2, 4]], [[0, 1], [0, 1]]])  # columns: gate, then value
    experts.down_EFD.data = tensor([[[1, -1]], [[1, 1]]])
    return experts


def test_ffn_expert_is_swiglu() -> None:
    # Expert 0, x = [1, 0]: gate 1, silu(1) = e / (e + 1), value 3. Expert 1 has gate 0, and silu(0) = 0.
    hidden = 3 * e / (e + 1)
    out_RD = two_ffn_experts()(tensor([[1, 0], [5, 7]]), [1, 1])
    equal(out_RD, [[hidden, -hidden], [0, 0]])
    # x = [0, 1] and expert 0: gate 2, silu(2) = 2 e^2 / (e^2 + 1), value 4.
    hidden = 4 * 2 * e**2 / (e**2 + 1)
    equal(two_ffn_experts()(tensor([[0, 1]]), [1, 0]), [[hidden, -hidden]])


def test_every_ffn_expert_has_a_gradient() -> None:
    for counts in ([1, 0], [0, 1], [0, 0]):
        experts = two_ffn_experts()
        experts(torch.ones(sum(counts), 2, dtype=torch.float64), counts).square().sum().backward()
        for name, parameter in experts.named_parameters():
            assert parameter.grad is not None, name
            for expert, count in enumerate(counts):
                if count == 0:
                    assert parameter.grad[expert].abs().max() == 0, name
    rows_RD = whole_numbers(3, 2, seed=0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows, *_: experts(rows, [2, 1]), (rows_RD, *experts.parameters()))
