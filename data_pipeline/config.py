"""What a run asks of its data: where the shards are, and the mixture of sources it draws from.

A mixture is a nested mapping of weights; a leaf's weight is its share of all sampled tokens:

    redpajama: {book: 4.24, c4: 10.94}      ->   redpajama/book   0.0424...
    dolma: 61.28                            ->   dolma            0.6128...

Flattened, each key claims every raw file whose source label equals it or lies under it. Weights are exact
fractions from here on: `0.1` means one tenth and not the nearest binary number, so the quota table is the
same everywhere.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_pipeline.document import DataError

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "strategy_1": {
        "redpajama": {"book": 4.24, "wikipedia": 3.50, "arxiv": 4.37, "stackexchange": 3.19, "c4": 10.94},
        "dolma": 61.28,
        "pile": 12.48,
    },
    "strategy_2": {
        "redpajama": {"book": 13.93, "wikipedia": 9.03, "arxiv": 11.36, "stackexchange": 9.77, "c4": 7.42},
        "dolma": 41.53,
        "pile": 6.96,
    },
}
"""The mixtures of the MoE++ paper, strategies 1 and 2, in per cent of sampled tokens; each sums to 100."""


LARGEST_WEIGHT = 1e18
"""Enough for token counts as weights, and far from what a float cannot hold."""
DEEPEST_KEY = 16
"""Levels of nesting; only a mapping that contains itself (a YAML alias can) has more."""


@dataclass(frozen=True)
class FlatMixture:
    """A mixture as exact shares."""

    weights: Mapping[str, Fraction]
    """Share of sampled tokens by flat key such as `redpajama/book`; positive, sums to exactly 1."""
    notice: str
    """Says that the weights were scaled to sum to one; empty when they did sum to 1 or to 100 per cent."""


def nearest(name: str, known: list[str]) -> str:
    """` (nearest: x)` for an error message, or an empty string when nothing in `known` resembles `name`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def flatten_mixture(mixture: str | Mapping[str, Any]) -> FlatMixture:
    """Flatten a preset's name or a nested mapping of weights into exact shares that sum to one.

    Raises DataError for an unknown preset, no weights, a weight that is not a positive finite number, a key
    given twice, and a key that lies under another one (both would claim the same files).
    """
    if isinstance(mixture, str):
        if mixture not in PRESETS:
            hint = nearest(mixture, list(PRESETS))
            raise DataError(
                f"unknown mixture {mixture!r}{hint}; presets are {', '.join(PRESETS)}, "
                "or give a mapping of sources to weights (data.mixture)"
            )
        mixture = PRESETS[mixture]
    raw: dict[str, Fraction] = {}
    for key, weight in _leaves(mixture, ()):
        if key in raw:
            raise DataError(f"mixture gives a weight to {key!r} twice; keep one of them (data.mixture)")
        raw[key] = weight
    if not raw:
        raise DataError("mixture is empty; name at least one source and its weight (data.mixture)")
    _refuse_overlap(list(raw))
    total = sum(raw.values(), Fraction(0))
    weights = {key: weight / total for key, weight in raw.items()}
    notice = (
        "" if total in (1, 100) else f"mixture weights sum to {float(total):g}; they were scaled to sum to 1"
    )
    return FlatMixture(weights=weights, notice=notice)


def _leaves(node: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Fraction]]:
    if len(above) > DEEPEST_KEY:
        start = "/".join(above[:3])
        raise DataError(f"mixture is nested deeper than {DEEPEST_KEY} levels at {start}... (data.mixture)")
    for name, value in node.items():
        if not isinstance(name, str) or not name.strip("/") or "" in name.split("/"):
            raise DataError(
                f"mixture key {name!r} under {'/'.join(above) or 'the top'} is no source name (data.mixture)"
            )
        path = above + (name,)
        if isinstance(value, Mapping):
            if not value:
                raise DataError(f"mixture has no weights under {'/'.join(path)!r} (data.mixture)")
            yield from _leaves(value, path)
        else:
            yield "/".join(path), _weight("/".join(path), value)


def _weight(key: str, value: object) -> Fraction:
    number = isinstance(value, (int, Fraction)) or isinstance(value, float) and math.isfinite(value)
    if isinstance(value, bool) or not number:
        raise DataError(f"mixture weight of {key!r} is {value!r}, which is no finite number (data.mixture)")
    assert isinstance(value, (int, float, Fraction))
    if value > LARGEST_WEIGHT:
        raise DataError(f"mixture weight of {key!r} is over {LARGEST_WEIGHT:g}; use shares (data.mixture)")
    if value <= 0:
        raise DataError(
            f"mixture weight of {key!r} is {value!r}; weights are positive, leave a source out to get none of"
            " it (data.mixture)"
        )
    return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)


def _refuse_overlap(keys: list[str]) -> None:
    for key in keys:
        for other in keys:
            if key.startswith(other + "/"):
                raise DataError(
                    f"mixture names both {other!r} and {key!r}, which lies under it, so both claim the same"
                    f" files; weigh either {other!r} as a whole or its parts (data.mixture)"
                )


class DataConfig(BaseModel):
    """The `data` section of a recipe: everything the order of training rows depends on, beside the shards."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    """Folder of the shard set that `moepp-data build` wrote."""
    mixture: str | dict[str, Any] = "strategy_1"
    """Name of a preset, or nested weights by source, in shares of sampled tokens."""
    seq_len: int = Field(default=2048, ge=1)
    """Targets per row; a row holds seq_len + 1 tokens."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys the order of files and of rows; the shards do not depend on it."""
    shuffle_window: int = Field(default=16384, ge=1, le=2**20)
    """Rows of one source that are permuted among themselves."""
    interleave: int = Field(default=64, ge=1)
    """Files of one source that are read side by side, part by part."""
    sampling: Literal["exact", "random"] = "exact"
    """`exact`: every prefix within a row of its shares. `random`: the same slots permuted per 10,000 rows."""

    @field_validator("mixture", mode="before")
    @classmethod
    def _mixture_is_sound(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict)):
            raise DataError(f"mixture is {value!r}; name a preset ({', '.join(PRESETS)}) or give weights by source")
        flatten_mixture(value)
        return value
