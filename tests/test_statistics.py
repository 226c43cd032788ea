"""What a layer counts, by hand, and that counts add up over micro batches and survive being packed."""

from __future__ import annotations

from dataclasses import fields, replace
from math import log

import pytest
import torch
from torch import Tensor

from moepp_ds.dispatch import plan_dispatch
from moepp_ds.kinds import ExpertKinds
from moepp_ds.router import Routing
from moepp_ds.statistics import (
    RoutingStatistics,
    first_choices,
    from_vector,
    routing_statistics,
    stack,
    to_vector,
)

KINDS = ExpertKinds(num_ffn=2, num_constant=0, num_copy=1, num_zero=1)
CHOICES = [[0, 1], [3], [1, 0, 2], [0]]
"""Experts of four tokens, best first; ragged, as a threshold gives them."""
PROBABILITY_TE = [[0.5, 0.5, 0, 0], [0, 0, 0, 1], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]]
SEATS = [2, 2, 1, 1]
"""Expert 0 has three wishes for 2 seats: 0.7 and 0.5 get them, token 2's 0.25 does not."""


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def routing() -> Routing:
    probability_TE = tensor(PROBABILITY_TE).requires_grad_()
    places = [(t, expert, rank) for t, chosen in enumerate(CHOICES) for rank, expert in enumerate(chosen)]
    token_N, expert_N, rank_N = torch.tensor(places).unbind(dim=1)
    return Routing(
        logits_TE=probability_TE.log(),
        scored_TE=probability_TE.log(),
        probability_TE=probability_TE,
        token_N=token_N,
        expert_N=expert_N,
        rank_N=rank_N,
        gate_N=probability_TE[token_N, expert_N],
        probability_N=probability_TE.detach()[token_N, expert_N],
    )


def counted(*, seats: list[int] | None = None, most_ffn: int = 2) -> RoutingStatistics:
    made = routing()
    plan = plan_dispatch(
        expert_N=made.expert_N,
        rank_N=made.rank_N,
        probability_N=made.probability_N,
        num_experts=4,
        num_ffn=2,
        capacity_E=seats,
    )
    balance = tensor(1.25).requires_grad_()
    first_E = first_choices(made, KINDS.total)
    return routing_statistics(made, plan, first_E, kinds=KINDS, most_ffn=most_ffn, balance=balance)


def test_every_number_by_hand() -> None:
    found = counted(seats=SEATS)
    assert found.wanted_E.tolist() == [3, 2, 1, 1]
    assert found.kept_E.tolist() == [2, 2, 1, 1]
    assert found.first_E.tolist() == [2, 1, 0, 1]
    # Tokens 0 to 3 were computed by 2, 0, 1 (one of two was refused) and 1 FFN experts.
    assert found.histogram_H.tolist() == [1, 2, 1]
    # In nats: log 2, 0 (and 0 log 0 is 0), log 4, and - 0.7 log 0.7 - 3 * 0.1 log 0.1.
    entropy = log(2) + 0 + log(4) - 0.7 * log(0.7) - 0.3 * log(0.1)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-14)
    assert found.top_1.item() == pytest.approx(0.5 + 1 + 0.25 + 0.7, abs=1e-14)
    assert found.top_2.item() == pytest.approx(0.5 + 0 + 0.25 + 0.1, abs=1e-14)
    assert found.balance.item() == 4 * 1.25  # a sum over tokens, as the others


def test_dropless_computes_what_was_wanted() -> None:
    found = counted()
    assert torch.equal(found.kept_E, found.wanted_E)
    assert found.histogram_H.tolist() == [1, 1, 2]
    # FFN experts per token: the histogram's mean is the kept assignments of FFN experts over tokens.
    assert (found.histogram_H * torch.arange(3)).sum() == found.kept_E[:2].sum() == 5


def test_the_histogram_is_as_long_as_the_most_a_token_can_have() -> None:
    assert counted(most_ffn=5).histogram_H.tolist() == [1, 1, 2, 0, 0, 0]


def test_one_expert_has_no_second_score() -> None:
    made = replace(
        routing(),
        probability_TE=torch.ones(3, 1),
        token_N=torch.arange(3),
        expert_N=torch.zeros(3, dtype=torch.int64),
        rank_N=torch.zeros(3, dtype=torch.int64),
        probability_N=torch.ones(3),
    )
    plan = plan_dispatch(
        expert_N=made.expert_N,
        rank_N=made.rank_N,
        probability_N=made.probability_N,
        num_experts=1,
        num_ffn=1,
        capacity_E=None,
    )
    kinds = ExpertKinds(1, 0, 0, 0)
    first_E = first_choices(made, kinds.total)
    found = routing_statistics(made, plan, first_E, kinds=kinds, most_ffn=1, balance=torch.tensor(1.0))
    assert (found.top_1.item(), found.top_2.item(), found.entropy.item()) == (3.0, 0.0, 0.0)
    assert (found.histogram_H.tolist(), found.top_2.shape) == ([0, 3], torch.Size([]))


def test_first_choices_alone() -> None:
    assert first_choices(routing(), 4).tolist() == [2, 1, 0, 1]
    assert first_choices(routing(), 6).tolist() == [2, 1, 0, 1, 0, 0]


def test_no_statistic_holds_on_to_the_graph_and_counts_are_integers() -> None:
    found = counted(seats=SEATS)
    assert not any(getattr(found, field.name).requires_grad for field in fields(found))
    integers = (found.wanted_E, found.kept_E, found.first_E, found.histogram_H)
    assert {values.dtype for values in integers} == {torch.int64}


def test_layers_are_stacked_in_front() -> None:
    layers = stack([counted(seats=SEATS), counted()])
    assert layers.wanted_E.tolist() == [[3, 2, 1, 1]] * 2
    assert layers.kept_E.tolist() == [[2, 2, 1, 1], [3, 2, 1, 1]]
    assert layers.histogram_H.tolist() == [[1, 2, 1], [1, 1, 2]]
    assert layers.balance.tolist() == [5.0, 5.0]


def test_a_vector_holds_everything_and_adds_up() -> None:
    layers = stack([counted(seats=SEATS), counted()])
    vector = to_vector(layers)
    assert vector.dtype == torch.float64 and vector.shape == (2 * (4 + 4 + 4 + 3 + 4),)
    once, twice = from_vector(vector, layers), from_vector(vector + vector, layers)
    for field in fields(RoutingStatistics):
        before, after = getattr(layers, field.name), getattr(once, field.name)
        assert torch.equal(before, after) and before.dtype == after.dtype, field.name
        assert torch.equal(2 * before, getattr(twice, field.name)), field.name


def test_counts_beyond_fp32_survive() -> None:
    # 2^40 + 1 is no fp32 number; a long update of many ranks may count as far.
    large = replace(counted(), wanted_E=torch.tensor([2**40 + 1, 2**40 + 3, 5, 0]))
    assert from_vector(to_vector(large), large).wanted_E.tolist() == [2**40 + 1, 2**40 + 3, 5, 0]
