"""Weights of a mixture, as a recipe writes them and as exact shares.

A mixture is a nested mapping of weights; a leaf's weight is its share of all sampled tokens:

    redpajama: {book: 4.24, c4: 10.94}      ->   redpajama/book   0.0424...
    dolma: 61.28                            ->   dolma            0.6128...

Flattened, each key claims every raw file whose source label equals it or lies under it. Weights are exact
fractions from here on: `0.1` means one tenth and not the nearest binary number, so the quota table is the
same everywhere.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

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


SLOTS = 10_000
"""Rows of a block in which every source has a whole number of them."""
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


def nearest(name: str, known: Iterable[str]) -> str:
    """` (nearest: x)` for an error message, or an empty string when nothing in `known` resembles `name`."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def as_written(value: object) -> str:
    """A recipe's value as a recipe writes it: null, true and nested values in YAML's short form, which is JSON."""
    return json.dumps(value, default=repr, ensure_ascii=False)


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
    for key, weight in leaves(mixture, (), "mixture"):
        if key in raw:
            raise DataError(f"mixture gives a weight to {key!r} twice; keep one of them (data.mixture)")
        raw[key] = _weight(key, weight)
    if not raw:
        raise DataError("mixture is empty; name at least one source and its weight (data.mixture)")
    refuse_overlap(list(raw))
    total = sum(raw.values(), Fraction(0))
    weights = {key: weight / total for key, weight in raw.items()}
    notice = (
        "" if total in (1, 100) else f"mixture weights sum to {float(total):.12g}; they were scaled to sum to 1"
    )
    return FlatMixture(weights=weights, notice=notice)


def slot_quotas(weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Slots of each source, sum 10,000, by largest remainder; of equal ones the name that sorts first wins.

    `weights` sum to one. Raises DataError for a source that would be left without a slot.
    """
    exact = {name: weight * SLOTS for name, weight in weights.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: SLOTS - sum(quotas.values())]:
        quotas[name] += 1
    for name, quota in quotas.items():
        if quota == 0:
            raise DataError(
                f"mixture weight of {name!r} is {float(weights[name]):.3g} of the total, which rounds to no"
                f" slot of {SLOTS:,}; the smallest weight is {1 / SLOTS:g}: raise it or leave the source out"
                " (data.mixture)"
            )
    return quotas


def leaves(node: Mapping[str, Any], above: tuple[str, ...], what: str) -> Iterator[tuple[str, Any]]:
    """(flat key, value) of everything in a nested mapping; `what` names it in messages."""
    if len(above) > DEEPEST_KEY:
        start = "/".join(above[:3])
        raise DataError(f"{what} is nested deeper than {DEEPEST_KEY} levels at {start}... (data.{what})")
    for name, value in node.items():
        if not isinstance(name, str) or not name.strip("/") or "" in name.split("/"):
            raise DataError(
                f"{what} key {name!r} under {'/'.join(above) or 'the top'} is no source name (data.{what})"
            )
        path = above + (name,)
        if isinstance(value, Mapping):
            if not value:
                raise DataError(f"{what} has no weights under {'/'.join(path)!r} (data.{what})")
            yield from leaves(value, path, what)
        else:
            yield "/".join(path), value


def _weight(key: str, value: object) -> Fraction:
    number = isinstance(value, (int, Fraction)) or isinstance(value, float) and math.isfinite(value)
    if isinstance(value, bool) or not number:
        raise DataError(f"mixture weight of {key!r} is {as_written(value)}, which is no finite number (data.mixture)")
    assert isinstance(value, (int, float, Fraction))
    if value > LARGEST_WEIGHT:
        raise DataError(f"mixture weight of {key!r} is over {LARGEST_WEIGHT:g}; use shares (data.mixture)")
    if value <= 0:
        raise DataError(
            f"mixture weight of {key!r} is {value!r}; weights are positive, leave a source out to get none of"
            " it (data.mixture)"
        )
    return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)


def refuse_overlap(keys: Sequence[str]) -> None:
    """DataError when one key lies under another: both would claim the same files."""
    for key in keys:
        for other in keys:
            if key.startswith(other + "/"):
                raise DataError(
                    f"mixture names both {other!r} and {key!r}, which lies under it, so both claim the same"
                    f" files; weigh either {other!r} as a whole or its parts (data.mixture)"
                )
