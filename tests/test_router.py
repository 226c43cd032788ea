"""The router, by hand: logits are logarithms of whole numbers, so that scores are plain fractions."""

from __future__ import annotations

from math import log, sqrt, tanh
from typing import Any

import pytest
import torch
from torch import Tensor

from moepp_ds.router import Router, RouterSettings, Routing, jitter


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-14)


def router(
    weight_ED: object, *, top_k: int | None = None, residual_EE: object | None = None, **changes: Any
) -> Router:
    """A float64 router with these weights."""
    weight, settings = tensor(weight_ED), RouterSettings(top_k=top_k, **changes)
    made = Router(weight.shape[1], len(weight), settings, has_residual=residual_EE is not None).double()
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
    assert routing.rank_N.tolist() == [0, 1, 2, 3][:top_k]
    equal(routing.gate_N, [0.4, 0.3, 0.2, 0.1][:top_k])
    equal(routing.probability_N, [0.4, 0.3, 0.2, 0.1][:top_k])
    assert routing.gate_N.requires_grad and not routing.probability_N.requires_grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("choice", [{"top_k": 3}, {"threshold": 0.2}])
def test_of_equal_scores_the_lower_index_comes_first(choice: dict[str, Any], device: str) -> None:
    # Twelve experts, of which the first is worse and all others are equal (p about 1/11.4). At threshold 0.2
    # three are taken: before them are 0, 0.088, 0.175 and before a fourth 0.263.
    weight_ED = [[-1]] + [[0]] * 11
    for num_tokens in (1, 300):
        made = router(weight_ED, **choice).to(device)
        routing = made(torch.ones(num_tokens, 1, dtype=torch.float64, device=device), None)
        assert routing.expert_N.tolist() == [1, 2, 3] * num_tokens


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
    assert first.residual_EE is None
    assert [name for name, _ in first.named_parameters()] == ["weight_ED"]
    later = router(WEIGHT_ED, top_k=2, residual_EE=torch.eye(4).tolist())
    assert [name for name, _ in later.named_parameters()] == ["weight_ED", "residual_EE"]
    # Without gating residual the logits before are given all the same, and change nothing.
    x_TD = tensor(X_TD)
    assert torch.equal(first(x_TD, torch.ones(2, 4).double()).logits_TE, first(x_TD, None).logits_TE)
    # With one, but nothing before, W x stands alone.
    assert torch.equal(later(x_TD, None).logits_TE, first(x_TD, None).logits_TE)


def test_a_layer_before_with_other_experts_is_refused() -> None:
    later = router(WEIGHT_ED, top_k=2, residual_EE=torch.eye(4).tolist())
    message = r"logits of shape \[2, 3\] come from the MoE layer before, this one makes \[2, 4\]; a gating residual"
    with pytest.raises(ValueError, match=message):
        later(tensor(X_TD), torch.zeros(2, 3).double())


def test_bf16_input_is_routed_in_fp32() -> None:
    # Logits 256 and 256.5: bf16, whose numbers there are 2 apart, would see a tie and fp32 does not.
    made = Router(2, 2, RouterSettings(top_k=1), has_residual=True)
    assert made.residual_EE is not None
    made.weight_ED.data, made.residual_EE.data = tensor([[1, 0], [1, 1]]), torch.zeros(2, 2)
    made.to(torch.bfloat16)
    routing = made(torch.tensor([[256, 0.5]], dtype=torch.bfloat16), torch.zeros(1, 2))
    assert routing.logits_TE.tolist() == [[256.0, 256.5]]
    assert routing.expert_N.tolist() == [1]
    floats = (routing.logits_TE, routing.scored_TE, routing.probability_TE, routing.gate_N, routing.probability_N)
    assert {values.dtype for values in floats} == {torch.float32}
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


# threshold


def listed(routing: Routing) -> list[list[int]]:
    """The experts of each token, in order."""
    tokens: list[list[int]] = [[] for _ in routing.logits_TE]
    for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist()):
        tokens[token].append(expert)
    return tokens


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # Scores of token 0 are 4 2 1 1 over 8 and of token 1 are 1 3 1 5 over 10. Of equal ones the lower index first.
        # Mass before each choice: token 0 (experts 0 1 2 3): 0, 4/8, 6/8, 7/8; token 1 (3 1 0 2): 0, 5/10, 8/10, 9/10.
        (0.0, [[0], [3]]),  # nothing is below 0, and one is always taken
        (0.4, [[0], [3]]),
        (0.5, [[0], [3]]),  # 4/8 before the second is not below 0.5
        (0.51, [[0, 1], [3, 1]]),
        (0.75, [[0, 1], [3, 1]]),
        (0.78, [[0, 1, 2], [3, 1]]),  # ragged: 6/8 is below 0.78 and 8/10 is not
        (0.85, [[0, 1, 2], [3, 1, 0]]),
        (0.95, [[0, 1, 2, 3], [3, 1, 0, 2]]),
        (1.0, [[0, 1, 2, 3], [3, 1, 0, 2]]),
    ],
)
def test_threshold_takes_experts_while_those_before_hold_less(
    threshold: float, expected: list[list[int]]
) -> None:
    routing = router(WEIGHT_ED, threshold=threshold)(tensor(X_TD), None)
    assert listed(routing) == expected
    assert routing.token_N.tolist() == [t for t in (0, 1) for _ in expected[t]]
    assert routing.rank_N.tolist() == [rank for chosen in expected for rank in range(len(chosen))]
    # XMoE's weights are the scores as they are.
    scores_TE = [[4 / 8, 2 / 8, 1 / 8, 1 / 8], [1 / 10, 3 / 10, 1 / 10, 5 / 10]]
    scores_N = [scores_TE[t][expert] for t in (0, 1) for expert in expected[t]]
    equal(routing.gate_N, scores_N)
    equal(routing.probability_N, scores_N)


def test_threshold_of_one_takes_all_whatever_rounding_makes_of_the_sum() -> None:
    # In fp32 the first expert holds a mass of 1 exactly, so that none before 1 is left; all are taken nevertheless.
    made = router([[0], [-200], [-150]], threshold=1.0).float()
    routing = made(torch.ones(1, 1), None)
    assert routing.expert_N.tolist() == [0, 2, 1]
    assert routing.gate_N.tolist() == [1.0, 0.0, 0.0]
    almost = router([[0], [-200], [-150]], threshold=0.999).float()
    assert almost(torch.ones(1, 1), None).expert_N.tolist() == [0]


def test_threshold_and_top_k_exclude_each_other() -> None:
    for top_k, threshold in ((None, None), (2, 0.5)):
        with pytest.raises(ValueError, match=f"top_k {top_k}, threshold {threshold}: give exactly one of the two"):
            Router(2, 4, RouterSettings(top_k=top_k, threshold=threshold), has_residual=False)


# bias of the controller


def test_bias_chooses_and_does_not_weigh() -> None:
    # Token 0 has 4/8 2/8 1/8 1/8; with 0.3 for expert 2 and -0.2 for expert 0 it is 0.3, 0.25, 0.425, 0.125.
    # Token 1 has 1/10 3/10 1/10 5/10 and becomes -0.1, 0.3, 0.4, 0.5.
    bias_E = tensor([-0.2, 0, 0.3, 0])
    routing = router(WEIGHT_ED, top_k=2)(tensor(X_TD), None, bias_E=bias_E)
    assert listed(routing) == [[2, 0], [3, 2]]
    equal(routing.gate_N, [1 / 8, 4 / 8, 5 / 10, 1 / 10])
    equal(routing.probability_N, [1 / 8, 4 / 8, 5 / 10, 1 / 10])
    plain = router(WEIGHT_ED, top_k=2)(tensor(X_TD), None)
    assert torch.equal(routing.logits_TE, plain.logits_TE)
    assert torch.equal(routing.probability_TE, plain.probability_TE)


def test_bias_orders_the_threshold_and_the_mass_stays_unbiased() -> None:
    # Order of token 0 by 0.3 0.25 0.425 0.125: experts 2 0 1 3 with masses before 0, 1/8, 5/8, 7/8; of token 1 by
    # -0.1 0.3 0.4 0.5: experts 3 2 1 0 with 0, 5/10, 6/10, 9/10. (Biased masses would be 0, 0.425, 0.725, ...)
    bias_E = tensor([-0.2, 0, 0.3, 0])
    for threshold, expected in ((0.4, [[2, 0], [3]]), (0.61, [[2, 0], [3, 2, 1]]), (0.7, [[2, 0, 1], [3, 2, 1]])):
        routing = router(WEIGHT_ED, threshold=threshold)(tensor(X_TD), None, bias_E=bias_E)
        assert listed(routing) == expected


def test_bias_gets_no_gradient_and_changes_none() -> None:
    bias_E, gradients = tensor([0, 0, 5, 0]).requires_grad_(), []
    # Both choose experts 2 and 0 of token 0: the second by the bias, the first because W is so.
    for given in (bias_E, bias_E.detach()):
        made = router(WEIGHT_ED, top_k=2)
        routing = made(tensor([[1, 0]]), None, bias_E=given)
        assert routing.expert_N.tolist() == [2, 0]
        routing.gate_N.sum().backward()
        assert made.weight_ED.grad is not None
        gradients.append(made.weight_ED.grad)
    assert bias_E.grad is None and torch.equal(gradients[0], gradients[1])
    # d(p_2 + p_0)/dG_i = p_i (1 - s) for the chosen and -p_i s for the others, s = 5/8.
    equal(gradients[0][:, 0], [4 / 8 * 3 / 8, -2 / 8 * 5 / 8, 1 / 8 * 3 / 8, -1 / 8 * 5 / 8])


# two layers


def test_two_layer_router_is_a_tanh_between_two_maps() -> None:
    made = Router(2, 3, RouterSettings(top_k=1, num_layers=2), has_residual=True).double()
    shapes = {name: list(parameter.shape) for name, parameter in made.named_parameters()}
    assert shapes == {"hidden_XD": [24, 2], "weight_EX": [3, 24], "residual_EE": [3, 3]}
    assert made.residual_EE is not None
    for parameter in made.parameters():
        parameter.data.zero_()
    # Hidden features 0 and 23 read 2 x_0 - x_1 and 3 x_1; logits: 4 times the first, 5 times the last, the first
    # minus the last.
    made.hidden_XD.data[0] = tensor([2, -1])
    made.hidden_XD.data[23] = tensor([0, 3])
    made.weight_EX.data[0, 0] = 4
    made.weight_EX.data[1, 23] = 5
    made.weight_EX.data[2, 0], made.weight_EX.data[2, 23] = 1, -1
    made.residual_EE.data[1, 0] = 10
    routing = made(tensor([[0.5, 0.25], [0, -1]]), tensor([[0, 0, 0], [1, 0, 0]]))
    a, b, c, d = tanh(0.75), tanh(0.75), tanh(1), tanh(-3)
    equal(routing.logits_TE, [[4 * a, 5 * b, a - b], [4 * c, 5 * d + 10, c - d]])
    assert routing.expert_N.tolist() == [1, 1]
    one_layer = Router(2, 3, RouterSettings(top_k=1), has_residual=False)
    assert [name for name, _ in one_layer.named_parameters()] == ["weight_ED"]


# logit norm


def test_logits_are_scored_at_the_given_deviation_and_travel_as_they_were() -> None:
    # Logits 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, unbiased variance 7. Deviation 2 multiplies them by 2/sqrt(7).
    made = router([[1], [2], [6]], top_k=2, logit_std=2.0)
    routing = made(tensor([[1], [-1]]), None)
    equal(routing.logits_TE, [[1, 2, 6], [-1, -2, -6]])
    scale = 2 / sqrt(7)
    equal(routing.scored_TE, [[scale, 2 * scale, 6 * scale], [-scale, -2 * scale, -6 * scale]])
    torch.testing.assert_close(routing.scored_TE.std(dim=-1), tensor([2, 2]), rtol=0, atol=1e-14)
    torch.testing.assert_close(routing.probability_TE, torch.softmax(routing.scored_TE, -1), rtol=0, atol=0)
    assert listed(routing) == [[2, 1], [0, 1]]
    # The next layer adds the logits, not the scores: Wg = 1 and W = 0 give 1, 2, 6 again.
    later = router([[0], [0], [0]], top_k=2, logit_std=2.0, residual_EE=torch.eye(3).tolist())
    assert torch.equal(later(tensor([[1], [-1]]), routing.logits_TE).logits_TE, routing.logits_TE)


def test_the_gradient_passes_the_deviation() -> None:
    # Scaling all logits changes no score then, so the gradient is at right angles to them.
    made = router([[1], [2], [6]], top_k=2, logit_std=2.0)
    made(tensor([[1]]), None).gate_N.sum().backward()
    assert made.weight_ED.grad is not None
    assert made.weight_ED.grad.abs().max() > 1e-3
    torch.testing.assert_close((made.weight_ED.grad * made.weight_ED.detach()).sum(), tensor(0), rtol=0, atol=1e-15)


# weights of the choices


def test_combine_weights_by_hand() -> None:
    # Expert 3 is the zero expert. Token 0 (4 2 1 1 over 8) chooses 0 and 1; token 1 (1 3 1 5 over 10) chooses 3 and 1.
    expected = {
        "softmax": [4 / 8, 2 / 8, 5 / 10, 3 / 10],
        "renormalize_selected": [4 / 6, 2 / 6, 5 / 8, 3 / 8],
        "renormalize_computing": [4 / 6, 2 / 6, 0, 1],
    }
    for combine, gates in expected.items():
        for scale in (1.0, 2.5):
            made = router(WEIGHT_ED, top_k=2, combine=combine, combine_scale=scale, num_zero=1)
            routing = made(tensor(X_TD), None)
            assert routing.expert_N.tolist() == [0, 1, 3, 1]
            equal(routing.gate_N, [scale * gate for gate in gates])
            # Seats go by the score itself, which no renormalising moves.
            equal(routing.probability_N, [4 / 8, 2 / 8, 5 / 10, 3 / 10])


def test_combine_weights_of_ragged_choices() -> None:
    # Threshold 0.78: token 0 takes 0 1 2 (4 2 1 over 8), token 1 takes 3 1 (5 3 over 10). Two zero experts: 2 and 3.
    expected = {
        "softmax": [4 / 8, 2 / 8, 1 / 8, 5 / 10, 3 / 10],
        "renormalize_selected": [4 / 7, 2 / 7, 1 / 7, 5 / 8, 3 / 8],
        "renormalize_computing": [4 / 6, 2 / 6, 0, 0, 1],
    }
    for combine, gates in expected.items():
        made = router(WEIGHT_ED, threshold=0.78, combine=combine, num_zero=2)
        equal(made(tensor(X_TD), None).gate_N, gates)


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_k": 2}, {"threshold": 0.6}])
def test_a_token_that_chose_zero_experts_alone_weighs_nothing(choice: dict[str, Any]) -> None:
    # Experts 1 and 3 are first for token 1 (5/10 and 3/10); made the last two of four, they are the zero experts.
    weight_ED = [WEIGHT_ED[0], WEIGHT_ED[2], WEIGHT_ED[1], WEIGHT_ED[3]]
    made = router(weight_ED, combine="renormalize_computing", num_zero=2, **choice)
    x_TD = tensor([[0, 1]]).requires_grad_()
    routing = made(x_TD, None)
    assert set(routing.expert_N.tolist()) <= {2, 3}
    equal(routing.gate_N, [0] * len(routing.expert_N))
    routing.gate_N.sum().backward()
    # No gradient, and no nan: the weights are 0 whatever the logits are.
    assert made.weight_ED.grad is not None and x_TD.grad is not None
    assert not made.weight_ED.grad.any() and not x_TD.grad.any()


def test_renormalised_weights_survive_scores_that_underflow() -> None:
    # A bias sends the token to experts 1 and 2, whose scores are 0 in fp32; their logits 1 apart still weigh them.
    made = router([[0], [-200], [-201]], top_k=2, combine="renormalize_selected").float()
    routing = made(torch.ones(1, 1), None, bias_E=torch.tensor([-2.0, 0.0, 0.0]))
    assert routing.expert_N.tolist() == [1, 2] and routing.probability_N.tolist() == [0.0, 0.0]
    share = 1 / (1 + 2.718281828459045**-1)
    torch.testing.assert_close(routing.gate_N, torch.tensor([share, 1 - share]), rtol=0, atol=1e-6)


# jitter


def noise(shape_BSD: tuple[int, int, int], amount: float = 0.25, **changes: int) -> Tensor:
    given = {"seed": 3, "first_row": 0, "layer": 0, **changes}
    return jitter(shape_BSD, amount, device=torch.device("cpu"), **given)


def test_jitter_lies_within_its_bounds_and_fills_them() -> None:
    noise_TD = noise((4, 25, 10))
    assert noise_TD.shape == (100, 10) and noise_TD.dtype == torch.float32
    assert noise_TD.min() >= 0.75 and noise_TD.max() <= 1.25
    # A thousand even draws from 0.75 to 1.25: deviation 0.5 / sqrt(12), five standard errors of the mean 0.023.
    assert noise_TD.min() < 0.76 and noise_TD.max() > 1.24 and abs(noise_TD.mean() - 1) < 0.023
    assert len(noise_TD.unique()) > 990  # every feature of every token has its own


def test_jitter_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    together_BSD = noise((6, 5, 4), first_row=10).view(6, 5, 4)
    for row in range(6):
        assert torch.equal(noise((1, 5, 4), first_row=10 + row), together_BSD[row])
    assert torch.equal(noise((3, 5, 4), first_row=12).view(3, 5, 4), together_BSD[2:5])
    torch.manual_seed(99)  # the process-wide generator plays no part
    assert torch.equal(noise((6, 5, 4), first_row=10).view(6, 5, 4), together_BSD)


def test_jitter_differs_between_seeds_rows_and_layers() -> None:
    base = noise((1, 5, 4))
    for change in ({"seed": 4}, {"first_row": 1}, {"layer": 1}):
        assert not torch.equal(noise((1, 5, 4), **change), base)


def test_jitter_multiplies_what_the_router_sees() -> None:
    # x = [1, 1] times [2, 3]: W x is read at [2, 3].
    made = router([[1, 0], [0, 1]], top_k=1)
    x_TD = tensor([[1, 1]]).requires_grad_()
    routing = made(x_TD, None, noise_TD=tensor([[2, 3]]))
    equal(routing.logits_TE, [[2, 3]])
    routing.logits_TE.sum().backward()
    assert x_TD.grad is not None
    equal(x_TD.grad, [[2, 3]])
    # A bf16 input is multiplied in fp32: 1.01, which bf16 does not have, is not rounded away.
    made = made.bfloat16()
    routing = made(torch.ones(1, 2).bfloat16(), None, noise_TD=torch.tensor([[1.01, 1.0]]))
    torch.testing.assert_close(routing.logits_TE, torch.tensor([[1.01, 1.0]]), rtol=0, atol=1e-7)
