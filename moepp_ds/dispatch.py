"""Seats: which assignments their experts accept, and in what order the FFN experts work on them.

1. Wanted   how many assignments each expert received from the router.
2. Seats    an expert with capacity C keeps C of them, the most probable or the first; dropless keeps all.
3. Order    the kept assignments of the FFN experts, sorted by expert and then by token, are the rows of the products.

Everything is integer bookkeeping on the router's choices: no gradient passes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DropPolicy = Literal["probability", "position"]


@dataclass(frozen=True)
class DispatchPlan:
    """Who got a seat.

    wanted_E, kept_E: int64 assignments per expert, asked for and accepted.
    kept_N: bool, the assignment has a seat.
    order_R: int64 indices into the N assignments, the kept ones of FFN experts sorted by (expert, token).
    ffn_counts: host integers, kept assignments per FFN expert; they sum to R.
    """

    wanted_E: Tensor
    kept_E: Tensor
    kept_N: Tensor
    order_R: Tensor
    ffn_counts: tuple[int, ...]


@torch.no_grad()
def plan_dispatch(
    *,
    expert_N: Tensor,
    probability_N: Tensor,
    num_experts: int,
    num_ffn: int,
    capacity_E: Sequence[int] | None,
    drop_policy: DropPolicy = "probability",
) -> DispatchPlan:
    """Give seats to the assignments `expert_N`, which are ordered by token.

    capacity_E: seats per expert, or None for dropless (MoE++ eq 8 is worked out by the recipe, not here).
    drop_policy: a full expert keeps its most probable assignments (`probability`; ties: the earlier token) or those of
    the earliest tokens (`position`).
    """
    wanted_E = torch.bincount(expert_N, minlength=num_experts)
    if capacity_E is None:
        kept_E, kept_N = wanted_E, torch.ones_like(expert_N, dtype=torch.bool)
    else:
        seats_E = torch.as_tensor(capacity_E, device=expert_N.device)
        kept_E = torch.minimum(wanted_E, seats_E)
        queue_N = _queues(expert_N, probability_N if drop_policy == "probability" else None)
        kept_N = _place_in_queue(queue_N, expert_N, wanted_E) < seats_E[expert_N]
    # Refused assignments sort behind every expert, so the rows are a prefix and only the counts are read by the host.
    order_N = torch.argsort(expert_N.where(kept_N, num_experts), stable=True)
    ffn_counts = tuple(kept_E[:num_ffn].tolist())
    return DispatchPlan(wanted_E, kept_E, kept_N, order_N[: sum(ffn_counts)], ffn_counts)


def _queues(expert_N: Tensor, probability_N: Tensor | None) -> Tensor:
    """Indices of the assignments, expert by expert; inside an expert by falling probability if given, else by token."""
    if probability_N is None:
        return torch.argsort(expert_N, stable=True)
    by_probability_N = torch.argsort(probability_N, descending=True, stable=True)
    return by_probability_N[torch.argsort(expert_N[by_probability_N], stable=True)]


def _place_in_queue(queue_N: Tensor, expert_N: Tensor, wanted_E: Tensor) -> Tensor:
    """The place of every assignment in its expert's queue; `queue_N` lists assignments expert by expert."""
    first_E = torch.cumsum(wanted_E, dim=0) - wanted_E
    place_N = torch.empty_like(queue_N)
    place_N[queue_N] = torch.arange(len(queue_N), device=queue_N.device) - first_E[expert_N[queue_N]]
    return place_N
