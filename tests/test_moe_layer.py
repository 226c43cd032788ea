"""The layer against the float64 oracle, and by hand: outputs, losses, logits, counts and every gradient.

What the choices of a recipe do together is in test_layer_grid.py; here they stand alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import pytest
import torch
from layer_oracle import Oracle, close, counts_of, gradients, relative, routes_of
from programs import layer_grid
from programs.layer_grid import D, random
from torch import Tensor

from moepp_ds import moe_layer
from moepp_ds.config import MoEConfig, expert_capacity
from moepp_ds.dispatch import DispatchPlan, plan_dispatch
from moepp_ds.experts import Backend
from moepp_ds.moe_layer import LocalExchange, MoELayer, MoEOutput, Parcel
from moepp_ds.reference import ReferenceOutput
from moepp_ds.router import Routing

F = 4
"""Rows of 8 and 4 numbers are multiples of 16 bytes in fp32; bf16 needs F = 8 for grouped_mm."""


def moe_config(**changes: object) -> MoEConfig:
    """4 FFN + 2 constant + 1 copy + 1 zero experts, top 2, unless changed."""
    return MoEConfig.model_validate({"num_ffn_experts": 4, "num_constant": 2, **changes})


make_layer = functools.partial(layer_grid.make_layer, ffn_hidden_size=F)

Layer = Callable[[Tensor, Tensor | None], MoEOutput | ReferenceOutput]
"""A layer and its oracle are called alike, and what they return has the same names for the same things."""


def check_exact(config: MoEConfig, *, num_tokens: int, has_residual: bool, seed: int = 0) -> None:
    """Layer and oracle, each routing for itself, agree to 1e-10 in all they return and in every gradient."""
    layer = make_layer(config, has_residual=has_residual, seed=seed)
    oracle = Oracle(layer, config)
    x_TD = random(num_tokens, D, seed=seed + 1).requires_grad_()
    inputs, before_TE = {"x": x_TD}, None
    if has_residual:
        before_TE = random(num_tokens, config.num_experts, seed=seed + 2).requires_grad_()
        inputs["previous logits"] = before_TE

    out, expected = layer(x_TD, before_TE), oracle(x_TD, before_TE)
    close(out.output_TD, expected.output_TD, "output")
    close(out.logits_TE, expected.logits_TE, "logits")
    close(out.balance_loss, expected.balance_loss, "balance loss")
    assert counts_of(out) == counts_of(expected)

    # Random directions, so that no gradient can hide behind another: all three outputs at once.
    output_grad_TD = random(num_tokens, D, seed=seed + 3)
    logits_grad_TE = random(num_tokens, config.num_experts, seed=seed + 4)

    def loss_of(output_TD: Tensor, logits_TE: Tensor, balance: Tensor) -> Tensor:
        return (output_TD * output_grad_TD).sum() + (logits_TE * logits_grad_TE).sum() + 3 * balance

    loss = loss_of(out.output_TD, out.logits_TE, out.balance_loss)
    actual_grads = gradients(loss, {**inputs, **dict(layer.named_parameters())})
    loss = loss_of(expected.output_TD, expected.logits_TE, expected.balance_loss)
    for name, expected_grad in gradients(loss, {**inputs, **oracle.leaves}).items():
        close(actual_grads[name], expected_grad, f"gradient of {name}")


# float64, the layer routes for itself

KINDS: dict[str, dict[str, object]] = {
    "all kinds": {},
    "vanilla": {"num_constant": 0, "num_copy": 0, "num_zero": 0},
    "no constant": {"num_constant": 0},
    "no copy": {"num_copy": 0},
    "no zero": {"num_zero": 0},
    "several of each": {"num_ffn_experts": 3, "num_constant": 3, "num_copy": 2, "num_zero": 2},
    "one FFN": {"num_ffn_experts": 1, "num_constant": 1},
}
SEATING: dict[str, dict[str, object]] = {
    "dropless": {"dropless": True},
    "probability, assignments": {},
    "probability, tokens": {"capacity_counts": "tokens"},
    "position, assignments": {"drop_policy": "position"},
    "position, tokens": {"drop_policy": "position", "capacity_counts": "tokens"},
    "rank, assignments": {"drop_policy": "rank"},
}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seating", SEATING)
@pytest.mark.parametrize("kinds", KINDS)
def test_layer_is_the_oracle(kinds: str, seating: str, top_k: int) -> None:
    config = moe_config(**KINDS[kinds], **SEATING[seating], top_k=top_k)
    cases = ((1, 0.75, True), (2, 1.0, False), (9, 0.25, True), (13, 0.75, False))
    for num_tokens, tau, has_residual in cases:
        changed = config.model_copy(update={"tau": tau})
        check_exact(changed, num_tokens=num_tokens, has_residual=has_residual, seed=num_tokens)


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("drop_policy", ["probability", "position", "rank"])
def test_tokens_that_lose_every_choice(drop_policy: str, tau: float) -> None:
    # gamma 0.1: FFN experts have one seat and the others one or two, at most 12 in all, so at least 12 of 24
    # tokens get none of the two experts that each wants.
    config = moe_config(capacity_factor=0.1, tau=tau, drop_policy=drop_policy)
    check_exact(config, num_tokens=24, has_residual=True)
    out = make_layer(config)(random(24, D, seed=1), None)
    kept_E = out.statistics.kept_E
    assert kept_E[:4].max() == 1 and kept_E.sum() <= 12 and out.statistics.wanted_E.sum() == 48
    assert (out.output_TD == 0).all(dim=-1).sum() >= 12


def test_every_expert_at_once() -> None:
    config = moe_config(top_k=8)
    check_exact(config, num_tokens=5, has_residual=True)
    assert make_layer(config)(random(5, D, seed=1), None).statistics.wanted_E.tolist() == [5] * 8


@pytest.mark.parametrize("seating", SEATING)
def test_two_layers_chained_by_the_gating_residual(seating: str) -> None:
    # The loss is of the second layer alone: the first router learns through the logits that travel, too.
    config = moe_config(**SEATING[seating])
    layers = [make_layer(config, has_residual=second, seed=7 + second) for second in (False, True)]
    oracles = [Oracle(layer, config) for layer in layers]
    x_TD, grad_TD = random(11, D, seed=1).requires_grad_(), random(11, D, seed=2)

    def run(first: Layer, second: Layer) -> tuple[Tensor, Tensor]:
        out = first(x_TD, None)
        after = second(x_TD + out.output_TD, out.logits_TE)
        return after.output_TD, (after.output_TD * grad_TD).sum() + 3 * after.balance_loss

    output_TD, loss = run(*layers)
    expected_TD, expected_loss = run(*oracles)
    close(output_TD, expected_TD, "output")
    for layer, oracle in zip(layers, oracles):
        actual = gradients(loss, dict(layer.named_parameters()))
        for name, expected in gradients(expected_loss, oracle.leaves).items():
            close(actual[name], expected, name)
    actual_x, expected_x = (gradients(total, {"x": x_TD})["x"] for total in (loss, expected_loss))
    close(actual_x, expected_x, "x")
    first_router = gradients(output_TD.sum(), dict(layers[0].named_parameters()))["router.weight_ED"]
    assert first_router.abs().max() > 0


@pytest.mark.parametrize("top_k", [1, 3])
def test_every_parameter_is_in_the_graph(top_k: int) -> None:
    # One token reaches at most three of eight experts; all parameters take part nevertheless (no materialised
    # zeros).
    layer = make_layer(moe_config(top_k=top_k), has_residual=True)
    layer(random(1, D, seed=1), random(1, 8, seed=2)).output_TD.sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is None] == []


# by hand


def hand_layer(**changes: Any) -> MoELayer:
    """One FFN (0), one constant (1), one copy (2), one zero expert (3); top 2, dropless, unless changed.

    Logits are x itself for x = [a, b, c, d, 0...]. The FFN expert is silu(x_4) x_5 in feature 6; the constant expert
    has W_c = 0, hence (x + v) / 2 with v = ones. A shared expert of any width is silu(x_4) x_5 in feature 7.
    """
    given = {"num_ffn_experts": 1, "num_constant": 1, "dropless": True, **changes}
    layer = make_layer(moe_config(**given))
    assert layer.constants is not None
    layer.router.weight_ED.data = torch.eye(4, D).double()
    for experts, feature in ((layer.experts, 6), (layer.shared, 7)):
        if experts is not None:
            width = experts.down_EFD.shape[1]
            experts.gate_up_EDG.data.zero_()
            experts.down_EFD.data.zero_()
            experts.gate_up_EDG.data[0, 4, width - 1] = experts.gate_up_EDG.data[0, 5, 2 * width - 1] = 1
            experts.down_EFD.data[0, width - 1, feature] = 1
    layer.constants.selector_J2D.data.zero_()
    layer.constants.value_JD.data.fill_(1)
    return layer


def hand_tokens() -> Tensor:
    """Token 0 chooses FFN and constant with 4/8 and 2/8, token 1 zero (5/10) and copy (3/10)."""
    x_TD = torch.zeros(2, D, dtype=torch.float64)
    x_TD[:, :4] = torch.tensor([[4, 2, 1, 1], [1, 1, 3, 5]]).double().log()
    x_TD[:, 4:6] = torch.tensor([[1.0, 3.0], [2.0, 5.0]])
    return x_TD


def silu(value: float) -> float:
    return value / (1 + exp(-value))


def one_at(feature: int, value: float) -> Tensor:
    made = torch.zeros(D, dtype=torch.float64)
    made[feature] = value
    return made


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_layer_by_hand() -> None:
    """Balance: f = [1/2] * 4, P = [(4/8 + 1/10) / 2, ...] = [.3, .175, .2125, .3125]; the loss is
    1/2 * (.3 + 0.75 * .7) = 0.4125, and perfect would be K / (N_FFN + N_ZC / tau) = 2 / 5."""
    layer, x_TD = hand_layer(), hand_tokens()
    out = layer(x_TD, None)
    close(out.output_TD[0], 4 / 8 * one_at(6, silu(1) * 3) + 2 / 8 * (x_TD[0] + 1) / 2, "token 0")
    close(out.output_TD[1], 3 / 10 * x_TD[1], "token 1")
    close(out.balance_loss, scalar(0.4125), "balance loss")
    close(out.statistics.balance, scalar(2 * 0.4125 * 5 / 2), "normalised balance, summed over two tokens")
    close(out.z_loss, scalar((log(8) ** 2 + log(10) ** 2) / 2), "z-loss")
    assert out.statistics.wanted_E.tolist() == out.statistics.kept_E.tolist() == [1, 1, 1, 1]
    assert out.statistics.first_E.tolist() == [1, 0, 0, 1]
    assert out.statistics.histogram_H.tolist() == [1, 1]


def test_input_scale_is_for_experts_and_neither_for_the_router_nor_for_shared_ones() -> None:
    layer, x_TD = hand_layer(expert_input_scale=3.0, num_shared_experts=2), hand_tokens()
    out = layer(x_TD, None)
    shared = [one_at(7, silu(1) * 3), one_at(7, silu(2) * 5)]
    close(out.output_TD[0], 4 / 8 * one_at(6, silu(3) * 9) + 2 / 8 * (3 * x_TD[0] + 1) / 2 + shared[0], "token 0")
    close(out.output_TD[1], 3 / 10 * 3 * x_TD[1] + shared[1], "token 1")
    close(out.logits_TE, x_TD[:, :4], "logits")


def test_the_constant_experts_selector_reads_the_scaled_input() -> None:
    # Its scores are 2 x_5 and 0: for 2 x with x_5 = 3 they are 12 and 0.
    layer, x_TD = hand_layer(expert_input_scale=2.0), hand_tokens()[:1]
    assert layer.constants is not None
    layer.constants.selector_J2D.data[0, 0, 5] = 2
    keep = 1 / (1 + exp(-12))
    expected_D = 4 / 8 * one_at(6, silu(2) * 6) + 2 / 8 * (keep * 2 * x_TD[0] + (1 - keep))
    close(layer(x_TD, None).output_TD[0], expected_D, "output")


def test_shared_experts_have_no_router_weight_and_may_have_a_gate() -> None:
    x_TD = hand_tokens()
    plain = hand_layer()(x_TD, None)
    for changes in ({"num_shared_experts": 1}, {"num_shared_experts": 3, "combine": "renormalize_selected"}):
        layer = hand_layer(**changes, combine_scale=2.5)
        without = hand_layer(**{**changes, "num_shared_experts": 0}, combine_scale=2.5)
        added_TD = layer(x_TD, None).output_TD - without(x_TD, None).output_TD
        close(added_TD, torch.stack([one_at(7, silu(1) * 3), one_at(7, silu(2) * 5)]), "shared")
    # Gate: a sigmoid of x_4 - x_5, which are 1 and 3, 2 and 5.
    layer = hand_layer(num_shared_experts=1, shared_expert_gate=True)
    assert layer.shared_gate_D is not None and layer.shared_gate_D.shape == (D,)
    layer.shared_gate_D.data = one_at(4, 1.0) - one_at(5, 1.0)
    out = layer(x_TD, None)
    gates = [1 / (1 + exp(2)), 1 / (1 + exp(3))]
    expected_TD = torch.stack([one_at(7, gates[0] * silu(1) * 3), one_at(7, gates[1] * silu(2) * 5)])
    close(out.output_TD - plain.output_TD, expected_TD, "gated")
    # They are no choice of a token: counts are what they were.
    assert counts_of(out) == counts_of(plain)


def test_widths_of_experts() -> None:
    fine = make_layer(moe_config(expert_ffn_hidden_size=3, num_shared_experts=2))
    assert fine.shared is not None
    assert list(fine.experts.down_EFD.shape) == [4, 3, D] and list(fine.experts.gate_up_EDG.shape) == [4, D, 6]
    assert list(fine.shared.down_EFD.shape) == [1, 6, D] and list(fine.shared.gate_up_EDG.shape) == [1, D, 12]
    assert list(make_layer(moe_config()).experts.down_EFD.shape) == [4, F, D]


def test_combine_weights_are_those_of_all_choices_whoever_got_a_seat() -> None:
    # gamma 0.4 at tau 1: 0.4 * 2 * 4 / 4 experts = 0.8, one seat each. Four times token 0, so three lose both choices.
    # The one that stays weighs FFN and constant 4/6 and 2/6, or as they are.
    tokens = {"dropless": False, "capacity_factor": 0.4, "tau": 1.0}
    x_TD = hand_tokens()[:1].expand(4, -1)
    for combine, weights in (("softmax", (4 / 8, 2 / 8)), ("renormalize_selected", (4 / 6, 2 / 6))):
        layer = hand_layer(**tokens, combine=combine, combine_scale=2.0)
        out = layer(x_TD, None)
        assert out.statistics.kept_E.tolist() == [1, 1, 0, 0]
        expected_D = 2 * (weights[0] * one_at(6, silu(1) * 3) + weights[1] * (x_TD[0] + 1) / 2)
        close(out.output_TD[0], expected_D, "first token")
        assert not out.output_TD[1:].any()
    # Token 0 keeps the copy expert's seat from token 1, which keeps its zero expert alone and still weighs that 5/8.
    layer = hand_layer(**tokens, combine="renormalize_selected", drop_policy="position")
    x_TD = hand_tokens()[[1, 1]]
    x_TD[0, 2] = log(6)  # 1 1 6 5: copy 6/11, zero 5/11
    out = layer(x_TD, None)
    assert routes_of(out.routing, out.plan) == [[(2, True), (3, True)], [(3, False), (2, False)]]
    close(out.output_TD[0], 6 / 11 * x_TD[0], "first")
    assert not out.output_TD[1].any()


def test_a_token_that_chose_zero_experts_alone_gives_nothing() -> None:
    # With two zero experts (and no copy) token 1 chooses 2 and 3, both zero.
    changes = {"num_copy": 0, "num_zero": 2}
    for combine in ("softmax", "renormalize_selected", "renormalize_computing"):
        layer, x_TD = hand_layer(**changes, combine=combine), hand_tokens().requires_grad_()
        out = layer(x_TD, None)
        assert routes_of(out.routing, out.plan)[1] == [(3, True), (2, True)]
        assert not out.output_TD[1].any() and out.output_TD[0].any()
        out.output_TD.sum().backward()
        assert x_TD.grad is not None and x_TD.grad.isfinite().all() and not x_TD.grad[1].any()
        out = hand_layer(**changes, combine=combine, num_shared_experts=1)(x_TD, None)
        close(out.output_TD[1], one_at(7, silu(2) * 5), "shared experts see it all the same")


def test_fewest_seats_are_the_recipes() -> None:
    # Twelve times token 0. gamma 0.1: 0.1 * 2 * 12 / (0.75 + 3) = 0.64 seats and three quarters of that: one each.
    x_TD = hand_tokens()[:1].expand(12, -1)
    for fewest, kept in ((1, 1), (4, 4), (100, 12)):
        layer = hand_layer(dropless=False, capacity_factor=0.1, min_capacity=fewest)
        assert layer(x_TD, None).statistics.kept_E.tolist() == [kept, kept, 0, 0]
    # More than the fewest are what equation 8 says: 1.0 * 2 * 12 / 3.75 = 6.4 and 4.8.
    layer = hand_layer(dropless=False, capacity_factor=1.0, min_capacity=4)
    assert layer(x_TD, None).statistics.kept_E.tolist() == [5, 7, 0, 0]


def test_threshold_computes_what_it_chose_and_no_more() -> None:
    # Token 0 (4 2 1 1 over 8) at 0.4 takes the FFN expert alone, token 1 (1 1 3 5 over 10) zero alone; at 0.6 one more.
    x_TD, rows = hand_tokens(), []
    for threshold, chosen in ((0.4, [[0], [3]]), (0.6, [[0, 1], [3, 2]]), (1.0, [[0, 1, 2, 3], [3, 2, 0, 1]])):
        layer = hand_layer(router={"threshold": threshold})
        layer.exchange = watched = WatchedExchange()
        out = layer(x_TD, None)
        assert [[expert for expert, _ in token] for token in routes_of(out.routing, out.plan)] == chosen
        rows.append(sum(watched.counts))
        # f counts first choices: half of the tokens chose 0 first, half 3. L = 1/2 (.3 + 0.75 * .3125).
        close(out.balance_loss, scalar(0.5 * (0.3 + 0.75 * 0.3125)), "balance loss")
    assert rows == [1, 1, 2]


# what it is told


def test_bias_chooses_in_training_and_in_evaluation() -> None:
    # 0.5 more for the copy expert makes it token 0's first choice (1/8 + 0.5 against 4/8), with its own weight.
    x_TD, bias_E = hand_tokens()[:1], one_at(2, 0.5)[:4]
    for layer in (hand_layer(), hand_layer().eval()):
        out = layer(x_TD, None, bias_E=bias_E)
        assert routes_of(out.routing, out.plan) == [[(2, True), (0, True)]]
        close(out.output_TD[0], 1 / 8 * x_TD[0] + 4 / 8 * one_at(6, silu(1) * 3), "output")


def test_noise_is_for_the_router_alone() -> None:
    # Twice x_2 for the router: token 1's exponentials are 1 1 9 5 over 16; its experts still see x.
    x_TD, noise_TD = hand_tokens(), torch.ones(2, D, dtype=torch.float64)
    noise_TD[:, 2] = 2
    out = hand_layer(num_shared_experts=1)(x_TD, None, noise_TD=noise_TD)
    close(out.logits_TE, (x_TD * noise_TD)[:, :4], "logits")
    close(out.output_TD[1], 9 / 16 * x_TD[1] + one_at(7, silu(2) * 5), "token 1")


def test_load_of_the_balance_loss() -> None:
    # P = [.3, .175, .2125, .3125]; all choices: f = 1/2 each. First ones: f = [1/2, 0, 0, 1/2].
    x_TD, perfect = hand_tokens(), 1 + 3 / 0.75
    first = 0.5 * (0.3 + 0.75 * 0.3125)
    told_E = torch.tensor([1.0, 0.25, 0.5, 0.75])
    told = 0.3 + 0.75 * (0.25 * 0.175 + 0.5 * 0.2125 + 0.75 * 0.3125)
    grouped = 0.5 * 0.3 + 0.75 * (1 / 6) * 0.7
    for changes, share_E, loss, load in (
        ({"balance_counts": "first"}, None, first, 1.0),
        ({}, told_E, told, 2.5),
        ({"balance_counts": "first"}, told_E, told, 2.5),
        ({"balance": "per_group", "balance_counts": "first"}, None, grouped, 1.0),
    ):
        out = hand_layer(**changes)(x_TD, None, share_E=share_E)
        close(out.balance_loss, scalar(loss), f"balance loss of {changes}")
        close(out.statistics.balance, scalar(2 * loss * perfect / load), f"normalised balance of {changes}")


def test_without_a_balance_loss_the_balance_is_reported_nevertheless() -> None:
    out = hand_layer(balance="none")(hand_tokens(), None)
    assert out.balance_loss.item() == 0
    assert torch.equal(out.statistics.balance, hand_layer()(hand_tokens(), None).statistics.balance)


def test_z_loss_is_of_the_logits_behind_the_scores() -> None:
    # Token 0 has logits log 4, log 2, 0, 0; brought to deviation 1.5 they are other numbers.
    logits_E = torch.tensor([4, 2, 1, 1]).double().log()
    scored_E = logits_E / logits_E.std() * 1.5
    out = hand_layer(router={"logit_std": 1.5})(hand_tokens()[:1], None)
    close(out.z_loss, scored_E.exp().sum().log() ** 2, "z-loss")
    close(out.logits_TE[0], logits_E, "logits travel as they were")


# modes


def test_evaluation_is_dropless() -> None:
    config = moe_config(capacity_factor=0.2)
    layer, x_TD = make_layer(config), random(16, D, seed=1)
    dropping = layer(x_TD, None).statistics
    assert dropping.kept_E.sum() < dropping.wanted_E.sum() == 32
    out, expected = layer.eval()(x_TD, None), Oracle(layer, config)(x_TD, None, dropless=True)
    assert torch.equal(out.statistics.kept_E, out.statistics.wanted_E)
    assert torch.equal(out.statistics.wanted_E, dropping.wanted_E)
    close(out.output_TD, expected.output_TD, "output")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_recomputation_changes_nothing_and_routes_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"router": 0, "plan": 0, "experts": 0}

    def counted_plan(**arguments: object) -> DispatchPlan:
        calls["plan"] += 1
        return plan_dispatch(**arguments)  # type: ignore[arg-type]

    def count(name: str) -> None:
        calls[name] += 1

    config = moe_config(capacity_factor=0.5)
    layer = make_layer(config, has_residual=True, dtype=dtype)
    monkeypatch.setattr(moe_layer, "plan_dispatch", counted_plan)
    layer.router.register_forward_hook(lambda *_: count("router"))
    layer.experts.register_forward_hook(lambda *_: count("experts"))
    results, all_calls = [], []
    for recompute in (False, True):
        calls.update(router=0, plan=0, experts=0)
        x_TD = random(12, D, seed=1, dtype=dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        before_TE = random(12, 8, seed=2, dtype=wide).requires_grad_()
        out = layer(x_TD, before_TE, recompute=recompute)
        loss = out.output_TD.square().sum() + out.balance_loss + out.logits_TE.sum()
        grads = gradients(loss, {"x": x_TD, "previous": before_TE, **dict(layer.named_parameters())})
        results.append({**vars(out.statistics), **vars(out.routing), **vars(out), **grads})
        all_calls.append(dict(calls))
    plain, recomputed = results
    for name, value in plain.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, recomputed[name]), name
    assert all_calls == [{"router": 1, "plan": 1, "experts": 1}, {"router": 1, "plan": 1, "experts": 2}]


NEW_CHOICES: dict[str, dict[str, object]] = {
    "threshold": {"router": {"threshold": 0.6}, "top_k": None, "capacity_factor": 1.5},
    "threshold 1": {"router": {"threshold": 1.0}, "top_k": None, "dropless": True},
    "router": {"router": {"num_layers": 2, "logit_std": 1.5, "jitter": 0.2, "z_loss_weight": 0.1}},
    "released": {"variant": "released", "capacity_factor": 0.6},
    "combine": {"combine": "renormalize_selected", "combine_scale": 2.5, "drop_policy": "rank", "min_capacity": 3},
    "experts": {"num_shared_experts": 2, "shared_expert_gate": True, "expert_ffn_hidden_size": 3},
    "balance": {"balance": "per_group", "balance_counts": "first", "balance_scope": "global_batch"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choices", NEW_CHOICES)
def test_recomputation_keeps_the_first_routing_even_of_near_ties(choices: str, dtype: torch.dtype) -> None:
    """Every token is a near-tie, and between the passes the router's weights move: routed anew, all would change.

    What another kernel or another order of adding does to a recomputed router in its last bits, this does for certain.
    """
    config = moe_config(**NEW_CHOICES[choices])
    results = []
    for recompute in (False, True):
        layer = make_layer(config, has_residual=True, dtype=dtype)
        for parameter in layer.router.parameters():
            parameter.data = parameter.data[:1].expand_as(parameter).clone()  # equal rows: all scores are equal
        x_TD = random(12, D, seed=1, dtype=dtype).requires_grad_()
        before_TE = random(12, 8, seed=2, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        told = {
            "bias_E": 1e-6 * random(8, seed=3, dtype=torch.float32),
            "share_E": random(8, seed=4, dtype=torch.float32).abs() if choices == "balance" else None,
            "noise_TD": 1 + 0.1 * random(12, D, seed=5, dtype=torch.float32) if choices == "router" else None,
        }
        if config.router.logit_std is not None:  # equal logits have no deviation; these differ by a rounding or so
            before_TE.data *= 1e-3
            assert layer.router.residual_EE is not None
            layer.router.residual_EE.data += 1e-3 * random(8, 8, seed=6, dtype=dtype)
        out = layer(x_TD, before_TE, recompute=recompute, **told)
        for parameter in layer.router.parameters():
            parameter.data.add_(random(*parameter.shape, seed=9, dtype=dtype))
        with torch.no_grad():  # the premise: now the tokens would go elsewhere
            again = layer.router(x_TD, before_TE, bias_E=told["bias_E"], noise_TD=told["noise_TD"])
        if choices != "threshold 1":
            assert routes_of(again, planned(layer, config, again)) != routes_of(out.routing, out.plan)
        loss = out.output_TD.square().sum() + 3 * out.balance_loss + out.logits_TE.sum() + out.z_loss
        grads = gradients(loss, {"x": x_TD, "previous": before_TE, **dict(layer.named_parameters())})
        results.append({**vars(out.statistics), **vars(out.routing), **vars(out), **grads, "loss": loss})
    plain, recomputed = results
    for name, value in plain.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, recomputed[name]), name


def test_recomputation_is_for_training_alone() -> None:
    layer, x_TD = make_layer(moe_config()), random(6, D, seed=1)
    with torch.no_grad():
        assert torch.equal(layer(x_TD, None, recompute=True).output_TD, layer(x_TD, None).output_TD)


def test_the_input_is_left_as_it_was_and_nothing_is_stored() -> None:
    layer = make_layer(moe_config())
    x_TD, state = random(6, D, seed=1), {name: value.clone() for name, value in layer.state_dict().items()}
    kept = x_TD.clone()
    first, second = layer(x_TD, None), layer(x_TD, None)
    assert torch.equal(x_TD, kept) and torch.equal(first.output_TD, second.output_TD)
    assert list(layer.buffers()) == []
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


# what travels


@dataclass
class WatchedExchange:
    """A local exchange that writes down what it carried and when."""

    events: list[str] = field(default_factory=list)
    rows_RD: Tensor | None = None
    counts: Sequence[int] = ()

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        self.events.append("send")
        self.rows_RD, self.counts = rows_RD, counts
        return WatchedParcel(LocalExchange().send(rows_RD, counts), self.events)


@dataclass
class WatchedParcel:
    parcel: Parcel
    events: list[str]

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        self.events.append("receive")
        return self.parcel.receive()

    def give_back(self, rows_QD: Tensor) -> Tensor:
        self.events.append("give back")
        return self.parcel.give_back(rows_QD)


@pytest.mark.parametrize("seating", SEATING)
def test_ffn_assignments_alone_travel_and_the_rest_is_computed_meanwhile(seating: str) -> None:
    config = moe_config(**SEATING[seating])
    layer, x_TD = make_layer(config), random(10, D, seed=1)
    assert layer.constants is not None
    layer.exchange = watched = WatchedExchange()
    layer.constants.register_forward_hook(lambda *_: watched.events.append("constants"))
    layer.experts.register_forward_hook(lambda *_: watched.events.append("experts"))
    out = layer(x_TD, None)
    assert watched.events == ["send", "constants", "receive", "experts", "give back"]
    # What was sent: for each FFN expert, in order, the tokens whose choice it kept, by token.
    routes = Oracle(layer, config)(x_TD, None).routes
    tokens = [t for expert in range(4) for t, choices in enumerate(routes) if (expert, True) in choices]
    assert watched.rows_RD is not None and torch.equal(watched.rows_RD, x_TD[tokens])
    assert list(watched.counts) == out.statistics.kept_E[:4].tolist()


# every fast path, on identical routes


def use_backend(layer: MoELayer, backend: Backend) -> None:
    """Have the layer's FFN experts use one backend, also where `auto` would pick another."""
    forward = functools.partial(layer.experts.forward, backend=backend)
    layer.experts.forward = forward  # type: ignore[method-assign]


def planned(layer: MoELayer, config: MoEConfig, routing: Routing) -> DispatchPlan:
    """The seats that the recipe gives, worked out here and not by the layer."""
    capacity_E = None
    if not config.dropless:
        capacity = expert_capacity(config, len(routing.logits_TE))
        zero_computation = [capacity.zero_computation] * config.num_zero_computation
        capacity_E = [capacity.ffn] * config.num_ffn_experts + zero_computation
    return plan_dispatch(
        expert_N=routing.expert_N,
        rank_N=routing.rank_N,
        probability_N=routing.probability_N,
        num_experts=config.num_experts,
        num_ffn=config.num_ffn_experts,
        capacity_E=capacity_E,
        drop_policy=config.drop_policy or "probability",
    )


FAST_PATHS = [
    ("slices", torch.float32, "cpu", 1e-5),
    ("grouped_mm", torch.float32, "cpu", 1e-5),
    ("slices", torch.bfloat16, "cpu", 2e-2),
    ("grouped_mm", torch.bfloat16, "cpu", 2e-2),
    pytest.param("slices", torch.float32, "cuda", 1e-5, marks=pytest.mark.gpu),
    pytest.param("grouped_mm", torch.float32, "cuda", 1e-5, marks=pytest.mark.gpu),
    pytest.param("slices", torch.bfloat16, "cuda", 2e-2, marks=pytest.mark.gpu),
    pytest.param("grouped_mm", torch.bfloat16, "cuda", 2e-2, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("kinds", ["all kinds", "vanilla", "several of each"])
@pytest.mark.parametrize("seating", ["dropless", "probability, assignments", "position, tokens"])
@pytest.mark.parametrize(("backend", "dtype", "device", "limit"), FAST_PATHS)
def test_fast_path_is_the_oracle_on_its_routes(
    backend: Backend, dtype: torch.dtype, device: str, limit: float, seating: str, kinds: str
) -> None:
    """Weights and inputs are numbers of `dtype`; the oracle computes with the same numbers in float64."""
    config = moe_config(**KINDS[kinds], **SEATING[seating])
    layer = make_layer(config, has_residual=True, ffn_hidden_size=8, dtype=dtype, device=device)
    use_backend(layer, backend)
    oracle = Oracle(layer, config)
    x_TD = random(40, D, seed=1, dtype=dtype, device=device).requires_grad_()
    before_TE = random(40, config.num_experts, seed=2, dtype=torch.float32, device=device).requires_grad_()
    routing = layer.router(x_TD, before_TE)
    plan = planned(layer, config, routing)
    output_TD = layer.compute(x_TD, routing.gate_N, routing.token_N, routing.expert_N, plan)
    assert output_TD.dtype == dtype and routing.logits_TE.dtype == torch.float32

    wide_x_TD, wide_before_TE = (t.detach().cpu().double().requires_grad_() for t in (x_TD, before_TE))
    expected = oracle(wide_x_TD, wide_before_TE, routes_of(routing, plan))
    assert relative(output_TD, expected.output_TD) < limit
    assert relative(routing.logits_TE, expected.logits_TE) < 1e-5

    grad_TD = random(40, D, seed=3, dtype=dtype, device=device)
    loss = (output_TD * grad_TD).sum()
    actual = gradients(loss, {"x": x_TD, "previous": before_TE, **dict(layer.named_parameters())})
    loss = (expected.output_TD * grad_TD.cpu().double()).sum()
    wide = gradients(loss, {"x": wide_x_TD, "previous": wide_before_TE, **oracle.leaves})
    errors = {name: relative(actual[name], expected_grad) for name, expected_grad in wide.items()}
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compute_is_what_forward_returns(dtype: torch.dtype) -> None:
    # The comparison above hands the plan over itself; forward makes the same one.
    config = moe_config(capacity_factor=0.5)
    layer, x_TD = make_layer(config, dtype=dtype), random(20, D, seed=1, dtype=dtype)
    routing = layer.router(x_TD, None)
    plan = planned(layer, config, routing)
    out = layer(x_TD, None)
    assert torch.equal(out.statistics.kept_E, plan.kept_E) and plan.kept_E.sum() < plan.wanted_E.sum()
    output_TD = layer.compute(x_TD, routing.gate_N, routing.token_N, routing.expert_N, plan)
    assert torch.equal(out.output_TD, output_TD)
