"""Matrix products by the library and in the dtype that are fast on a processor: the same numbers, the same dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moepp_ds import products
from moepp_ds.products import linear, multiply, product_dtype, wide_linear


@pytest.fixture(params=[False, True], ids=["widened", "native"])
def multiplies_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of processor on any one: the answer about bf16 units chooses the path, nothing else."""
    monkeypatch.setattr(products, "_cpu_multiplies_bf16", lambda: request.param)
    return bool(request.param)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """-8..8 in bf16, where they are exact, as fp32 sums of their products are: only the result is rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(torch.bfloat16)


def test_bf16_is_widened_only_where_a_processor_lacks_it(multiplies_bf16: bool) -> None:
    expected = torch.bfloat16 if multiplies_bf16 else torch.float32
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16)) == expected
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert product_dtype(torch.zeros(1, dtype=dtype)) == dtype


def test_this_processor_answers() -> None:
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16)) in (torch.bfloat16, torch.float32)


def test_bf16_accumulates_in_fp32(multiplies_bf16: bool) -> None:
    # bf16 holds 8 bits: beside 256 its next number is 258, so a bf16 sum 256 + 1 + 1 + ... would stay at 256.
    x_TD = torch.tensor([[256.0] + [1.0] * 8], dtype=torch.bfloat16)
    assert linear(x_TD, torch.ones(1, 9, dtype=torch.bfloat16)).tolist() == [[264.0]]


def test_bf16_product_is_the_fp64_product_rounded_once(multiplies_bf16: bool) -> None:
    x_BTD, weight_OD = whole_numbers(2, 5, 64, seed=0), whole_numbers(7, 64, seed=1)
    out_BTO = linear(x_BTD, weight_OD)
    assert out_BTO.dtype == torch.bfloat16 and out_BTO.shape == (2, 5, 7)
    exact_BTO = torch.einsum("btd,od->bto", x_BTD.double(), weight_OD.double())
    assert (exact_BTO.abs() > 256).any()  # some need rounding, else the test would show nothing
    assert torch.equal(out_BTO, exact_BTO.to(torch.bfloat16))


def test_bf16_gradients_are_those_of_fp64_rounded_once(multiplies_bf16: bool) -> None:
    x_TD, weight_OD = whole_numbers(40, 48, seed=2), whole_numbers(24, 48, seed=3)
    grad_TO = whole_numbers(40, 24, seed=4)
    linear(x_TD.requires_grad_(), weight_OD.requires_grad_()).backward(grad_TO)
    assert x_TD.grad is not None and weight_OD.grad is not None
    assert x_TD.grad.dtype == weight_OD.grad.dtype == torch.bfloat16
    assert torch.equal(x_TD.grad, (grad_TO.double() @ weight_OD.detach().double()).to(torch.bfloat16))
    assert torch.equal(weight_OD.grad, (grad_TO.double().t() @ x_TD.detach().double()).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_untouched(dtype: torch.dtype, multiplies_bf16: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(6, 16, generator=generator, dtype=dtype)
    weight_OD = torch.randn(3, 16, generator=generator, dtype=dtype)
    out_TO = linear(x_TD, weight_OD)
    assert out_TO.dtype == dtype
    assert torch.equal(out_TO, torch.nn.functional.linear(x_TD, weight_OD))


def test_the_dtype_of_x_decides() -> None:
    # A bf16 weight under an fp32 hidden state. The bf16 number after 1 is 1 + 1/128: 1/512 would vanish.
    x_TD, weight_OD = torch.tensor([[1.0, 1 / 512]]), torch.ones(1, 2, dtype=torch.bfloat16)
    out_TO = linear(x_TD, weight_OD)
    assert out_TO.dtype == torch.float32 and out_TO.item() == 1 + 1 / 512


@pytest.mark.parametrize("is_amd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_either_library_multiplies_what_it_is_given(
    is_amd: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers, so that no order of a sum matters; parts of larger matrices, transposed ones, and none at all."""
    monkeypatch.setattr(products, "_cpu_is_amd", lambda: is_amd)
    left_XY, right_YO = whole_numbers(10, 24, seed=6).to(dtype)[2:9, :16], whole_numbers(9, 16, seed=7).to(dtype).t()
    expected_XO = left_XY.double() @ right_YO.double()
    for left, right in ((left_XY, right_YO), (left_XY.t().contiguous().t(), right_YO.contiguous())):
        assert torch.equal(multiply(left, right), expected_XO.to(dtype))
        for out_dtype in (dtype, torch.bfloat16):
            out = torch.empty(20, 30, dtype=out_dtype)[3:10, 4:13]
            assert multiply(left, right, out=out) is out
            assert torch.equal(out, expected_XO.to(dtype).to(out_dtype))
    assert multiply(left_XY[:0], right_YO).shape == (0, 9)
    assert multiply(left_XY[:, :0], right_YO[:0], out=torch.ones(7, 9, dtype=dtype)).eq(0).all()


def test_on_amd_fp32_is_multiplied_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cpu_is_amd", lambda: True)
    x_TD = torch.ones(2, 3)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as found:
            multiply(x_TD, x_TD.t())
        names = {event.key for event in found.key_averages()}
        assert ("mkldnn::_linear_pointwise" in names) == enabled == ("aten::mm" not in names)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_wide_product_is_not_rounded_and_keeps_its_input_as_it_is(dtype: torch.dtype, autocast: bool) -> None:
    x_TX, weight_OX = (whole_numbers(*shape, seed=0).to(dtype).requires_grad_() for shape in ((40, 64), (3, 64)))
    grad_TO = whole_numbers(40, 3, seed=1).double() / 16
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with hooks:
            out_TO = wide_linear(x_TX, weight_OX)
        of_x_TX, of_weight_OX = torch.autograd.grad(out_TO, (x_TX, weight_OX), grad_TO.to(out_TO.dtype))
    assert out_TO.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(out_TO.double(), x_TX.double() @ weight_OX.double().t())
    assert torch.equal(of_x_TX, (grad_TO @ weight_OX.double()).to(dtype))
    assert torch.equal(of_weight_OX, (grad_TO.t() @ x_TX.double()).to(dtype))
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(dtype, x_TX.shape), (dtype, weight_OX.shape)]
