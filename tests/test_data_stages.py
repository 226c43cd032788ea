"""Stages: boundaries to the row, limits that end a stream or reweight it, O(1) location against counting."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from data_pipeline.config import FlatStage
from data_pipeline.mixture import Mixture
from data_pipeline.stages import plan_stages
from data_pipeline.weights import flatten_mixture


def stages(*given: tuple[dict[str, float], int | None]) -> list[FlatStage]:
    return [FlatStage(flatten_mixture(weights), rows) for weights, rows in given]


TWO_STAGES = stages(({"a": 1, "b": 3}, 12_345), ({"a": 1, "c": 1}, None))


@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_stages_switch_exactly_at_the_row_and_sources_go_on_through_them(sampling: str) -> None:
    staged = plan_stages(TWO_STAGES, sampling=sampling, seed=5)
    assert staged.names == ["a", "b", "c"] and staged.rows_total is None
    source, row = staged.locate(np.arange(30_000))
    before, after = (Mixture(s.mixture.weights, sampling=sampling, seed=5, stage=i) for i, s in enumerate(TWO_STAGES))
    assert np.array_equal(source[:12_345], before.locate(np.arange(12_345))[0])
    assert np.array_equal(source[12_345:], np.array([0, 2])[after.locate(np.arange(17_655))[0]])
    for number in range(3):
        assert np.array_equal(row[source == number], np.arange((source == number).sum()))
    counts = np.cumsum(source[:, None] == np.arange(3), axis=0)
    for rows in (0, 1, 9_999, 12_344, 12_345, 12_346, 30_000):
        assert list(staged.drawn(rows).values()) == (counts[rows - 1].tolist() if rows else [0, 0, 0])


def test_stages_are_a_function_of_the_index() -> None:
    staged = plan_stages(TWO_STAGES)
    together = staged.locate(np.arange(25_000))
    for index in (24_999, 0, 12_344, 12_345, 7):
        assert [part[0] for part in staged.locate(np.array([index]))] == [part[index] for part in together]
    source, row = staged.locate(np.array([10**12]))
    first = staged.drawn(12_345)
    assert row[0] + 1 == staged.drawn(10**12 + 1)[staged.names[source[0]]]
    assert staged.drawn(10**12)["b"] == first["b"]


def test_one_stage_without_limits_is_the_mixture() -> None:
    plain, staged = Mixture(flatten_mixture("strategy_2").weights), plan_stages(stages((dict(WEIGHTS), None)))
    assert all(np.array_equal(*both) for both in zip(plain.locate(np.arange(9)), staged.locate(np.arange(9))))
    assert staged.describe() == plain.describe() and staged.order() == {"mixture": plain.quotas}


WEIGHTS = {name: float(100 * weight) for name, weight in flatten_mixture("strategy_2").weights.items()}


@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_a_limit_ends_the_stream_before_the_first_row_too_many(sampling: str) -> None:
    # Without the limit, row 4,000 of b is the 4,001st: the stream must end just before it, b having given 4,000.
    free = Mixture(flatten_mixture({"a": 1, "b": 3}).weights, sampling=sampling, seed=1)
    staged = plan_stages(stages(({"a": 1, "b": 3}, None)), sampling=sampling, seed=1, limits={"b": 4_000})
    assert staged.rows_total == free.index_of("b", 4_000) and staged.ended_by == "b"
    assert staged.drawn(staged.rows_total)["b"] == 4_000
    rows = np.arange(staged.rows_total)
    assert all(np.array_equal(*both) for both in zip(free.locate(rows), staged.locate(rows)))


@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_a_limit_reweights_from_exactly_that_row_on(sampling: str) -> None:
    limits = {"b": 4_000, "c": 3_000}
    given = stages(({"a": 1, "b": 3, "c": 2, "d": 2}, None))
    staged = plan_stages(given, sampling=sampling, seed=1, limits=limits, at_limit="reweight")
    assert [list(stage.mixture.quotas) for stage in staged.stages] == [list("abcd"), list("acd"), list("ad")]
    assert [stage.ended for stage in staged.stages] == [(), ("b",), ("b", "c")]
    assert list(staged.stages[1].mixture.quotas.values()) == [2000, 4000, 4000]  # 1 : 2 : 2, as before
    assert list(staged.stages[2].mixture.quotas.values()) == [3333, 6667]
    source, row = staged.locate(np.arange(40_000))
    for number, name in enumerate(staged.names):
        mine = np.flatnonzero(source == number)
        assert np.array_equal(row[mine], np.arange(len(mine)))
        if name in limits:
            assert len(mine) == limits[name] == staged.drawn(40_000)[name]
            stage = "bc".index(name) + 1
            assert mine[-1] < staged.stages[stage].start, "its last row comes before the stage that is without it"
            # and the row at which that stage begins would have been one too many
            would_be, _ = staged.stages[stage - 1].mixture.locate(
                np.array([staged.stages[stage].start - staged.stages[stage - 1].start])
            )
            assert staged.stages[stage - 1].mixture.names[would_be[0]] == name


def test_limits_and_stages_together() -> None:
    # Stage 1 draws a and b by halves for 100 rows; b has 60. Stage 2 draws b alone: after 10 rows it has given 60.
    given = stages(({"a": 1, "b": 1}, 100), ({"b": 1}, 30), ({"c": 1}, None))
    stopped = plan_stages(given, limits={"b": 60})
    assert (stopped.rows_total, stopped.ended_by) == (110, "b")
    # b has given just its 50 when stage 2 begins with it: nothing is left for stage 2, whose sources are all spent.
    for at_limit in ("stop", "reweight"):
        spent = plan_stages(given, limits={"b": 50}, at_limit=at_limit)
        assert (spent.rows_total, spent.drawn(100)) == (100, {"a": 50, "b": 50, "c": 0})
    # With 40, reweighting lets a fill stage 1 alone from row 81 on, where the 41st of b would be.
    early = plan_stages(given[:1] + given[2:], limits={"b": 40}, at_limit="reweight")
    assert [(stage.start, stage.stop) for stage in early.stages] == [(0, 81), (81, 100), (100, None)]
    assert early.drawn(130) == {"a": 60, "b": 40, "c": 30}
    assert early.describe() == (
        "a 50.00%, b 50.00% up to row 81; then a 100.00% up to row 100; then c 100.00%"
    )
    assert early.order()["limits"] == {"b": 40}


def test_the_source_that_ended_the_stream_is_named() -> None:
    # b has given its 2 rows when stage 1 ends; stage 2 is without b, and stage 3 has nothing but b.
    given = stages(({"a": 1, "b": 1}, 4), ({"c": 1}, 5), ({"b": 1}, None))
    for at_limit in ("stop", "reweight"):
        ended = plan_stages(given, limits={"b": 2}, at_limit=at_limit)
        assert (ended.rows_total, ended.ended_by) == (9, "b")
    # Where the sources of a stage leave it one after another, it is the last of them.
    both = plan_stages(stages(({"a": 1, "b": 3}, None)), limits={"a": 5, "b": 6}, at_limit="reweight")
    assert (both.rows_total, both.ended_by) == (11, "a")


def count_row_by_row(
    given: list[FlatStage], limits: dict[str, int], at_limit: str, sampling: str, rows: int
) -> tuple[list[tuple[str, int]], bool]:
    """(source, its row) of the first `rows` rows, by asking at each row whether its source has one left; ended?"""
    done: list[tuple[str, int]] = []
    drawn: Counter[str] = Counter()
    tables, end = 0, 0
    for stage in given:
        end = rows if stage.rows is None else end + stage.rows
        while len(done) < min(end, rows):
            open_to = {
                name: weight
                for name, weight in stage.mixture.weights.items()
                if at_limit == "stop" or drawn[name] != limits.get(name)
            }
            if not open_to:
                return done, True
            weights = {name: weight / sum(open_to.values()) for name, weight in open_to.items()}
            mixture = Mixture(weights, sampling=sampling, seed=2, stage=tables)
            before = len(done)
            for number in mixture.locate(np.arange(rows))[0].tolist():
                name = mixture.names[number]
                if len(done) == min(end, rows) or drawn[name] == limits.get(name):
                    break
                done.append((name, drawn[name]))
                drawn[name] += 1
            tables += len(done) > before
            if len(done) < min(end, rows) and at_limit == "stop":
                return done, True
    return done, False


@pytest.mark.parametrize("at_limit", ["stop", "reweight"])
@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_any_stages_with_any_limits_are_what_counting_gives(sampling: str, at_limit: str) -> None:
    """Sources absent from a stage and back in the next, limits at borders, several at the same row, one-row limits."""
    chance = random.Random(f"{sampling} {at_limit}")
    for _ in range(12):
        given = []
        for number in range(chance.randint(1, 4)):
            names = chance.sample("abcd", chance.randint(1, 4))
            given.append(({name: chance.randint(1, 9) for name in names}, chance.choice([1, 2, 5, 10, 37, 100])))
        given[-1] = (given[-1][0], None)
        flat = stages(*given)
        used = {name for stage in flat for name in stage.mixture.weights}
        limits = {name: chance.choice([1, 2, 3, 5, 10, 50]) for name in sorted(used) if chance.random() < 0.6}
        expected, ended = count_row_by_row(flat, limits, at_limit, sampling, 300)
        staged = plan_stages(flat, sampling=sampling, seed=2, limits=limits, at_limit=at_limit)
        source, row = staged.locate(np.arange(len(expected)))
        assert [(staged.names[s], r) for s, r in zip(source.tolist(), row.tolist())] == expected
        if ended:
            assert staged.rows_total == len(expected)
            assert staged.drawn(len(expected))[staged.ended_by] == limits[staged.ended_by]
        else:
            assert staged.rows_total is None or staged.rows_total >= 300
