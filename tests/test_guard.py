"""Which updates the guard lets through: by hand-computed losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moepp_ds.config import SafetyConfig
from moepp_ds.guard import Guard, Kind, Verdict, going_on, judge_gradients, judge_losses, restored_guard

SPIKES = SafetyConfig(spike_above=1.0, spike_window=8, on_spike="skip", max_skips=2)
EIGHT = (4.0, 3.0, 3.5, 2.5, 3.25, 2.75, 3.0, 3.0)
"""Their median is 3.0."""


def judge(guard: Guard, safety: SafetyConfig, lm_loss: float) -> Verdict:
    return judge_losses(guard, safety, loss=lm_loss + 0.5, lm_loss=lm_loss)


def test_good_losses_are_remembered_as_many_as_the_window_takes() -> None:
    safety = SafetyConfig(spike_window=8)
    guard = Guard()
    for number in range(10):
        verdict = judge(guard, safety, float(number))
        assert (verdict.action, verdict.kind, verdict.reason) == ("apply", None, "")
        guard = verdict.guard
    assert guard == Guard(losses=(2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0), skipped=0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad_even_if_the_language_models_is_finite(loss: float) -> None:
    before = Guard(EIGHT, skipped=1)
    stopped = judge_losses(before, SafetyConfig(), loss=loss, lm_loss=3.0)
    assert (stopped.action, stopped.kind, stopped.guard) == ("stop", "loss", before)
    assert stopped.reason == f"has a loss that is not finite ({loss})"
    skipped = judge_losses(before, SafetyConfig(non_finite="skip"), loss=loss, lm_loss=3.0)
    assert (skipped.action, skipped.kind, skipped.guard) == ("skip", "loss", Guard(EIGHT, skipped=2))


@pytest.mark.parametrize(("lm_loss", "bad"), [(4.0, False), (4.001, True), (-9.0, False)])
def test_a_spike_is_above_the_median_by_more_than_the_recipe_allows(lm_loss: float, bad: bool) -> None:
    verdict = judge(Guard(EIGHT), SPIKES, lm_loss)
    if not bad:
        assert (verdict.action, verdict.bound) == ("apply", math.inf)
        assert verdict.guard.losses == (*EIGHT[1:], lm_loss)
        return
    assert (verdict.action, verdict.kind, verdict.bound) == ("skip", "spike", 4.0)
    assert verdict.guard == Guard(EIGHT, skipped=1)  # the spike itself is not remembered
    assert verdict.reason == (
        "has a language-model loss of 4.001, 1.001 above 3, the median of the 8 updates before it: a spike "
        "(safety.spike_above 1)"
    )


def test_no_loss_is_a_spike_before_the_window_is_full_or_where_none_is_looked_for() -> None:
    assert judge(Guard(EIGHT[:7]), SPIKES, 100.0).action == "apply"
    assert judge(Guard(EIGHT), SafetyConfig(spike_window=8), 100.0).action == "apply"


def test_a_window_made_smaller_counts_the_newest_and_one_made_larger_waits() -> None:
    low = Guard((9.0,) * 8 + EIGHT)
    assert judge(low, SPIKES, 4.5).kind == "spike"
    assert len(judge(low, SPIKES, 3.0).guard.losses) == 8
    assert judge(low, SPIKES.model_copy(update={"spike_window": 17}), 100.0).action == "apply"


def test_the_update_after_the_last_that_may_be_skipped_stops_the_run() -> None:
    guard, actions = Guard(EIGHT), []
    for _ in range(3):
        verdict = judge(guard, SPIKES, 9.0)
        actions.append(verdict.action)
        guard = verdict.guard
    assert actions == ["skip", "skip", "stop"]
    assert guard == Guard(EIGHT, skipped=2)
    assert verdict.reason.endswith("; safety.on_spike would skip it, but 2 were skipped already (safety.max_skips)")
    # skips of all kinds count together
    third = judge_gradients(guard, SPIKES.model_copy(update={"non_finite": "skip"}))
    assert third.action == "stop" and "safety.non_finite would skip it, but 2 were" in third.reason


RUN = Path("runs/a")
BACK = (
    "; if it is the run that went wrong, and not the data, go back: --resume PATH of a checkpoint before "
    "(moepp checkpoint list runs/a)"
)


@pytest.mark.parametrize(
    ("kind", "skipped", "settings", "advice"),
    [
        ("loss", 0, {}, "--set safety.non_finite=skip"),
        ("gradient", 0, {"on_spike": "skip"}, "--set safety.non_finite=skip"),
        ("spike", 0, {"non_finite": "skip"}, "--set safety.on_spike=skip"),
        ("spike", 1, {"max_skips": 2}, f"--set safety.on_spike=skip{BACK}"),
        ("spike", 2, {"on_spike": "skip", "max_skips": 2}, f"--set safety.max_skips=3 or more (now 2, all used){BACK}"),
        (
            *("loss", 2, {"max_skips": 1}),
            f"--set safety.non_finite=skip and --set safety.max_skips=3 or more (now 1, all used){BACK}",
        ),
    ],
)
def test_what_is_advised_is_what_helps(kind: Kind, skipped: int, settings: dict[str, Any], advice: str) -> None:
    said = going_on(kind, Guard(EIGHT, skipped), SafetyConfig(**settings), RUN)
    assert said == f"; to go on past it: --resume auto with {advice}"


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_gradients_follow_what_is_said_of_numbers_that_are_not_finite(action: str) -> None:
    verdict = judge_gradients(Guard(EIGHT), SafetyConfig(non_finite=action))
    assert (verdict.action, verdict.kind) == (action, "gradient")
    assert verdict.guard == Guard(EIGHT, skipped=int(action == "skip"))


def test_a_checkpoint_keeps_every_digit() -> None:
    guard = Guard((0.1, 1 / 3, 5e-324, 1.7976931348623157e308), skipped=3)
    assert restored_guard(json.loads(json.dumps(guard.facts()))) == guard
    assert restored_guard(None) == Guard()
