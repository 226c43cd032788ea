"""Mixture: quotas by hand, Tijdeman's bound at every prefix, O(1) location against counting."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import numpy as np
import pytest

from data_pipeline.document import DataError
from data_pipeline.mixture import SLOTS, Mixture, chairman_sequence, claim_labels, slot_quotas
from data_pipeline.weights import flatten_mixture


def assert_within_bound(sequence: list[int], quotas: list[int]) -> None:
    """|count_i - q_i n / N| <= 1 - 1 / (2k - 2) at every prefix n, in integers."""
    total, sources = sum(quotas), len(quotas)
    counts = [0] * sources
    for n, chosen in enumerate(sequence, start=1):
        counts[chosen] += 1
        worst = max(abs(counts[i] * total - quotas[i] * n) for i in range(sources))
        assert worst < total
        assert sources == 1 or worst * (2 * sources - 2) <= total * (2 * sources - 3)
    assert counts == quotas


def test_sequence_by_hand() -> None:
    # Two sources, so one may take a slot once its deficit is 1/2. Shares 1/2 and 1/2 of 4. Slot 1: both have
    # deficit 1/2, the first wins. Slot 2: deficits 0 and 1. And so on.
    assert chairman_sequence([2, 2]).tolist() == [0, 1, 0, 1]
    assert chairman_sequence([3]).tolist() == [0, 0, 0]
    # Shares 3/4 and 1/4 of 4. Slot 1: deficits 3/4, 1/4: only the first is eligible. Slot 2: 1/2, 1/2: both
    # are due now, the first wins the tie. Slot 3: 1/4, 3/4. Slot 4: 1, 0.
    assert chairman_sequence([3, 1]).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("preset", ["strategy_1", "strategy_2"])
def test_presets_are_integer_quotas_and_within_one_row_everywhere(preset: str) -> None:
    mixture = Mixture(flatten_mixture(preset).weights)
    assert all(Fraction(quota, SLOTS) == mixture.weights[name] for name, quota in mixture.quotas.items())
    source, _ = mixture.locate(np.arange(SLOTS))
    assert_within_bound(source.tolist(), list(mixture.quotas.values()))
    assert max(mixture.largest_deviation(3 * SLOTS + 17).values()) < 1


def test_random_quotas_are_within_one_row_everywhere() -> None:
    rng = random.Random(0)
    for _ in range(80):
        sources = rng.randint(1, 14)
        cuts = sorted(rng.sample(range(1, 400), sources - 1))
        quotas = [high - low for low, high in zip([0, *cuts], [*cuts, 400])]
        assert_within_bound(chairman_sequence(quotas).tolist(), quotas)


def test_random_weights_of_the_full_table() -> None:
    rng = random.Random(1)
    for sources in (2, 5, 23, 60):
        parts = [rng.randint(20, 1000) for _ in range(sources)]
        weights = {f"s{i:02d}": Fraction(part, sum(parts)) for i, part in enumerate(parts)}
        mixture = Mixture(weights)
        source, _ = mixture.locate(np.arange(SLOTS))
        quotas = np.array(list(mixture.quotas.values()))
        counts = np.cumsum(source[:, None] == np.arange(sources), axis=0)
        deviation = np.abs(counts * SLOTS - quotas * np.arange(1, SLOTS + 1)[:, None])
        assert deviation.max() < SLOTS
        assert counts[-1].tolist() == quotas.tolist()


def test_largest_remainder_by_hand() -> None:
    # Thirds of 10,000 are 3,333 and a third each: one slot is left, and of equal remainders "a" sorts first.
    third = Fraction(1, 3)
    assert slot_quotas({"c": third, "a": third, "b": third}) == {"c": 3333, "a": 3334, "b": 3333}
    # 0.00014 and 0.99986: 1.4 and 9,998.6 slots; the larger remainder is the second's.
    assert slot_quotas({"a": Fraction(14, 10**5), "b": 1 - Fraction(14, 10**5)}) == {"a": 1, "b": 9999}


def test_a_weight_too_small_for_a_slot_is_refused() -> None:
    weights = {"dolma": Fraction(99999, 100000), "pile": Fraction(1, 100000)}
    message = (
        "mixture weight of 'pile' is 1e-05 of the total, which rounds to no slot of 10,000; the smallest"
        " weight is 0.0001: raise it or leave the source out (data.mixture)"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        slot_quotas(weights)


@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_locate_counts_each_source_s_rows_without_a_gap(sampling: str) -> None:
    mixture = Mixture(flatten_mixture({"a": 0.5, "b": 0.3, "c": 0.2}).weights, sampling=sampling, seed=3)
    source, row = mixture.locate(np.arange(2 * SLOTS + 123))
    for number in range(3):
        assert np.array_equal(row[source == number], np.arange((source == number).sum()))
    counts = np.bincount(source[: 2 * SLOTS])
    assert counts.tolist() == [10_000, 6_000, 4_000]
    assert mixture.drawn(2 * SLOTS + 123) == dict(zip("abc", np.bincount(source).tolist()))
    assert mixture.drawn(0) == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_locate_is_a_function_of_the_index(sampling: str) -> None:
    weights = flatten_mixture("strategy_2").weights
    together = Mixture(weights, sampling=sampling, seed=9).locate(np.arange(25_000))
    fresh = Mixture(weights, sampling=sampling, seed=9)
    for index in (24_999, 0, 10_000, 9_999, 12_345):
        source, row = fresh.locate(np.array([index]))
        assert (source[0], row[0]) == (together[0][index], together[1][index])
    source, row = fresh.locate(np.array([10**12]))
    assert row[0] >= 10**8 * fresh.quotas[fresh.names[source[0]]]


def test_random_sampling_depends_on_seed_and_block() -> None:
    weights = flatten_mixture("strategy_1").weights
    first, _ = Mixture(weights, sampling="random", seed=0).locate(np.arange(2 * SLOTS))
    other, _ = Mixture(weights, sampling="random", seed=1).locate(np.arange(2 * SLOTS))
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[:SLOTS], first[SLOTS:])


def test_the_order_of_keys_in_a_recipe_changes_nothing() -> None:
    one, two = Mixture(flatten_mixture({"a": 1, "b": 2}).weights), Mixture(
        flatten_mixture({"b": 2, "a": 1}).weights
    )
    assert one.names == two.names == ["a", "b"]
    assert np.array_equal(one.locate(np.arange(SLOTS)), two.locate(np.arange(SLOTS)))


def test_keys_claim_labels_below_them() -> None:
    labels = ["dolma/wiki", "dolma/books", "dolmades", "pile", "redpajama/book"]
    assert claim_labels(["dolma", "redpajama/book"], labels) == {
        "dolma/books": "dolma",
        "dolma/wiki": "dolma",
        "redpajama/book": "redpajama/book",
    }


def test_a_key_that_claims_nothing_names_the_labels_and_the_nearest() -> None:
    message = (
        "mixture source 'redpajama/books' is not among the shards (nearest: 'redpajama/book'); they hold "
        "dolma/wiki, redpajama/book: build that corpus, or change data.mixture"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        claim_labels(["redpajama/books"], ["redpajama/book", "dolma/wiki"])
    with pytest.raises(DataError, match=re.escape("they hold nothing: build that corpus")):
        claim_labels(["pile"], [])


def test_two_keys_for_one_label_are_refused() -> None:
    with pytest.raises(DataError, match="'dolma' and 'dolma/wiki' both claim 'dolma/wiki'"):
        claim_labels(["dolma", "dolma/wiki"], ["dolma/wiki"])


def test_description_says_what_was_rounded() -> None:
    """A third is no multiple of 1/10,000: largest remainder gives one of three equal sources the odd slot."""
    third = Fraction(1, 3)
    assert Mixture({"a": third, "b": third, "c": third}).describe() == (
        "a 33.34% (asked for 33.3333%), b 33.33% (asked for 33.3333%), c 33.33% (asked for 33.3333%)"
    )
    assert Mixture({"a": Fraction(1, 4), "b": Fraction(3, 4)}).describe() == "a 25.00%, b 75.00%"


def greedy(quotas: list[int]) -> list[int]:
    """Tijdeman's rule as it is stated: of those whose deficit is due, the one that would first be overdue."""
    total, scale = sum(quotas), max(2 * len(quotas) - 2, 1)
    dealt, sequence = [0] * len(quotas), []
    for slot in range(1, total + 1):
        deficits = [scale * (quota * slot - count * total) for quota, count in zip(quotas, dealt)]
        due = [i for i, deficit in enumerate(deficits) if deficit >= total]
        chosen = min(due, key=lambda i: -((deficits[i] - total * (scale - 1)) // (quotas[i] * scale)))
        dealt[chosen] += 1
        sequence.append(chosen)
    return sequence


def test_the_sequence_is_the_rule_s() -> None:
    rng = random.Random(2)
    for _ in range(60):
        sources = rng.randint(1, 9)
        cuts = sorted(rng.sample(range(1, 300), sources - 1))
        quotas = [high - low for low, high in zip([0, *cuts], [*cuts, 300])]
        assert chairman_sequence(quotas).tolist() == greedy(quotas)


@pytest.mark.parametrize("sampling", ["exact", "random"])
def test_index_of_undoes_locate(sampling: str) -> None:
    mixture = Mixture(flatten_mixture("strategy_1").weights, sampling=sampling, seed=4)
    indices = np.array([0, 1, 9_999, 10_000, 123_456, 10**12 + 7])
    for index, source, row in zip(indices.tolist(), *(part.tolist() for part in mixture.locate(indices))):
        assert mixture.index_of(mixture.names[source], row) == index
