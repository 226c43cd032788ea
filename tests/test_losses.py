"""The losses, against numbers worked out by hand."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from moepp_ds.losses import balance_loss, token_losses


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two tokens, K = 2, experts FFN, FFN, zero-computation. Both chose expert 0; one chose 1, one chose 2.
PROBABILITY_TE = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]
WANTED_E = [2, 1, 1]


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        # f = [1, 1/2, 1/2] (sum K = 2), P = [0.55, 0.2, 0.25]; L = 1 * 0.55 + 1/2 * 0.2 + tau * 1/2 * 0.25.
        (1.0, 0.775),
        (0.5, 0.7125),
        (0.0, 0.65),
    ],
)
def test_equation_7(tau: float, expected: float) -> None:
    loss = balance_loss(
        probability_TE=tensor(PROBABILITY_TE), wanted_E=torch.tensor(WANTED_E), num_ffn=2, tau=tau
    )
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-15)


def test_even_load_gives_k_over_e_and_no_factor_beside() -> None:
    # Four FFN experts, uniform scores, K = 2, eight tokens: f = 1/2 each, P = 1/4 each: 4 * 1/2 * 1/4 = K /
    # E.
    loss = balance_loss(
        probability_TE=torch.full((8, 4), 0.25), wanted_E=torch.tensor([4, 4, 4, 4]), num_ffn=4, tau=0.1
    )
    assert loss.item() == 0.5 and loss.dtype == torch.float32


def test_gradient_of_the_balance_loss() -> None:
    # dL / dp_te = eta_e f_e / T, whatever the token: [1 * 1, 1 * 1/2, 0.5 * 1/2] / 2. The counts are
    # constants.
    probability_TE = tensor(PROBABILITY_TE).requires_grad_()
    wanted_E = torch.tensor(WANTED_E)
    balance_loss(probability_TE=probability_TE, wanted_E=wanted_E, num_ffn=2, tau=0.5).backward()
    assert probability_TE.grad is not None
    torch.testing.assert_close(probability_TE.grad, tensor([[0.5, 0.25, 0.125]] * 2), rtol=0, atol=1e-15)


def test_token_losses_by_hand() -> None:
    # Hidden [1, 0] has the logits log 2, 0, log 3: shares 2/6, 1/6, 3/6. Hidden [0, 1] has 0, log 6, 0: 1/8,
    # 6/8, 1/8.
    head_VD = tensor([[log(2), 0], [0, log(6)], [log(3), 0]])
    hidden_TD = tensor([[1, 0], [1, 0], [0, 1]])
    losses_T = token_losses(hidden_TD, head_VD, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(losses_T, tensor([log(3), log(6), log(8 / 6)]), rtol=0, atol=1e-14)


def test_gradient_of_a_token_loss() -> None:
    # Softmax minus the target's one-hot: target 1 of [2, 1, 3] / 6 gives [1/3, -5/6, 1/2], times hidden [1,
    # 0].
    head_VD = tensor([[log(2), 0], [0, log(6)], [log(3), 0]]).requires_grad_()
    token_losses(tensor([[1, 0]]), head_VD, torch.tensor([1])).sum().backward()
    assert head_VD.grad is not None
    expected_VD = tensor([[1 / 3, 0], [-5 / 6, 0], [1 / 2, 0]])
    torch.testing.assert_close(head_VD.grad, expected_VD, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_losses_are_minus_the_log_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(7, 16, generator=generator, dtype=torch.float64).to(dtype)
    head_VD = torch.randn(11, 16, generator=generator, dtype=torch.float64).to(dtype)
    target_T = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    losses_T = token_losses(hidden_TD, head_VD, target_T)
    assert losses_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Of a bf16 model only the logits are rounded to bf16; the softmax over the vocabulary is in fp32.
    logits_TV = (hidden_TD.double() @ head_VD.double().t()).to(dtype).double()
    expected_T = -torch.log(torch.softmax(logits_TV, dim=-1)[torch.arange(7), target_T])
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses_T.double(), expected_T, rtol=0, atol=limit)
