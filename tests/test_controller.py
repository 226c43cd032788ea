"""The controller, by hand: how biases and loads follow from counts, and that a checkpoint's JSON keeps every bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from moepp_ds.config import ControllerConfig, MoEConfig, controller_rate
from moepp_ds.controller import RoutingState, first_state, next_state, restored_state


def moe_config(**changes: Any) -> MoEConfig:
    """2 FFN + 1 copy + 1 zero experts, top 2, with a target of 1 FFN expert per token."""
    given = {"num_ffn_experts": 2, "num_constant": 0, "controller": {"target_ffn_experts": 1.0}, **changes}
    return MoEConfig.model_validate(given)


def counts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def moved(moe: MoEConfig, wanted_E: list[int], *, tokens: int, rate: float, bias_E: Any = (0.0,) * 4) -> list[float]:
    """The biases of one layer after one update."""
    state = RoutingState(bias_LE=(tuple(bias_E),))
    after = next_state(state, moe, wanted_LE=counts(wanted_E), first_LE=counts(wanted_E), tokens=tokens, rate=rate)
    assert after.bias_LE is not None and len(after.bias_LE) == 1
    return list(after.bias_LE[0])


# the two rules


def test_proportional_rule() -> None:
    # LongCat: mu (K_e / N_FFN - T_i / T_all) / K with K_e = 1, N_FFN = 2, K = 2: of 8 tokens expert 0 had 6 and
    # expert 1 had 2, so the errors are (1/2 - 6/8) / 2 = -1/8 and (1/2 - 2/8) / 2 = 1/8. Rate 0.5, added to what was.
    after = moved(moe_config(), [6, 2, 5, 3], tokens=8, rate=0.5, bias_E=(1.0, 2.0, 0.0, 0.0))
    assert after == [1 - 0.5 / 8, 2 + 0.5 / 8, 0.0, 0.0]


def test_sign_rule() -> None:
    moe = moe_config(controller={"rule": "sign", "target_ffn_experts": 1.0})
    # Too many, as many as wanted (half of 8 tokens), too few: the load of zero-computation experts moves nothing.
    assert moved(moe, [6, 2, 8, 0], tokens=8, rate=0.25) == [-0.25, 0.25, 0.0, 0.0]
    assert moved(moe, [4, 3, 0, 9], tokens=8, rate=0.25) == [0.0, 0.25, 0.0, 0.0]
    assert moved(moe, [4, 4, 8, 0], tokens=8, rate=0.25, bias_E=(1, 2, 0, 0)) == [1.0, 2.0, 0.0, 0.0]


def test_target_that_tau_implies() -> None:
    # tau 0.5: 2 choices times 0.5 * 2 / (0.5 * 2 + 2) = 2/3 FFN experts, a third of a choice for each of the two.
    moe = moe_config(tau=0.5, controller={})
    assert moved(moe, [3, 1, 1, 1], tokens=3, rate=1.0) == pytest.approx([(1 / 3 - 1) / 2, 0.0, 0.0, 0.0], abs=1e-15)


def test_without_zero_computation_experts_it_balances_the_load() -> None:
    # DeepSeek-V3: the target is top_k itself, 2 of 4 experts a token, so each is wanted by half of the tokens.
    controller = {"rule": "sign", "rate": 0.001, "final_rate": 0.001}
    moe = moe_config(num_ffn_experts=4, num_zero=0, num_copy=0, controller=controller)
    assert moved(moe, [10, 5, 4, 1], tokens=10, rate=0.001) == [-0.001, 0.0, 0.001, 0.001]


def test_mean_choices_of_a_threshold_are_measured() -> None:
    # 10 choices of 8 tokens: K = 1.25. Each FFN expert should have 0.25 per token and has 0.5 and 0.125.
    moe = moe_config(router={"threshold": 0.5}, dropless=True, controller={"target_ffn_experts": 0.5})
    after = moved(moe, [4, 1, 2, 3], tokens=8, rate=1.0)
    assert after == [(0.25 - 0.5) / 1.25, (0.25 - 0.125) / 1.25, 0.0, 0.0]


def test_every_layer_moves_by_its_own_load() -> None:
    state = first_state(moe_config(), 3)
    assert state.bias_LE == ((0.0,) * 4,) * 3 and state.share_LE is None
    wanted_LE = counts([6, 2, 5, 3], [4, 4, 4, 4], [2, 6, 5, 3])
    after = next_state(state, moe_config(), wanted_LE=wanted_LE, first_LE=wanted_LE, tokens=8, rate=0.5)
    step = 0.5 / 8
    assert after.bias_LE == ((-step, step, 0.0, 0.0), (0.0,) * 4, (step, -step, 0.0, 0.0))
    assert after.share_LE is None  # counted in the micro batch


def test_it_brings_the_load_to_the_target_and_keeps_it_there() -> None:
    # Scores of 1,000 tokens are drawn once; the load follows from the biases as a router's does. Experts 0 and 1
    # are far more probable than the others, and asked for half as often in the end.
    moe, generator = moe_config(), torch.Generator().manual_seed(0)
    logits_TE = torch.randn(1000, 4, generator=generator, dtype=torch.float64) + torch.tensor([2.0, 1.5, 0, 0])
    probability_TE = logits_TE.softmax(dim=-1)
    state, loads = first_state(moe, 1), []
    for _ in range(200):
        assert state.bias_LE is not None
        expert_TK = (probability_TE + torch.tensor(state.bias_LE[0])).topk(2).indices
        wanted_E = torch.bincount(expert_TK.flatten(), minlength=4)
        loads.append(wanted_E[:2] / 1000)
        state = next_state(state, moe, wanted_LE=wanted_E[None], first_LE=wanted_E[None], tokens=1000, rate=0.3)
    assert loads[0].sum() > 1.5
    for load in loads[-50:]:
        assert (load - 0.5).abs().max() < 0.01


# the rate


def test_rate_falls_along_a_straight_line() -> None:
    controller = ControllerConfig(rate=0.5, final_rate=0.1)
    rates = [controller_rate(controller, step, 5) for step in range(5)]
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1], abs=1e-15)
    assert controller_rate(controller, 0, 1) == 0.5  # the only update of a run


# the load of the update before


def test_global_batch_share() -> None:
    wanted_LE, first_LE = counts([6, 2, 5, 3], [1, 1, 7, 7]), counts([4, 1, 3, 0], [0, 1, 0, 7])
    for counted, share_LE in (
        ("all", ((0.75, 0.25, 0.625, 0.375), (0.125, 0.125, 0.875, 0.875))),
        ("first", ((0.5, 0.125, 0.375, 0.0), (0.0, 0.125, 0.0, 0.875))),
    ):
        moe = moe_config(balance_scope="global_batch", balance_counts=counted, controller=None)
        assert first_state(moe, 2) == RoutingState()  # the first update counts for itself
        after = next_state(RoutingState(), moe, wanted_LE=wanted_LE, first_LE=first_LE, tokens=8, rate=0.0)
        assert after == RoutingState(bias_LE=None, share_LE=share_LE)
        # What was there before is replaced, not added to.
        again = next_state(after, moe, wanted_LE=wanted_LE, first_LE=first_LE, tokens=8, rate=0.0)
        assert again == after


# checkpoints and forward passes


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("controller", [None, {"target_ffn_experts": 0.9}])
def test_state_survives_json_bit_for_bit(controller: dict[str, float] | None, scope: str) -> None:
    moe = moe_config(controller=controller, balance_scope=scope)
    state = first_state(moe, 2)
    for update in range(1, 6):  # thirds and sevenths: numbers with no short decimal
        wanted_LE = counts([update, 2, 3, 7 - update], [1, 2 * update, 5, 2])
        state = next_state(state, moe, wanted_LE=wanted_LE, first_LE=wanted_LE, tokens=7, rate=1 / 3)
        assert restored_state(json.loads(json.dumps(state.facts())), moe, 2) == state


def test_a_checkpoint_without_routing_starts_as_a_new_run() -> None:
    moe = moe_config()
    for facts in (None, {"bias_LE": None, "share_LE": None}):
        assert restored_state(facts, moe, 2) == first_state(moe, 2)


def test_forward_passes_are_told_in_fp32() -> None:
    state = RoutingState(bias_LE=((0.1, 0.0),), share_LE=((1 / 3, 2.0),))
    told = state.inputs(seed=7, first_row=96, device=torch.device("cpu"))
    assert (told.seed, told.first_row) == (7, 96)
    assert told.bias_LE is not None and told.share_LE is not None
    assert torch.equal(told.bias_LE, torch.tensor([[0.1, 0.0]]))
    assert torch.equal(told.share_LE, torch.tensor([[1 / 3, 2.0]]))
    assert told.bias_LE.dtype == told.share_LE.dtype == torch.float32
    nothing = RoutingState().inputs(seed=0, first_row=0, device=torch.device("cpu"))
    assert nothing.bias_LE is None and nothing.share_LE is None


def test_a_state_of_another_model_is_refused() -> None:
    facts = {"bias_LE": [[0.0] * 4] * 2, "share_LE": None}
    assert restored_state(facts, moe_config(), 2).bias_LE == ((0.0,) * 4,) * 2
    for num_layers, moe in ((3, moe_config()), (2, moe_config(num_zero=2))):
        with pytest.raises(ValueError, match=r"bias_LE of the checkpoint has \[4, 4\] numbers by layer"):
            restored_state(facts, moe, num_layers)


def test_a_recipe_without_a_controller_leaves_its_biases() -> None:
    facts = {"bias_LE": [[0.5] * 4], "share_LE": [[1.0] * 4]}
    assert restored_state(facts, moe_config(controller=None), 1) == RoutingState()
