"""Zero-computation experts, against typed-out tensors, and block by block against the equations in plain steps."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from moepp_ds.blocks import BLOCK_ELEMENTS, row_blocks
from moepp_ds.zero_computation import ConstantExperts, zero_computation_output


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-14)


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
    # A token without any constant expert has only the scale that it comes with.
    gate_TJ = tensor([[0.4, 0.2], [0.5, 0], [0, 0]])
    out_TD = two_constants()(tensor([[1, 0], [0, 1], [3, 3]]), tensor([0, 0, 2]), gate_TJ)
    equal(out_TD, [[0.4 + 1.6, 2.8], [4, 0.1 + 8], [6, 6]])


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


def plain(x_TD: Tensor, copy_T: Tensor, gate_TJ: Tensor, selector_J2D: Tensor, value_JD: Tensor) -> Tensor:
    """Equations 4 and 5, expert by expert."""
    out_TD = copy_T.unsqueeze(-1) * x_TD
    for gate_T, selector_2D, value_D in zip(gate_TJ.unbind(1), selector_J2D, value_JD):
        keep_T, take_T = torch.softmax(x_TD @ selector_2D.t(), dim=-1).unbind(-1)
        out_TD = out_TD + gate_T.unsqueeze(-1) * (keep_T.unsqueeze(-1) * x_TD + take_T.unsqueeze(-1) * value_D)
    return out_TD


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_constants", [0, 1, 3])
def test_values_and_gradients_over_several_blocks(num_constants: int, device: str) -> None:
    width = BLOCK_ELEMENTS // 4  # four tokens a block
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    constants = ConstantExperts(num_constants, width).double().to(device) if num_constants else None
    leaves = [numbers(10, width), numbers(10), numbers(10, num_constants)]
    if constants is not None:
        constants.selector_J2D.data = numbers(num_constants, 2, width).detach() / width**0.5
        constants.value_JD.data = numbers(num_constants, width).detach()
        leaves += [constants.selector_J2D, constants.value_JD]
    x_TD, copy_T, gate_TJ, *_ = leaves
    out_TD = zero_computation_output(x_TD, copy_gate_T=copy_T, constant_gate_TJ=gate_TJ, constants=constants)
    nothing = [x_TD.new_empty(0, 2, width), x_TD.new_empty(0, width)]
    expected_TD = plain(x_TD, copy_T, gate_TJ, *(leaves[3:] or nothing))
    torch.testing.assert_close(out_TD, expected_TD)
    back_TD, wanted = numbers(10, width).detach(), leaves if num_constants else leaves[:2]
    found = torch.autograd.grad(out_TD, wanted, back_TD)
    for mine, theirs in zip(found, torch.autograd.grad(expected_TD, wanted, back_TD)):
        torch.testing.assert_close(mine, theirs)


def test_blocks_cover_all_rows_once() -> None:
    cpu = torch.device("cpu")
    assert list(row_blocks((5, BLOCK_ELEMENTS // 2), cpu)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(row_blocks((2, 3 * BLOCK_ELEMENTS), cpu)) == [slice(0, 1), slice(1, 2)]  # wider than a block
    assert list(row_blocks((0, 8), cpu)) == []
    assert list(row_blocks((10**9, 10**3), torch.device("cuda"))) == [slice(0, 10**9)]
