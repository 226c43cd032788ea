"""The losses, against numbers worked out by hand."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from moepp_ds.kinds import ExpertKinds
from moepp_ds.losses import Balance, balance_loss, normalized_balance, z_loss


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two tokens, K = 2, experts FFN, FFN, zero-computation. Both chose expert 0; one chose 1, one chose 2.
KINDS = ExpertKinds(num_ffn=2, num_constant=0, num_copy=0, num_zero=1)
PROBABILITY_TE = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]
SHARE_E = [1.0, 0.5, 0.5]


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
    loss = balance_loss(probability_TE=tensor(PROBABILITY_TE), share_E=tensor(SHARE_E), kinds=KINDS, tau=tau)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-15)


def test_even_load_gives_k_over_e_and_no_factor_beside() -> None:
    # Four FFN experts, uniform scores, K = 2, eight tokens: f = 1/2 each, P = 1/4 each: 4 * 1/2 * 1/4 = K / E.
    loss = balance_loss(
        probability_TE=torch.full((8, 4), 0.25),
        share_E=torch.full((4,), 0.5),
        kinds=ExpertKinds(4, 0, 0, 0),
        tau=0.1,
    )
    assert loss.item() == 0.5 and loss.dtype == torch.float32


# FFN 0 1, constant 2, copy 3, zero 4 5. Loads per token 1 0.5, 0.2 0.1, 0.6 0; mean scores .3 .2, .1 .1, .2 .1.
MIXED = ExpertKinds(num_ffn=2, num_constant=1, num_copy=1, num_zero=2)
MIXED_SHARE_E = [1.0, 0.5, 0.2, 0.1, 0.6, 0.0]
MIXED_PROBABILITY_TE = [[0.4, 0.1, 0.0, 0.2, 0.2, 0.1], [0.2, 0.3, 0.2, 0.0, 0.2, 0.1]]


@pytest.mark.parametrize(
    ("balance", "expected", "load_E"),
    [
        # 1 * .3 + .5 * .2 + 1/2 (.2 * .1 + .1 * .1 + .6 * .2 + 0 * .1) = 0.4 + 0.5 * 0.15
        ("per_expert", 0.475, MIXED_SHARE_E),
        # FFN experts 0.75 each, the others 0.9 / 4 = 0.225: 0.75 * .5 + 1/2 * 0.225 * .5
        ("per_group", 0.43125, [0.75, 0.75, 0.225, 0.225, 0.225, 0.225]),
        # The zero experts 0.3 each: 0.4 + 1/2 (.02 + .01 + 0.3 * .2 + 0.3 * .1)
        ("null_averaged", 0.46, [1.0, 0.5, 0.2, 0.1, 0.3, 0.3]),
        ("none", 0.0, [0.0] * 6),
    ],
)
def test_whose_load_is_evened_out(balance: Balance, expected: float, load_E: list[float]) -> None:
    probability_TE = tensor(MIXED_PROBABILITY_TE).requires_grad_()
    share_E = tensor(MIXED_SHARE_E).requires_grad_()
    loss = balance_loss(probability_TE=probability_TE, share_E=share_E, kinds=MIXED, tau=0.5, balance=balance)
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-15)
    assert share_E.tolist() == MIXED_SHARE_E  # averaged in a copy
    if balance == "none":
        assert not loss.requires_grad
        return
    loss.backward()
    # dL / dp_te = eta_e f_e / T with the averaged f.
    eta_E = (1, 1, 0.5, 0.5, 0.5, 0.5)
    expected_E = [eta * load / 2 for eta, load in zip(eta_E, load_E)]
    assert probability_TE.grad is not None
    torch.testing.assert_close(probability_TE.grad, tensor([expected_E] * 2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("balance", ["per_expert", "per_group"])
def test_groups_that_are_empty_are_left_out(balance: Balance) -> None:
    # No zero-computation expert: per_group has one group, of mean 3/4: 3/4 * (0.55 + 0.2).
    loss = balance_loss(
        probability_TE=tensor(PROBABILITY_TE)[:, :2],
        share_E=tensor(SHARE_E)[:2],
        kinds=ExpertKinds(2, 0, 0, 0),
        tau=0.5,
        balance=balance,
    )
    assert loss.item() == pytest.approx(0.65 if balance == "per_expert" else 0.5625, abs=1e-15)


def test_gradient_of_the_balance_loss() -> None:
    # dL / dp_te = eta_e f_e / T, whatever the token: [1 * 1, 1 * 1/2, 0.5 * 1/2] / 2. The counts are constants.
    probability_TE, share_E = tensor(PROBABILITY_TE).requires_grad_(), tensor(SHARE_E)
    balance_loss(probability_TE=probability_TE, share_E=share_E, kinds=KINDS, tau=0.5).backward()
    assert probability_TE.grad is not None
    torch.testing.assert_close(probability_TE.grad, tensor([[0.5, 0.25, 0.125]] * 2), rtol=0, atol=1e-15)


# normalised: 1 is perfect


@pytest.mark.parametrize("balance", ["per_expert", "per_group", "null_averaged"])
@pytest.mark.parametrize("tau", [0.1, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("choices", [1.0, 2.0, 2.7])
def test_perfect_balance_is_one_and_anything_else_is_more(choices: float, tau: float, balance: Balance) -> None:
    # Perfect: P is tau : 1 for FFN experts : others, and f the same times the choices per token.
    weight_E = tensor([tau, tau, 1, 1, 1, 1])
    perfect_E = weight_E / weight_E.sum()

    def value(probability_E: Tensor, share_E: Tensor) -> float:
        loss = balance_loss(
            probability_TE=probability_E.expand(3, -1), share_E=share_E, kinds=MIXED, tau=tau, balance=balance
        )
        return normalized_balance(loss, share_E=share_E, kinds=MIXED, tau=tau).item()

    assert value(perfect_E, choices * perfect_E) == pytest.approx(1.0, abs=1e-12)
    # Where load follows the scores, moving either way is worse: from FFN to the others, and back.
    for step in (0.05, -0.05):
        moved_E = perfect_E + step * tensor([-1, -1, 0.5, 0.5, 0.5, 0.5]) * perfect_E.min()
        assert value(moved_E, choices * moved_E) > 1.0001
    # Between experts of one group, only what is not averaged sees it; f here is as uneven as it can be.
    within_E = perfect_E.clone()
    within_E[0], within_E[1] = perfect_E[0] * 2, 0.0
    expected = 1.0 if balance == "per_group" else 1 + 2 * tau / (2 * tau + 4)
    assert value(within_E, choices * within_E) == pytest.approx(expected, abs=1e-12)


def test_normalised_balance_by_hand() -> None:
    # L = 0.7125 at tau 0.5 above: times 2 + 1 / 0.5 = 4 experts' worth, over 2 choices a token.
    loss = normalized_balance(tensor(0.7125), share_E=tensor(SHARE_E), kinds=KINDS, tau=0.5)
    assert loss.item() == pytest.approx(1.425, abs=1e-15)


# router z-loss


def test_z_loss_by_hand() -> None:
    # log(4 + 2 + 1 + 1) = log 8 and log(1 + 3 + 1 + 5) = log 10; the mean of their squares.
    logits_TE = tensor([[log(4), log(2), 0, 0], [0, log(3), 0, log(5)]]).requires_grad_()
    loss = z_loss(logits_TE)
    assert loss.shape == () and loss.item() == pytest.approx((log(8) ** 2 + log(10) ** 2) / 2, abs=1e-14)
    loss.backward()
    # d/dG_te = 2 log(sum) p_te / T
    expected_TE = [[log(8) * n / 8 for n in (4, 2, 1, 1)], [log(10) * n / 10 for n in (1, 3, 1, 5)]]
    assert logits_TE.grad is not None
    torch.testing.assert_close(logits_TE.grad, tensor(expected_TE), rtol=0, atol=1e-14)


def test_z_loss_of_large_logits_is_finite() -> None:
    # 300 + log 2, squared; exp(300) is infinite in fp32.
    assert z_loss(torch.tensor([[300.0, 300.0]])).item() == pytest.approx((300 + log(2)) ** 2, rel=1e-6)
