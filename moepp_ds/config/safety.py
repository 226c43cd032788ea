"""The section `safety`: what a run looks out for, and what it does about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_ds.config.section import Section


class SafetyConfig(Section):
    """What a run looks out for, and what it does about it.

    An update is bad when its loss or its gradients are not finite, or when its loss is a spike. Its rows are written
    to the run folder for `moepp replay`, and its gradients never reach the weights. `skip` then goes on with the next
    rows, `stop` saves and ends the run.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradients that are not finite (where fp16 adjusts its loss scale that is no fault)."""

    spike_above: float | None = Field(default=None, gt=0.0)
    """A language-model loss this far above the median of the last `spike_window` updates is a spike; null looks for
    none. Nats."""

    spike_window: int = Field(default=128, ge=8)
    """Updates whose losses are remembered; before there are so many, no loss is a spike. Updates."""

    on_spike: Literal["stop", "skip"] = "stop"
    """What to do about a spike."""

    max_skips: int = Field(default=10, ge=1)
    """Updates that may be skipped in the whole run; the next bad one stops it. Updates."""

    check_every: int | None = Field(default=None, ge=1)
    """Updates between comparisons of what must be equal on all ranks; the first update of every start is always
    compared, null compares no other. Updates."""

    collective_timeout: int = Field(default=1800, ge=1)
    """How long ranks wait for one another before the job fails. A save or a long evaluation must fit. Seconds."""

    check_memory: bool = True
    """Whether a run whose weights, gradients and optimizer cannot fit the device is refused before it starts."""
