"""Weights: presets, flattening, and every way a mixture can be wrong."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest

from data_pipeline.document import DataError
from data_pipeline.weights import PRESETS, flatten_mixture


def test_presets_are_the_paper_s_shares() -> None:
    first, second = flatten_mixture("strategy_1"), flatten_mixture("strategy_2")
    assert first.weights == {
        "redpajama/book": Fraction(424, 10000),
        "redpajama/wikipedia": Fraction(350, 10000),
        "redpajama/arxiv": Fraction(437, 10000),
        "redpajama/stackexchange": Fraction(319, 10000),
        "redpajama/c4": Fraction(1094, 10000),
        "dolma": Fraction(6128, 10000),
        "pile": Fraction(1248, 10000),
    }
    assert list(second.weights.values()) == [
        Fraction(n, 10000) for n in (1393, 903, 1136, 977, 742, 4153, 696)
    ]
    for flat in (first, second):
        assert sum(flat.weights.values()) == 1
        assert flat.notice == ""
    assert set(PRESETS) == {"strategy_1", "strategy_2"}


def test_nested_and_flat_keys_mean_the_same() -> None:
    nested = flatten_mixture({"redpajama": {"book": 0.25, "common_crawl": {"2023-06": 0.25}}, "pile": 0.5})
    flat = flatten_mixture({"redpajama/book": 0.25, "redpajama/common_crawl/2023-06": 0.25, "pile": 0.5})
    assert nested == flat
    assert nested.weights["redpajama/common_crawl/2023-06"] == Fraction(1, 4)


def test_decimal_weights_are_exact() -> None:
    assert flatten_mixture({"a": 0.1, "b": 0.2, "c": 0.7}).weights["a"] == Fraction(1, 10)
    assert flatten_mixture({"a": 1e-3, "b": 0.999}).notice == ""


def test_other_sums_are_scaled_with_a_notice() -> None:
    flat = flatten_mixture({"a": 1, "b": 3})
    assert flat.weights == {"a": Fraction(1, 4), "b": Fraction(3, 4)}
    assert flat.notice == "mixture weights sum to 4; they were scaled to sum to 1"
    assert flatten_mixture({"a": 1, "b": 1e-6}).notice.startswith("mixture weights sum to 1.000001;")


SELF_REFERENCE: dict[str, Any] = {}
SELF_REFERENCE["x"] = SELF_REFERENCE  # what the YAML `&a {x: *a}` makes


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            "strategy1",
            "unknown mixture 'strategy1' (nearest: 'strategy_1'); presets are strategy_1, strategy_2",
        ),
        ("zzz", "unknown mixture 'zzz'; presets are strategy_1, strategy_2, or give a mapping"),
        ({}, "mixture is empty; name at least one source and its weight"),
        ({"a": {}}, "mixture has no weights under 'a'"),
        ({"a": -1}, "mixture weight of 'a' is -1; weights are positive"),
        ({"a": 0}, "mixture weight of 'a' is 0; weights are positive, leave a source out to get none of it"),
        ({"a": "0.5"}, "mixture weight of 'a' is \"0.5\", which is no finite number"),
        ({"a": True}, "mixture weight of 'a' is true, which is no finite number"),
        ({"a": None}, "mixture weight of 'a' is null, which is no finite number"),
        ({"a": {"b": float("nan")}}, "mixture weight of 'a/b' is NaN, which is no finite number"),
        ({"a": float("inf")}, "mixture weight of 'a' is Infinity, which is no finite number"),
        ({"a": {"b": 1}, "a/b": 1}, "mixture gives a weight to 'a/b' twice"),
        ({"dolma": 1, "dolma/wiki": 1}, "mixture names both 'dolma' and 'dolma/wiki', which lies under it"),
        ({"": 1}, "mixture key '' under the top is no source name"),
        ({"a": {"/b": 1}}, "mixture key '/b' under a is no source name"),
        ({1: 1}, "mixture key 1 under the top is no source name"),
        ({"a": 10**400, "b": 1}, "mixture weight of 'a' is over 1e+18; use shares"),
        (SELF_REFERENCE, "mixture is nested deeper than 16 levels at x/x/x..."),
    ],
)
def test_bad_mixtures_are_refused(mixture: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        flatten_mixture(mixture)
