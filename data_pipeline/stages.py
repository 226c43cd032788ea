"""Mixtures one after another: which source a row of a whole run comes from.

Stages follow one another at given rows, each with a mixture and a table of its own; a source's rows go on through
them. A source that may give so many rows and no more ends the stream, or the stage: the row on which it would give
one too many is read off its table, and there a stage begins in which the others have its place, in their old
proportions. All of this is worked out when a run is opened, from the recipe and the limits alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from data_pipeline.config import FlatStage
from data_pipeline.mixture import Mixture


@dataclass(frozen=True)
class Stage:
    """A mixture and the rows it holds for."""

    mixture: Mixture
    start: int
    """First row."""
    stop: int | None
    """Row after its last; None is without end."""
    ended: tuple[str, ...] = ()
    """Sources that the recipe gives weight here and that have given all of their epochs before."""


class StagedMixture:
    """Mixtures one after another: what `Mixture` answers, for a whole run. Make one with `plan_stages`.

    Sources are those of all stages, indexed in the order of their sorted names.
    """

    def __init__(
        self, stages: Sequence[Stage], names: Sequence[str], *, limits: Mapping[str, int], ended_by: str | None
    ) -> None:
        self.stages = tuple(stages)
        self.names: list[str] = sorted(names)
        self.limits = dict(limits)
        """Most rows that a source may give, of those that have such a limit."""
        self.ended_by = ended_by
        """The source whose limit ends the stream, or None when it has no end."""
        self._start = np.array([stage.start for stage in stages], dtype=np.int64)
        self._number = [np.searchsorted(self.names, stage.mixture.names) for stage in stages]
        before = np.zeros(len(self.names), dtype=np.int64)
        self._before: list[np.ndarray] = []
        for stage, number in zip(stages, self._number):
            self._before.append(before.copy())
            if stage.stop is not None:
                before[number] += list(stage.mixture.drawn(stage.stop - stage.start).values())

    @property
    def rows_total(self) -> int | None:
        """Rows until a source's limit ends the stream; None is without end."""
        return self.stages[-1].stop

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source) of each row index below `rows_total`: two int64 arrays like `indices`."""
        wanted = np.asarray(indices, dtype=np.int64)
        stage = np.searchsorted(self._start, wanted, side="right") - 1
        source, row = np.empty_like(wanted), np.empty_like(wanted)
        for number in np.unique(stage).tolist():
            here = stage == number
            local, drawn = self.stages[number].mixture.locate(wanted[here] - self._start[number])
            source[here] = self._number[number][local]
            row[here] = drawn + self._before[number][source[here]]
        return source, row

    def drawn(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        number = max(int(np.searchsorted(self._start, rows, side="right")) - 1, 0)
        counts = self._before[number].copy()
        counts[self._number[number]] += list(
            self.stages[number].mixture.drawn(rows - int(self._start[number])).values()
        )
        return dict(zip(self.names, counts.tolist()))

    def describe(self) -> str:
        """The shares as they are drawn, stage after stage, in one line."""
        if len(self.stages) == 1 and self.rows_total is None:
            return self.stages[0].mixture.describe()
        return "; then ".join(
            stage.mixture.describe() + ("" if stage.stop is None else f" up to row {stage.stop:,}")
            for stage in self.stages
        )

    def order(self) -> dict[str, Any]:
        """Everything the answers depend on, by name, as JSON values (but for sampling and seed)."""
        if len(self.stages) == 1 and not self.limits:
            return {"mixture": self.stages[0].mixture.quotas}
        return {
            "stages": [[stage.start, stage.mixture.quotas] for stage in self.stages],
            "limits": self.limits,
            "rows_total": self.rows_total,
        }


def plan_stages(
    stages: Sequence[FlatStage],
    *,
    sampling: Literal["exact", "random"] = "exact",
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
    at_limit: Literal["stop", "reweight"] = "stop",
) -> StagedMixture:
    """Lay the stages of a recipe end to end, as far as the `limits` (most rows of a source, each >= 1) let them.

    With `stop` the stream ends before the first row that would be one too many. With `reweight` the source leaves
    the mixture there, and the stream ends only when all sources of a stage have left.
    """
    left = dict(limits or {})
    names = sorted({name for stage in stages for name in stage.mixture.weights})
    planned: list[Stage] = []

    def planned_so_far(ended_by: str | None) -> StagedMixture:
        return StagedMixture(planned, names, limits=limits or {}, ended_by=ended_by)

    start = 0
    for stage in stages:
        stop = None if stage.rows is None else start + stage.rows
        reached: str | None = None
        while stop is None or start < stop:
            present = [name for name in stage.mixture.weights if at_limit == "stop" or left.get(name) != 0]
            if not present:
                return planned_so_far(ended_by=reached or min(stage.mixture.weights))
            total = sum((stage.mixture.weights[name] for name in present), Fraction(0))
            weights = {name: stage.mixture.weights[name] / total for name in present}
            mixture = Mixture(weights, sampling=sampling, seed=seed, stage=len(planned))
            ends = {start + mixture.index_of(name, left[name]): name for name in mixture.names if name in left}
            end = min(ends, default=None)
            reached = None if end is None or stop is not None and end >= stop else ends[end]
            if reached is None:
                end = stop
            if end != start:
                ended = tuple(sorted(stage.mixture.weights.keys() - set(present)))
                planned.append(Stage(mixture, start, end, ended))
            if reached is not None and at_limit == "stop":
                return planned_so_far(ended_by=reached)
            if end is None:
                break
            for name, drawn in mixture.drawn(end - start).items():
                if name in left:
                    left[name] -= drawn
            start = end
    return planned_so_far(ended_by=None)
