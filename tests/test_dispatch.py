"""Seats, against typed-out plans and, exhaustively at small sizes, against a loop over experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, permutations, product

import pytest
import torch

from moepp_ds.dispatch import DispatchPlan, DropPolicy, plan_dispatch


def plan(
    expert_N: Sequence[int],
    probability_N: Sequence[float] | None = None,
    rank_N: Sequence[int] | None = None,
    *,
    num_experts: int = 3,
    num_ffn: int = 2,
    capacity_E: Sequence[int] | None = None,
    drop_policy: DropPolicy = "probability",
) -> DispatchPlan:
    return plan_dispatch(
        expert_N=torch.tensor(expert_N, dtype=torch.int64),
        rank_N=torch.tensor(rank_N or [0] * len(expert_N), dtype=torch.int64),
        probability_N=torch.tensor(probability_N or [0.5] * len(expert_N)),
        num_experts=num_experts,
        num_ffn=num_ffn,
        capacity_E=capacity_E,
        drop_policy=drop_policy,
    )


def listed(made: DispatchPlan) -> dict[str, object]:
    fields = vars(made).items()
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in fields}


def test_dropless_keeps_all_and_sorts_the_ffn_assignments() -> None:
    # Tokens 0, 1, 2 with two choices each; experts 0 and 1 are FFN, 2 is not.
    #   assignment  0 1   2 3   4 5
    #   expert      1 2   0 1   2 0
    # Expert 0 works on assignments 3rd and 6th (indices 2, 5), expert 1 on 0 and 3.
    made = plan([1, 2, 0, 1, 2, 0])
    assert listed(made) == {
        "wanted_E": [2, 2, 2],
        "kept_E": [2, 2, 2],
        "kept_N": [True] * 6,
        "order_R": [2, 5, 0, 3],
        "ffn_counts": (2, 2),
    }
    assert made.wanted_E.dtype == made.kept_E.dtype == made.order_R.dtype == torch.int64
    assert made.kept_N.dtype == torch.bool


EXPERT_N = [0, 0, 1, 0, 0, 1, 2]
PROBABILITY_N = [0.3, 0.6, 0.9, 0.5, 0.6, 0.1, 0.2]
RANK_N = [0, 1, 1, 0, 1, 0, 0]


def test_a_full_expert_keeps_the_most_probable() -> None:
    # Expert 0 has 2 seats for 0.3, 0.6, 0.5, 0.6: the two 0.6 (assignments 1 and 4). Expert 1 has 1 for 0.9,
    # 0.1.
    made = plan(EXPERT_N, PROBABILITY_N, capacity_E=[2, 1, 5])
    assert listed(made) == {
        "wanted_E": [4, 2, 1],
        "kept_E": [2, 1, 1],
        "kept_N": [False, True, True, False, True, False, True],
        "order_R": [1, 4, 2],  # expert 0 by token, then expert 1; assignment 6 is no FFN expert's
        "ffn_counts": (2, 1),
    }


def test_or_the_earliest() -> None:
    made = plan(EXPERT_N, PROBABILITY_N, capacity_E=[2, 1, 5], drop_policy="position")
    assert made.kept_N.tolist() == [True, True, True, False, False, False, True]
    assert made.order_R.tolist() == [0, 1, 2]


def test_or_those_that_chose_it_first() -> None:
    # Expert 0: of ranks 0 1 0 1 the two first choices stay, 0.3 and 0.5, though 0.6 is more. Expert 1: rank 0.
    made = plan(EXPERT_N, PROBABILITY_N, RANK_N, capacity_E=[2, 1, 5], drop_policy="rank")
    assert made.kept_N.tolist() == [True, False, False, True, False, True, True]
    assert made.order_R.tolist() == [0, 3, 5]
    # With a third seat the better of the second choices gets in; of equal ones the earlier: assignment 1 before 4.
    made = plan(EXPERT_N, PROBABILITY_N, RANK_N, capacity_E=[3, 1, 5], drop_policy="rank")
    assert made.order_R.tolist() == [0, 1, 3, 5]
    # One seat: the more probable first choice.
    made = plan(EXPERT_N, PROBABILITY_N, RANK_N, capacity_E=[1, 1, 5], drop_policy="rank")
    assert made.order_R.tolist() == [3, 5]


def test_a_rank_of_a_ragged_token_is_a_rank() -> None:
    # XMoE: token 0 chose experts 1 0, token 1 chose 0 alone, token 2 chose 2 1 0. One seat in expert 0: token 1's,
    # with 0.2, before 0.4 of rank 1 and 0.3 of rank 2. One in expert 1: token 0's, with 0.5, before 0.6 of rank 1.
    made = plan(
        [1, 0, 0, 2, 1, 0], [0.5, 0.4, 0.2, 0.9, 0.6, 0.3], [0, 1, 0, 0, 1, 2], capacity_E=[1, 1, 1], drop_policy="rank"
    )
    assert made.kept_N.tolist() == [True, False, True, True, False, False]
    assert (made.order_R.tolist(), made.wanted_E.tolist(), made.kept_E.tolist()) == ([2, 0], [3, 2, 1], [1, 1, 1])


def test_of_equal_probabilities_the_earlier_token_stays() -> None:
    assert plan([0] * 5, [0.1, 0.4, 0.4, 0.9, 0.4], capacity_E=[3, 1, 1]).order_R.tolist() == [1, 2, 3]


def test_a_rounding_is_no_reason_to_lose_a_seat() -> None:
    """Of tokens that differ in the last bit of their probability the earlier one stays; a real difference counts."""
    policies: tuple[DropPolicy, ...] = ("probability", "rank")
    for drop_policy in policies:
        for probability in (0.125, 0.3, 0.7):
            larger = torch.nextafter(torch.tensor(probability), torch.tensor(1.0)).item()
            made = plan([0, 0], [probability, larger], capacity_E=[1, 1, 1], drop_policy=drop_policy)
            assert made.kept_N.tolist() == [True, False]
            made = plan([0, 0], [probability, probability + 1e-5], capacity_E=[1, 1, 1], drop_policy=drop_policy)
            assert made.kept_N.tolist() == [False, True]


@pytest.mark.parametrize("drop_policy", ["probability", "position", "rank"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ties_by_the_thousand_too(device: str, drop_policy: DropPolicy) -> None:
    # Long lists are sorted by other code than short ones. All equal: each expert keeps its first 100 tokens.
    expert_N = torch.arange(6000, device=device) % 3
    made = plan_dispatch(
        expert_N=expert_N,
        rank_N=torch.zeros_like(expert_N),
        probability_N=torch.full((6000,), 0.5, device=device),
        num_experts=3,
        num_ffn=2,
        capacity_E=[100, 100, 100],
        drop_policy=drop_policy,
    )
    assert made.order_R.tolist() == [*range(0, 300, 3), *range(1, 300, 3)]
    assert made.kept_N.tolist() == [True] * 300 + [False] * 5700


def test_experts_that_nobody_asked_for_are_counted_as_zero() -> None:
    # Four FFN experts, of which 0 and 3 get nothing, and no zero-computation expert at all.
    made = plan([2, 1, 2], num_experts=4, num_ffn=4, capacity_E=[1, 1, 1, 1])
    assert listed(made)["wanted_E"] == [0, 1, 2, 0]
    assert made.ffn_counts == (0, 1, 1, 0)
    assert made.order_R.tolist() == [1, 0]


def test_no_ffn_assignment_and_no_assignment_at_all() -> None:
    made = plan([2, 2, 2])
    assert (made.order_R.tolist(), made.ffn_counts, made.kept_E.tolist()) == ([], (0, 0), [0, 0, 3])
    policies: tuple[DropPolicy, ...] = ("probability", "position", "rank")
    for capacity_E, drop_policy in product((None, [1, 1, 1]), policies):
        made = plan([], capacity_E=capacity_E, drop_policy=drop_policy)
        assert (made.order_R.tolist(), made.ffn_counts, made.kept_E.tolist()) == ([], (0, 0), [0, 0, 0])


def test_no_gradient_passes() -> None:
    # A plan is integers; the probabilities it is made from need no detaching.
    made = plan_dispatch(
        expert_N=torch.tensor([0]),
        rank_N=torch.tensor([0]),
        probability_N=torch.tensor([0.5], requires_grad=True),
        num_experts=1,
        num_ffn=1,
        capacity_E=[1],
    )
    assert not any(value.requires_grad for value in vars(made).values() if isinstance(value, torch.Tensor))


def seats_by_loop(
    expert_N: Sequence[int],
    probability_N: Sequence[float],
    rank_N: Sequence[int],
    num_ffn: int,
    capacity_E: Sequence[int],
    drop_policy: DropPolicy,
) -> dict[str, object]:
    """The plan by definition: expert by expert, a sorted queue is cut at the number of seats."""
    key: dict[str, Callable[[int], tuple[float, ...]]] = {
        "probability": lambda n: (-probability_N[n], n),
        "position": lambda n: (n,),
        "rank": lambda n: (rank_N[n], -probability_N[n], n),
    }
    wanted, kept, order, kept_n = [], [], [], [False] * len(expert_N)
    for expert, seats in enumerate(capacity_E):
        queue = [n for n, chosen in enumerate(expert_N) if chosen == expert]
        accepted = sorted(queue, key=key[drop_policy])[:seats]
        wanted.append(len(queue))
        kept.append(len(accepted))
        for n in accepted:
            kept_n[n] = True
        if expert < num_ffn:
            order += sorted(accepted)
    return {
        "wanted_E": wanted,
        "kept_E": kept,
        "kept_N": kept_n,
        "order_R": order,
        "ffn_counts": tuple(kept[:num_ffn]),
    }


@pytest.mark.parametrize("drop_policy", ["probability", "position", "rank"])
def test_every_set_of_choices_of_three_tokens(drop_policy: DropPolicy) -> None:
    # Each token chooses any subset of three experts, none and all included: 8^3 routings, ragged ones among
    # them. Probabilities have three values, so that experts meet ties; seats from none to plenty. A token lists its
    # choices in an order of their own, which takes turns.
    subsets = [subset for size in range(4) for subset in combinations(range(3), size)]
    for number, choices in enumerate(product(subsets, repeat=3)):
        orders = list(permutations(range(3)))
        ordered = [sorted(c, key=orders[(number + t) % 6].index) for t, c in enumerate(choices)]
        expert_N = [expert for chosen in ordered for expert in chosen]
        rank_N = [rank for chosen in ordered for rank in range(len(chosen))]
        probability_N = [(7 * n + number) % 3 / 4 for n in range(len(expert_N))]
        for num_ffn, capacity_E in ((2, (1, 1, 1)), (2, (2, 1, 0)), (3, (1, 2, 3)), (1, (0, 3, 2))):
            made = plan(
                expert_N, probability_N, rank_N, num_ffn=num_ffn, capacity_E=capacity_E, drop_policy=drop_policy
            )
            expected = seats_by_loop(expert_N, probability_N, rank_N, num_ffn, capacity_E, drop_policy)
            assert listed(made) == expected


def test_every_order_of_four_probabilities_and_every_number_of_seats() -> None:
    for probability_N in product((0.1, 0.2, 0.3), repeat=4):
        for seats in range(6):
            made = plan([0, 0, 0, 0], probability_N, num_experts=1, num_ffn=1, capacity_E=[seats])
            expected = seats_by_loop([0] * 4, probability_N, [0] * 4, 1, [seats], "probability")
            assert listed(made) == expected


def test_every_mix_of_ranks_and_probabilities() -> None:
    for rank_N in product((0, 1, 2), repeat=4):
        for probability_N in product((0.1, 0.2), repeat=4):
            for seats in range(1, 4):
                made = plan(
                    [0] * 4, probability_N, rank_N, num_experts=1, num_ffn=1, capacity_E=[seats], drop_policy="rank"
                )
                assert listed(made) == seats_by_loop([0] * 4, probability_N, rank_N, 1, [seats], "rank")
