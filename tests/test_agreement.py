"""What one rank fails at, all fail at, in the same words. Real ranks: tests/programs/agreement_checks.py."""

from __future__ import annotations

import pytest
from programs.checks import expect, start

from moepp_ds.agreement import AgreedError, FinalError, agreed_message, all_or_none, gather, is_of_input

THREE_RANKS = [
    "values_come_by_rank",
    "nobody_fails",
    "one_fails",
    "two_fail_alike_and_all_fail_alike",
    "all_fail_differently",
    "faults_of_the_input_alone_are_final",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return start("tests.programs.agreement_checks", world=3, log=tmp_path_factory.mktemp("agreement") / "log.txt")


@pytest.mark.dist
@pytest.mark.parametrize("name", THREE_RANKS)
def test_three_ranks(results: dict[str, str], name: str) -> None:
    expect(results, name)


@pytest.mark.dist
def test_every_check_is_named_here(results: dict[str, str]) -> None:
    assert [*results] == THREE_RANKS


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([None, None], None),
        (["full", "full"], "full"),
        (["full"], "full"),
        ([None, "full"], "rank 1: full"),
        (["full", None, "full", "gone"], "ranks 0, 2: full\nrank 3: gone"),
    ],
)
def test_the_words(problems: list[str | None], message: str | None) -> None:
    assert agreed_message(problems) == message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AgreedError("own"), "own"),
        (ValueError("a value"), "a value"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_alone_without_a_process_group(error: Exception, words: str) -> None:
    assert gather(5) == [5]
    with pytest.raises(AgreedError) as caught:
        with all_or_none():
            raise error
    assert str(caught.value) == words
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, FinalError) == isinstance(error, ValueError)


def test_another_kind_stays_what_it_is() -> None:
    with pytest.raises(LookupError):
        with all_or_none(LookupError):
            raise ValueError("no such key")


@pytest.mark.parametrize(
    ("behind", "of_input"),
    [
        (KeyError("x"), True),
        (FileNotFoundError(2, "No such file"), True),
        (OSError(116, "Stale file handle"), False),
    ],
)
def test_what_a_file_system_said_is_no_fault_of_the_input(behind: Exception, of_input: bool) -> None:
    with pytest.raises(ValueError) as caught:
        try:
            raise behind
        except Exception as error:
            raise ValueError(f"cannot read it: {error}") from None
    assert is_of_input(caught.value) == of_input
    assert not is_of_input(behind)
    caught.value.__cause__ = ChildProcessError(-9)
    assert not is_of_input(caught.value)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_the_user_ends_the_program_at_once(kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        with all_or_none():
            raise kind
