"""Checkpoints move between layouts bit for bit, resume exactly, and are complete, absent or refused by name.

The checks run in real processes, two ranks, then one, then two: tests/programs/checkpoint_checks.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from programs.checks import expect, start

TWO_RANKS = [
    "files_hold_what_the_ranks_hold",
    "same_layout_continues_digit_for_digit_in_fp32",
    "same_layout_continues_digit_for_digit_in_bf16",
    "checkpoint_before_the_first_update",
    "loads_without_expert_parallelism",
    "weights_alone_go_on_with_a_new_optimizer",
]
ONE_RANK = ["one_rank_loads_what_two_saved"]
TWO_RANKS_AGAIN = [
    "two_ranks_load_what_one_saved",
    "latest_moves_last",
    "old_one_that_cannot_be_deleted_is_warned_of_and_tried_again",
    "old_ones_are_deleted_and_later_ones_do_not_count",
    "half_written_folders_are_ignored_and_cleared",
    "failed_save_is_known_to_all_ranks_and_leaves_the_one_before",
    "bytes_that_change_on_the_way_to_the_disk_are_found",
    "ranks_that_do_not_share_the_folder_are_found_out",
    "folder_that_cannot_be_made",
    "damaged_byte",
    "truncated_file",
    "missing_file",
    "missing_fragment",
    "another_models_shapes",
    "newer_format",
    "damaged_index",
    "kinds_that_nobody_knows",
    "folder_that_is_no_checkpoint",
    "ranks_that_see_different_checkpoints",
    "one_rank_that_cannot_go_on_reading_ends_all",
    "dynamic_scale_goes_on_from_a_dynamic_one_alone",
    "pickles_are_never_executed",
]


def run(folder: Path, part: str, world: int) -> dict[str, str]:
    return start(
        "tests.programs.checkpoint_checks", [str(folder), part], world=world, log=folder / f"{part}.txt"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, str]:
    return run(folder, "save", 2)


@pytest.fixture(scope="module")
def loaded_by_one(folder: Path, saved: dict[str, str]) -> dict[str, str]:
    return run(folder, "one", 1)


@pytest.fixture(scope="module")
def loaded_by_two(folder: Path, loaded_by_one: dict[str, str]) -> dict[str, str]:
    return run(folder, "back", 2)


@pytest.mark.dist
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(saved: dict[str, str], name: str) -> None:
    expect(saved, name)


@pytest.mark.dist
@pytest.mark.parametrize("name", ONE_RANK)
def test_then_one_rank(loaded_by_one: dict[str, str], name: str) -> None:
    expect(loaded_by_one, name)


@pytest.mark.dist
@pytest.mark.parametrize("name", TWO_RANKS_AGAIN)
def test_then_two_ranks_again(loaded_by_two: dict[str, str], name: str) -> None:
    expect(loaded_by_two, name)


@pytest.mark.dist
def test_every_check_is_named_here(
    saved: dict[str, str], loaded_by_one: dict[str, str], loaded_by_two: dict[str, str]
) -> None:
    assert [*saved, *loaded_by_one, *loaded_by_two] == TWO_RANKS + ONE_RANK + TWO_RANKS_AGAIN
