"""Order: keyed permutations, by hand where small, and frozen so that no later change moves a run's rows."""

from __future__ import annotations

import numpy as np

from data_pipeline.order import derive_key, file_order, file_orders, mix64, name_keys, permutation, window_permutation

MASK = 2**64 - 1

FROZEN_WINDOW = [5, 3, 4, 1, 6, 2, 7, 0]
FROZEN_FILES = [7, 6, 5, 0, 4, 3, 1, 2]
"""Changing these would change the rows of every run that is under way."""


def splitmix64(state: int, count: int) -> list[int]:
    """The generator of the published algorithm, in Python integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_published_splitmix64_vector() -> None:
    # First outputs for seed 1234567, as published with the reference implementation.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    counters = np.array([1234567 + (i + 1) * 0x9E3779B97F4A7C15 & MASK for i in range(3)], dtype=np.uint64)
    assert mix64(counters).tolist() == splitmix64(1234567, 3)


def test_permutation_sorts_the_generator_s_outputs() -> None:
    for key in (0, 1, 2**63, MASK):
        for size in (0, 1, 2, 7, 100):
            outputs = splitmix64(key, size)
            assert permutation(key, size).tolist() == sorted(range(size), key=outputs.__getitem__)


def test_every_size_gives_a_permutation() -> None:
    for size in range(200):
        assert sorted(window_permutation(3, "dolma", size, size).tolist()) == list(range(size))


def test_seed_source_and_window_each_change_the_order() -> None:
    base = window_permutation(0, "dolma", 0, 64).tolist()
    others = [
        window_permutation(1, "dolma", 0, 64).tolist(),
        window_permutation(0, "pile", 0, 64).tolist(),
        window_permutation(0, "dolma", 1, 64).tolist(),
    ]
    assert all(order != base for order in others)
    assert len({tuple(order) for order in others}) == 3


def test_the_order_of_rows_never_changes_between_versions() -> None:
    assert derive_key("window", 0, "dolma", 0) == derive_key("window", "0", "dolma", "0")
    assert window_permutation(0, "dolma", 0, 8).tolist() == FROZEN_WINDOW
    names = [f"{i:02d}.jsonl" for i in range(8)]
    assert file_order(0, "pile", 0, name_keys(names)).tolist() == FROZEN_FILES


def test_key_separates_its_parts() -> None:
    assert derive_key("ab", "c") != derive_key("a", "bc")
    assert derive_key("a") != derive_key("a", "")
    assert 0 <= derive_key("a") < 2**64


def test_a_file_s_place_depends_on_names_alone() -> None:
    names = [f"part-{i}" for i in range(20)]
    expected = [names[i] for i in file_order(5, "dolma", 2, name_keys(names))]
    shuffled = names[7:] + names[:7]
    assert [shuffled[i] for i in file_order(5, "dolma", 2, name_keys(shuffled))] == expected


def test_removing_a_file_keeps_the_others_in_order() -> None:
    names = [f"part-{i}" for i in range(20)]
    everything = [names[i] for i in file_order(5, "dolma", 2, name_keys(names))]
    fewer = names[:9] + names[10:]
    assert [fewer[i] for i in file_order(5, "dolma", 2, name_keys(fewer))] == [
        name for name in everything if name != "part-9"
    ]


def test_each_epoch_has_its_own_order() -> None:
    keys = name_keys([str(i) for i in range(12)])
    orders = {tuple(file_order(0, "pile", epoch, keys).tolist()) for epoch in range(50)}
    assert len(orders) == 50


def test_places_are_spread_evenly() -> None:
    # Each of 8 rows falls on each of 8 places 1,000 +- 5 standard deviations times in 8,000 windows.
    counts = np.zeros((8, 8), dtype=int)
    for window in range(8000):
        counts[np.arange(8), window_permutation(0, "dolma", window, 8)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(8000 * 1 / 8 * 7 / 8)


def test_orders_of_many_epochs_are_those_of_each() -> None:
    keys = name_keys([f"file {number}" for number in range(30)])
    orders = file_orders(3, "dolma", range(7, 20), keys)
    assert orders.shape == (13, 30)
    for epoch, order in zip(range(7, 20), orders):
        assert np.array_equal(order, file_order(3, "dolma", epoch, keys))
