"""Seats: which assignments their experts accept, and in what order the FFN experts work on them.

1. Wanted   how many assignments each expert received from the router.
2. Seats    an expert with capacity C keeps C of them: the most probable, the first, or first choices before second
            ones (XMoE); dropless keeps all.
3. Order    the kept assignments of the FFN experts, sorted by expert and then by token, are the rows of the products.

Everything is integer bookkeeping on the router's choices: no gradient passes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DropPolicy = Literal["probability", "position", "rank"]

SAME_PROBABILITY = 2.0**-20
"""Assignments of one expert whose probabilities round to the same multiple of this are a tie.

Tokens of the same word in the same context have the same probability but for the rounding of the products before the
router, which depends on where in them a row lies. Without a common step that rounding alone would say who gets the
last seat, and a run would differ between layouts and machines.
"""


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
    rank_N: Tensor,
    probability_N: Tensor,
    num_experts: int,
    num_ffn: int,
    capacity_E: Sequence[int] | None,
    drop_policy: DropPolicy = "probability",
) -> DispatchPlan:
    """Give seats to the assignments `expert_N`, which are ordered by token.

    capacity_E: seats per expert, or None for dropless (MoE++ eq 8 is worked out by the recipe, not here).
    drop_policy: a full expert keeps its most probable assignments (`probability`), those of the earliest tokens
    (`position`), or those of lowest rank and of them the most probable (`rank`). Ties (SAME_PROBABILITY): the earlier
    token.
    """
    wanted_E = count_by(expert_N, num_experts)
    if capacity_E is None:
        kept_E, kept_N = wanted_E, torch.ones_like(expert_N, dtype=torch.bool)
    else:
        seats_E = torch.tensor(capacity_E).to(expert_N.device, non_blocking=True)  # a plain copy waits for the GPU
        kept_E = torch.minimum(wanted_E, seats_E)
        keys: list[Tensor] = []  # what an expert sorts its wishes by, the last first
        if drop_policy != "position":
            keys.append(-torch.round(probability_N / SAME_PROBABILITY))
        if drop_policy == "rank":
            keys.append(rank_N)
        queue_N = _sorted_by([*keys, expert_N])
        kept_N = _place_in_queue(queue_N, expert_N, wanted_E) < seats_E[expert_N]
    # Refused assignments sort behind every expert, so the rows are a prefix and only the counts are read by the host.
    order_N = torch.argsort(expert_N.where(kept_N, num_experts), stable=True)
    ffn_counts = tuple(kept_E[:num_ffn].tolist())
    return DispatchPlan(wanted_E, kept_E, kept_N, order_N[: sum(ffn_counts)], ffn_counts)


def count_by(index_N: Tensor, length: int) -> Tensor:
    """How often each of 0..length-1 occurs, int64. Unlike bincount it never waits for a GPU."""
    return index_N.new_zeros(length).index_add_(0, index_N, torch.ones_like(index_N))


def _sorted_by(keys: Sequence[Tensor]) -> Tensor:
    """Indices of the assignments in rising order of the last key, ties by the one before it, and so on."""
    order_N = torch.argsort(keys[0], stable=True)
    for key_N in keys[1:]:
        order_N = order_N[torch.argsort(key_N[order_N], stable=True)]
    return order_N


def _place_in_queue(queue_N: Tensor, expert_N: Tensor, wanted_E: Tensor) -> Tensor:
    """The place of every assignment in its expert's queue; `queue_N` lists assignments expert by expert."""
    first_E = torch.cumsum(wanted_E, dim=0) - wanted_E
    place_N = torch.empty_like(queue_N)
    place_N[queue_N] = torch.arange(len(queue_N), device=queue_N.device) - first_E[expert_N[queue_N]]
    return place_N
