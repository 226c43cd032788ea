"""The seams to DeepSpeed's mixture of experts.

1. `AllToAll` carries FFN assignments, and nothing else, between the ranks of an expert-parallel group.
2. `ExpertParallelMoE` is a MoE++ layer that DeepSpeed's engine recognises: the engine makes the process groups,
   reduces expert gradients over the ranks that hold replicas of them and counts every expert once in the
   gradient norm.
3. `parameter_groups` divides a model's parameters into groups that provably partition it.

What is assumed of DeepSpeed's internals is listed and checked in tests/test_deepspeed_contract.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings, MoELayer, Parcel

MAX_EXPERT_GROUP = 178_956_971
"""Parameters of one optimizer group of experts: ZeRO widens one group's gradients to fp32 at a time."""


class _AllToAllRows(torch.autograd.Function):
    """Rows to the ranks that own their experts; in the backward pass their gradients take the way back.

    The forward returns before the rows have arrived when `in_flight` is given: it gets the handle to wait for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        sent: list[int],
        received: list[int],
        group: Any,
        in_flight: list[Any] | None,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out_QD = rows_RD.new_empty(sum(received), rows_RD.shape[1])
        work = dist.all_to_all_single(
            out_QD, rows_RD.contiguous(), received, sent, group=group, async_op=in_flight is not None
        )
        if in_flight is not None:
            in_flight.append(work)
        return out_QD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_QD,) = gradients
        grad_RD = grad_QD.new_empty(sum(ctx.sent), grad_QD.shape[1])
        dist.all_to_all_single(grad_RD, grad_QD.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return grad_RD, None, None, None, None


@dataclass(frozen=True)
class _InFlight:
    """Rows under way. They arrive rank by rank; order_Q lists them expert by expert, as the product wants them."""

    rows_QD: Tensor
    order_Q: Tensor
    counts: list[int]
    sent: list[int]
    received: list[int]
    group: Any
    work: list[Any]

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        for handle in self.work:
            handle.wait()
        return self.rows_QD.index_select(0, self.order_Q), self.counts

    def give_back(self, rows_QD: Tensor) -> Tensor:
        by_rank_QD = rows_QD.index_select(0, torch.argsort(self.order_Q))
        return _AllToAllRows.apply(by_rank_QD, self.received, self.sent, self.group, None)


def _order_by_expert(counts_PE: list[list[int]]) -> Tensor:
    """Indices of rows that came rank by rank (`counts_PE[p][e]` from rank p for expert e), expert by expert."""
    ends = list(accumulate(count for row in counts_PE for count in row))
    starts, num_experts = [0, *ends], len(counts_PE[0])
    blocks = [at for e in range(num_experts) for at in range(e, len(ends), num_experts)]
    return torch.cat([torch.arange(starts[at], ends[at]) for at in blocks])


class AllToAll:
    """The exchange of an expert-parallel group of P ranks; rank p owns the p-th equal run of FFN experts."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        """Tell every rank how many rows it gets for each of its experts, then start sending them.

        Exactly the rows given travel, however uneven: no padding to the fullest expert.
        """
        num_local = len(counts) // dist.get_world_size(self.group)
        mine_E = torch.tensor(counts).to(rows_RD.device, non_blocking=True)
        theirs_E = torch.empty_like(mine_E)
        dist.all_to_all_single(theirs_E, mine_E, group=self.group)
        counts_PE = theirs_E.view(-1, num_local).tolist()
        sent = [sum(counts[first : first + num_local]) for first in range(0, len(counts), num_local)]
        received = [sum(row) for row in counts_PE]
        work: list[Any] = []
        rows_QD = _AllToAllRows.apply(rows_RD, sent, received, self.group, work)
        order_Q = _order_by_expert(counts_PE).to(rows_RD.device, non_blocking=True)
        local_counts = [sum(column) for column in zip(*counts_PE)]
        return _InFlight(rows_QD, order_Q, local_counts, sent, received, self.group, work)


class ExpertParallelMoE(MoELayer, MoE):
    """A MoE++ layer whose FFN experts are spread over `expert_parallel` ranks.

    It inherits DeepSpeed's MoE only to be recognised; none of that class's code runs. The engine reads
    `num_experts` (FFN experts, over all ranks) and calls `set_deepspeed_parallelism`; expert parameters carry the
    marks `allreduce` and `group_name` that send their gradients to the right ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        kinds: ExpertKinds,
        settings: LayerSettings,
        *,
        has_residual: bool,
        expert_parallel: int,
    ) -> None:
        num_local = kinds.num_ffn // expert_parallel
        rank = dist.get_rank() if dist.is_initialized() else 0
        MoELayer.__init__(
            self,
            hidden_size,
            ffn_hidden_size,
            kinds,
            settings,
            has_residual=has_residual,
            num_local_experts=num_local,
            first_local_expert=rank % expert_parallel * num_local,
        )
        self.num_experts = kinds.num_ffn
        self.ep_size = expert_parallel
        self.expert_group_name = f"ep_size_{expert_parallel}"
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    forward = MoELayer.forward

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by `deepspeed.initialize`: make this size's process groups if no layer has, and join them."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size, use_data_before_expert_parallel_)
        if self.ep_size > 1:
            group = groups._get_expert_parallel_group(self.expert_group_name)
            expected = self.first_local_expert // (self.num_experts // self.ep_size)
            if dist.get_rank(group) != expected:
                raise RuntimeError(
                    f"rank {dist.get_rank()} is number {dist.get_rank(group)} of its expert-parallel group but "
                    f"holds the experts of number {expected}; `use_data_before_expert_parallelism` in the "
                    "DeepSpeed JSON orders ranks that way and must be left out"
                )
            self.exchange = AllToAll(group)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms nor to the value vectors of constant experts."""
    return parameter.ndim >= 2 and not name.endswith("value_JD")


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups in the form DeepSpeed wants: each with a name, experts apart and marked `moe`.

    Large expert groups are split at `MAX_EXPERT_GROUP` parameters.
    """
    named = list(model.named_parameters())
    split = split_params_into_different_moe_groups_for_optimizer(
        [
            {"name": "decay", "params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
            {"name": "no_decay", "params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ],
        max_group_size=MAX_EXPERT_GROUP,
    )
    split = [group for group in split if group["params"]]
    check_partition(split, model)
    return split


def check_partition(optimizer_groups: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Raise RuntimeError unless the groups hold every parameter of the model once, and nothing else.

    A parameter outside of them would silently keep its initial value; one held twice would be updated twice.
    """
    held = Counter(id(parameter) for group in optimizer_groups for parameter in group["params"])
    times = {name: held.pop(id(parameter), 0) for name, parameter in model.named_parameters()}
    wrong = [f"{name} is in {count} groups" for name, count in times.items() if count != 1]
    if held:
        wrong.append(f"{len(held)} others are no parameters of the model")
    if wrong:
        raise RuntimeError(f"optimizer groups must hold each parameter once; {', '.join(wrong)}")
