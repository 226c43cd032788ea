"""Which updates are let through, from their losses alone: the same wherever the run stops and goes on.

1. A loss that is not finite is bad.
2. So is a spike: a language-model loss more than `safety.spike_above` over the median of the last
   `safety.spike_window` updates that were let through.
3. So are gradients that are not finite; only DeepSpeed's step can tell, and does not take them.
4. What is bad is skipped or stops the run, as the recipe says; after `safety.max_skips` it stops the run in any case.

Nothing here knows the time or the ranks. What is remembered is the same on every rank, and part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from moepp_ds.config import SafetyConfig

Kind = Literal["loss", "spike", "gradient"]


@dataclass(frozen=True)
class Guard:
    """What is remembered of the updates so far.

    losses: language-model losses of the last updates that were let through, the newest last, in nats.
    skipped: updates that were not, in the whole run.
    """

    losses: tuple[float, ...] = ()
    skipped: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON, for a checkpoint; every number survives."""
        return {"losses": list(self.losses), "skipped": self.skipped}


@dataclass(frozen=True)
class Verdict:
    """What becomes of an update.

    kind: what is bad: None for an update that is let through. reason: in words that go on from "update 7 ".
    bound: a micro batch whose language-model loss is above has a share in a spike; infinite for what is no spike.
    guard: that of the next update.
    """

    action: Literal["apply", "skip", "stop"]
    guard: Guard
    kind: Kind | None = None
    reason: str = ""
    bound: float = math.inf


def restored_guard(facts: Mapping[str, Any] | None) -> Guard:
    """The guard that a checkpoint holds; one without memory where it holds none."""
    if facts is None:
        return Guard()
    return Guard(losses=tuple(map(float, facts["losses"])), skipped=int(facts["skipped"]))


def judge_losses(guard: Guard, safety: SafetyConfig, *, loss: float, lm_loss: float) -> Verdict:
    """Before the step. loss: all that is trained on, lm_loss: of the language model alone; means over all ranks."""
    if not math.isfinite(loss):
        return _refuse(guard, safety, "loss", f"has a loss that is not finite ({loss})")
    window = guard.losses[-safety.spike_window :]
    if safety.spike_above is not None and len(window) == safety.spike_window:
        usual = median(window)
        if lm_loss > usual + safety.spike_above:
            reason = (
                f"has a language-model loss of {lm_loss:.4g}, {lm_loss - usual:.4g} above {usual:.4g}, the median of "
                f"the {len(window)} updates before it: a spike (safety.spike_above {safety.spike_above:g})"
            )
            return _refuse(guard, safety, "spike", reason, bound=usual + safety.spike_above)
    return Verdict("apply", replace(guard, losses=(*guard.losses, lm_loss)[-safety.spike_window :]))


def judge_gradients(guard: Guard, safety: SafetyConfig) -> Verdict:
    """After a step that DeepSpeed did not take, of an update whose losses were let through. guard: that before it."""
    return _refuse(guard, safety, "gradient", "has gradients that are not finite although every loss is")


def _refuse(
    guard: Guard, safety: SafetyConfig, kind: Kind, reason: str, *, bound: float = math.inf
) -> Verdict:
    asked, key = _asked(kind, safety)
    if asked == "stop":
        return Verdict("stop", guard, kind, reason, bound)
    if guard.skipped >= safety.max_skips:
        over = f"; safety.{key} would skip it, but {guard.skipped} were skipped already (safety.max_skips)"
        return Verdict("stop", guard, kind, reason + over, bound)
    return Verdict("skip", replace(guard, skipped=guard.skipped + 1), kind, reason, bound)


def _asked(kind: Kind, safety: SafetyConfig) -> tuple[Literal["stop", "skip"], str]:
    """What the recipe says of a kind of bad update, and in which key of `safety`."""
    return (safety.on_spike, "on_spike") if kind == "spike" else (safety.non_finite, "non_finite")


def going_on(kind: Kind, guard: Guard, safety: SafetyConfig, run_dir: Path) -> str:
    """How a run goes on that stopped at a bad update, in words for its end. guard: that before the update."""
    asked, key = _asked(kind, safety)
    settings = [] if asked == "skip" else [f"safety.{key}=skip"]
    if guard.skipped >= safety.max_skips:
        settings.append(f"safety.max_skips={guard.skipped + 1} or more (now {safety.max_skips}, all used)")
    back = ""
    if guard.skipped:
        back = (
            "; if it is the run that went wrong, and not the data, go back: --resume PATH of a checkpoint before "
            f"(moepp checkpoint list {run_dir})"
        )
    return f"; to go on past it: --resume auto with {' and '.join(f'--set {one}' for one in settings)}{back}"
