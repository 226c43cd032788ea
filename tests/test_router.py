"""The router, by hand: logits are logarithms of whole numbers, so that scores are plain fractions."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from moepp_ds.router import Router


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-14)


def router(weight_ED: object, *, top_k: int, residual_EE: object | None = None) -> Router:
    """A float64 router with these weights."""
    weight = tensor(weight_ED)
    made = Router(weight.shape[1], len(weight), top_k=top_k, has_residual=residual_EE is not None).double()
    made.weight_ED.data = weight
    if residual_EE is not None:
        assert made.residual_EE is not None
        made.residual_EE.data = tensor(residual_EE)
    return made


# Token [1, 0] has the logits log 4, log 2, 0, 0 (sum of exp 8); token [0, 1] has 0, log 3, 0, log 5 (sum 10).
WEIGHT_ED = [[log(4), 0], [log(2), log(3)], [0, 0], [0, log(5)]]
X_TD = [[1, 0], [0, 1]]


def test_equation_1_softmax_over_all_experts_and_no_renormalisation() -> None:
    routing = router(WEIGHT_ED, top_k=2)(tensor(X_TD), None)
    equal(routing.logits_TE, [[log(4), log(2), 0, 0], [0, log(3), 0, log(5)]])
    equal(routing.probability_TE, [[4 / 8, 2 / 8, 1 / 8, 1 / 8], [1 / 10, 3 / 10, 1 / 10, 5 / 10]])
    # The list goes token by token, best choice first; gates stay shares of the whole: 4/8 + 2/8 < 1.
    assert routing.token_N.tolist() == [0, 0, 1, 1]
    assert routing.expert_N.tolist() == [0, 1, 3, 1]
    equal(routing.gate_N, [4 / 8, 2 / 8, 5 / 10, 3 / 10])


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_number_of_choices(top_k: int) -> None:
    # Scores of the one token: 1 4 2 3 over 10, so the order of choice is 1, 3, 2, 0.
    routing = router([[0], [log(4)], [log(2)], [log(3)]], top_k=top_k)(tensor([[1]]), None)
    assert routing.token_N.tolist() == [0] * top_k
    assert routing.expert_N.tolist() == [1, 3, 2, 0][:top_k]
    equal(routing.gate_N, [0.4, 0.3, 0.2, 0.1][:top_k])


def test_equation_6_adds_the_mapped_logits_of_the_layer_before() -> None:
    # Wg moves previous logit 2 onto expert 0, doubled: rows are experts of this layer, columns those before.
    residual_EE = [[0, 0, 2], [0, 0, 0], [0, 0, 0]]
    made = router([[0], [log(4)], [0]], top_k=1, residual_EE=residual_EE)
    routing = made(tensor([[1]]), tensor([[7, 7, log(3)]]))
    equal(routing.logits_TE, [[2 * log(3), log(4), 0]])
    # exp = 9 4 1, sum 14.
    equal(routing.probability_TE, [[9 / 14, 4 / 14, 1 / 14]])
    assert routing.expert_N.tolist() == [0]


def test_the_logits_travel_with_the_earlier_residuals_in_them() -> None:
    # W x = [1, 0] in every layer and Wg = identity: G_1 = 1, G_2 = 1 + 1, G_3 = 1 + 2. If W x alone
    # travelled, G_3 were 2.
    first = router([[1], [0]], top_k=1)
    later = router([[1], [0]], top_k=1, residual_EE=[[1, 0], [0, 1]])
    logits_TE = first(tensor([[1]]), None).logits_TE
    for expected in (2, 3):
        logits_TE = later(tensor([[1]]), logits_TE).logits_TE
        equal(logits_TE, [[expected, 0]])


def test_the_first_layer_has_no_residual_parameter() -> None:
    first = router(WEIGHT_ED, top_k=2)
    assert [name for name, _ in first.named_parameters()] == ["weight_ED"]
    later = router(WEIGHT_ED, top_k=2, residual_EE=torch.eye(4).tolist())
    assert [name for name, _ in later.named_parameters()] == ["weight_ED", "residual_EE"]
    # Without gating residual the logits before are given all the same, and change nothing.
    x_TD = tensor(X_TD)
    assert torch.equal(first(x_TD, torch.ones(2, 4).double()).logits_TE, first(x_TD, None).logits_TE)
    # With one, but nothing before, W x stands alone.
    assert torch.equal(later(x_TD, None).logits_TE, first(x_TD, None).logits_TE)


def test_bf16_input_is_routed_in_fp32() -> None:
    # Logits 256 and 256.5: bf16, whose numbers there are 2 apart, would see a tie and fp32 does not.
    made = Router(2, 2, top_k=1, has_residual=True)
    assert made.residual_EE is not None
    made.weight_ED.data, made.residual_EE.data = tensor([[1, 0], [1, 1]]), torch.zeros(2, 2)
    made.to(torch.bfloat16)
    routing = made(torch.tensor([[256, 0.5]], dtype=torch.bfloat16), torch.zeros(1, 2))
    assert routing.logits_TE.tolist() == [[256.0, 256.5]]
    assert routing.expert_N.tolist() == [1]
    assert {routing.logits_TE.dtype, routing.probability_TE.dtype, routing.gate_N.dtype} == {torch.float32}
    routing.gate_N.sum().backward()
    assert made.weight_ED.grad is not None and made.weight_ED.grad.dtype == torch.bfloat16


def test_choice_survives_scores_that_underflow() -> None:
    # exp(-200) and exp(-150) are both 0 in fp32; -150 is the second choice nevertheless.
    made = router([[0], [-200], [-150]], top_k=2).float()
    routing = made(torch.ones(1, 1), None)
    assert routing.expert_N.tolist() == [0, 2]
    assert routing.gate_N.tolist() == [1.0, 0.0]


def test_gradient_of_a_gate_by_hand() -> None:
    # x = [1], logits 0, log 2, 0: the gate of expert 1 is p = 2/4. dp/dG_1 = p (1 - p) = 1/4, dp/dG_other =
    # -p/4 = -1/8. G = W x + Wg G_before with G_before = [1, 0, -1] moves G by x for W, by G_before for Wg, by
    # Wg^T for G_before.
    residual_EE = [[0, 0, 0], [0, 0, 0], [5, 0, 5]]  # adds 5 - 5 = 0 to expert 2
    made = router([[0], [log(2)], [0]], top_k=1, residual_EE=residual_EE)
    x_TD, before_TE = tensor([[1]]).requires_grad_(), tensor([[1, 0, -1]]).requires_grad_()
    made(x_TD, before_TE).gate_N.sum().backward()
    assert made.residual_EE is not None and made.residual_EE.grad is not None
    assert made.weight_ED.grad is not None and x_TD.grad is not None and before_TE.grad is not None
    equal(made.weight_ED.grad, [[-1 / 8], [1 / 4], [-1 / 8]])
    equal(made.residual_EE.grad, [[-1 / 8, 0, 1 / 8], [1 / 4, 0, -1 / 4], [-1 / 8, 0, 1 / 8]])
    equal(before_TE.grad, [[-5 / 8, 0, -5 / 8]])
    equal(x_TD.grad, [[log(2) / 4]])
