"""What a MoE layer did, as sums over tokens: they add up over micro batches and over ranks.

Axis letters as everywhere (see products), but here H counts FFN experts: entry h is of tokens that have h of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moepp_ds.dispatch import DispatchPlan, count_by
from moepp_ds.kinds import ExpertKinds
from moepp_ds.router import Routing


@dataclass(frozen=True)
class RoutingStatistics:
    """Counts and sums of one MoE layer, or of L of them with an axis of layers in front.

    wanted_E, kept_E: int64 assignments per expert, before and after seats. first_E: int64 first choices.
    histogram_H: int64 tokens that h routed FFN experts computed, h from 0 on.
    entropy: of the scores, in nats; top_1, top_2: the highest and the second highest score; balance: the normalised
    balance loss. These four are summed over tokens, fp32.
    """

    wanted_E: Tensor
    kept_E: Tensor
    first_E: Tensor
    histogram_H: Tensor
    entropy: Tensor
    top_1: Tensor
    top_2: Tensor
    balance: Tensor


@torch.no_grad()
def routing_statistics(
    routing: Routing, plan: DispatchPlan, first_E: Tensor, *, kinds: ExpertKinds, most_ffn: int, balance: Tensor
) -> RoutingStatistics:
    """Count one layer's routing of T tokens. first_E: of `first_choices`. most_ffn: the most a token can have."""
    probability_TE = routing.probability_TE
    num_tokens = len(probability_TE)
    ffn_T = count_by(routing.token_N[plan.order_R], num_tokens)
    highest_T2 = torch.topk(probability_TE, min(2, kinds.total), dim=-1).values
    return RoutingStatistics(
        wanted_E=plan.wanted_E,
        kept_E=plan.kept_E,
        first_E=first_E,
        histogram_H=count_by(ffn_T, most_ffn + 1),
        entropy=torch.special.entr(probability_TE).sum(),
        top_1=highest_T2[:, 0].sum(),
        top_2=highest_T2[:, 1:].sum(),
        balance=balance.detach() * num_tokens,
    )


def first_choices(routing: Routing, num_experts: int) -> Tensor:
    """How many tokens chose each expert first, int64 [E]."""
    return routing.expert_N.new_zeros(num_experts).index_add_(0, routing.expert_N, (routing.rank_N == 0).long())


def stack(layers: Sequence[RoutingStatistics]) -> RoutingStatistics:
    """The statistics of L layers in one record."""
    return RoutingStatistics(
        *(torch.stack([getattr(layer, field.name) for layer in layers]) for field in fields(RoutingStatistics))
    )


def to_vector(statistics: RoutingStatistics) -> Tensor:
    """All numbers as one fp64 vector, which holds every count exactly."""
    return torch.cat([getattr(statistics, field.name).flatten().double() for field in fields(RoutingStatistics)])


def from_vector(vector: Tensor, like: RoutingStatistics) -> RoutingStatistics:
    """The record that `to_vector` took apart, in the shapes of `like`, in fp64 and int64."""
    shapes = [getattr(like, field.name) for field in fields(RoutingStatistics)]
    parts = vector.split([tensor.numel() for tensor in shapes])
    return RoutingStatistics(
        *(
            part.view_as(tensor) if tensor.is_floating_point() else part.view_as(tensor).round().long()
            for part, tensor in zip(parts, shapes)
        )
    )
