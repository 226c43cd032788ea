"""moepp_ds.token_rows: rows for the experts and back, against typed-out tensors and sums in plain steps."""

from __future__ import annotations

import pytest
import torch

from moepp_ds.blocks import BLOCK_ELEMENTS
from moepp_ds.token_rows import TokenRows, list_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some_rows(device: str = "cpu") -> TokenRows:
    """Six rows of seven tokens: two of tokens 0 and 2, one of 4 and 5, none of the others."""
    return list_rows(torch.tensor([0, 2, 2, 4, 0, 5], device=device), 7)


def test_rows_are_listed_token_by_token() -> None:
    rows = some_rows()
    assert rows.row_R.tolist() == [0, 4, 1, 2, 3, 5]
    assert rows.first_T.tolist() == [0, 2, 2, 4, 4, 5, 6]


def test_there_and_back() -> None:
    rows, x_TD = some_rows(), torch.arange(14.0).view(7, 2)
    taken_RD = rows.take(x_TD)
    assert taken_RD.tolist() == [[0, 1], [4, 5], [4, 5], [8, 9], [0, 1], [10, 11]]
    gate_R = torch.tensor([1.0, 2.0, 0.5, 3.0, 4.0, 0.0])
    onto_TD = torch.full((7, 2), 100.0)
    combined_TD = rows.combine(taken_RD, gate_R, onto_TD)
    assert combined_TD.data_ptr() == onto_TD.data_ptr()
    assert (combined_TD - 100).tolist() == [[0, 5], [0, 0], [10, 12.5], [0, 0], [24, 27], [0, 0], [0, 0]]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device: str) -> None:
    rows = some_rows(device)
    x_TD = torch.randn(7, 3, dtype=torch.float64, device=device, requires_grad=True)
    result_RD = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    gate_R = torch.rand(6, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(rows.take, (x_TD,))
    assert torch.autograd.gradcheck(
        lambda result_RD, gate_R, x_TD: rows.combine(result_RD, gate_R, 2 * x_TD), (result_RD, gate_R, x_TD)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_is_rounded_once(device: str) -> None:
    """1 + 1/256 + 1/256 in bf16: added one by one, each addend is lost; their sum is a bf16 number."""
    rows = list_rows(torch.zeros(3, dtype=torch.long, device=device), 1)
    result_R1 = torch.tensor([[1.0], [1.0], [1.0]], device=device).bfloat16().requires_grad_()
    gate_R = torch.tensor([1.0, 1 / 256, 1 / 256], device=device)
    combined_TD = rows.combine(result_R1, gate_R, torch.zeros(1, 1, device=device, dtype=torch.bfloat16))
    assert combined_TD.dtype == torch.bfloat16 and combined_TD.item() == 1 + 1 / 128
    combined_TD.sum().backward()
    assert result_R1.grad is not None and result_R1.grad.dtype == torch.bfloat16


def test_no_rows_at_all() -> None:
    rows, x_TD = list_rows(torch.zeros(0, dtype=torch.long), 3), torch.ones(3, 2, requires_grad=True)
    out_TD = rows.combine(rows.take(x_TD), torch.zeros(0), torch.ones(3, 2))
    out_TD.sum().backward()
    assert out_TD.tolist() == [[1, 1]] * 3
    assert x_TD.grad is not None and x_TD.grad.tolist() == [[0, 0]] * 3


def test_several_blocks_of_tokens_are_one() -> None:
    """More numbers than a block has: the same sums as index_add makes."""
    generator = torch.Generator().manual_seed(0)
    width = BLOCK_ELEMENTS // 8
    token_R = torch.randint(50, (90,), generator=generator)
    rows = list_rows(token_R, 50)
    result_RD = torch.randn(90, width, generator=generator, dtype=torch.float64)
    gate_R = torch.rand(90, generator=generator, dtype=torch.float64)
    expected_TD = torch.zeros(50, width, dtype=torch.float64)
    expected_TD.index_add_(0, token_R, result_RD * gate_R.unsqueeze(-1))
    found_TD = rows.combine(result_RD, gate_R, torch.zeros_like(expected_TD))
    torch.testing.assert_close(found_TD, expected_TD)
    x_TD = torch.zeros_like(expected_TD).requires_grad_()
    rows.take(x_TD).backward(result_RD)
    torch.testing.assert_close(x_TD.grad, torch.zeros_like(expected_TD).index_add_(0, token_R, result_RD))
