"""The experts, against typed-out tensors and a loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import e, log

import pytest
import torch
from torch import Tensor

from moepp_ds.experts import Backend, ConstantExperts, FFNExperts, zero_computation_output


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


# zero-computation experts


def two_constants() -> ConstantExperts:
    """Those of test_reference.py: W_c of the first answers to each feature, that of the second is 0."""
    constants = ConstantExperts(2, 2).double()
    constants.selector_J2D.data = tensor([[[log(3), 0], [0, log(4)]], [[0, 0], [0, 0]]])
    constants.value_JD.data = tensor([[10, 20], [6, 8]])
    return constants


def test_constant_experts_give_a_scale_and_values() -> None:
    # [1, 0]: scores [log 3, 0] of the first, a = [3/4, 1/4]; the second mixes halves. Gates 0.4 and 0.2:
    #   scale 0.4 * 3/4 + 0.2 * 1/2 = 0.4; values 0.4 * 1/4 [10, 20] + 0.2 * 1/2 [6, 8] = [1.6, 2.8].
    # [0, 1]: scores [0, log 4], a = [1/5, 4/5]. Gates 0.5 and 0 (not chosen): scale 0.1; values 0.4 [10, 20].
    # A token without any constant expert gets nothing from them.
    gate_TJ = tensor([[0.4, 0.2], [0.5, 0], [0, 0]])
    scale_T, value_TD = two_constants()(tensor([[1, 0], [0, 1], [3, 3]]), gate_TJ)
    equal(scale_T, [0.4, 0.1, 0])
    equal(value_TD, [[1.6, 2.8], [4, 8], [0, 0]])


def test_constant_expert_is_equation_5() -> None:
    # Gate 1: a1 x + a2 v = 3/4 [1, 0] + 1/4 [10, 20].
    out_TD = zero_computation_output(
        tensor([[1, 0]]),
        copy_gate_T=tensor([0]),
        constant_gate_TJ=tensor([[1, 0]]),
        constants=two_constants(),
    )
    equal(out_TD, [[3.25, 5]])


def test_copy_and_constant_experts_share_one_scale() -> None:
    # Copy gate 0.1 on top of the first case above: (0.1 + 0.4) [1, 0] + [1.6, 2.8].
    out_TD = zero_computation_output(
        tensor([[1, 0]]),
        copy_gate_T=tensor([0.1]),
        constant_gate_TJ=tensor([[0.4, 0.2]]),
        constants=two_constants(),
    )
    equal(out_TD, [[2.1, 2.8]])


def test_without_constant_experts_there_is_the_scale_alone() -> None:
    x_TD = tensor([[2, -4], [1, 1]])
    out_TD = zero_computation_output(
        x_TD, copy_gate_T=tensor([0.25, 0]), constant_gate_TJ=torch.zeros(2, 0).double(), constants=None
    )
    equal(out_TD, [[0.5, -1], [0, 0]])


def test_gates_stay_fp32_and_the_output_takes_the_dtype_of_x() -> None:
    # Copy gate 1 + 1/256, constant gate 1/128 with a1 = 1/2 and v = 0: the scale is 1 + 1/128, a bf16 number.
    # Gates in bf16 would give 1: both of its numbers next to 1 + 1/256 are a half step away, and it rounds
    # down to 1 twice.
    constants = ConstantExperts(1, 1)
    constants.selector_J2D.data, constants.value_JD.data = torch.zeros(1, 2, 1), torch.zeros(1, 1)
    constants.to(torch.bfloat16)
    gate_TJ = torch.full((1, 1), 1 / 128, requires_grad=True)
    out_TD = zero_computation_output(
        torch.ones(1, 1, dtype=torch.bfloat16),
        copy_gate_T=torch.tensor([1 + 1 / 256]),
        constant_gate_TJ=gate_TJ,
        constants=constants,
    )
    assert out_TD.dtype == torch.bfloat16 and out_TD.item() == 1 + 1 / 128
    out_TD.sum().backward()
    assert gate_TJ.grad is not None and gate_TJ.grad.dtype == torch.float32
    assert constants.value_JD.grad is not None and constants.value_JD.grad.dtype == torch.bfloat16


def test_an_unused_constant_expert_has_a_zero_gradient() -> None:
    constants = two_constants()
    x_TD = tensor([[1, 0], [0, 1]])
    zero_computation_output(
        x_TD, copy_gate_T=tensor([1, 1]), constant_gate_TJ=tensor([[1, 0], [0, 0]]), constants=constants
    ).sum().backward()
    for parameter in constants.parameters():
        assert parameter.grad is not None
        assert parameter.grad[0].abs().max() > 0 and parameter.grad[1].abs().max() == 0
