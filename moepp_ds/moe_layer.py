"""The MoE++ layer: heterogeneous experts behind one router (MoE++, arXiv 2410.07348)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp_ds.dispatch import DispatchPlan, DropPolicy, plan_dispatch
from moepp_ds.experts import ConstantExperts, FFNExperts, zero_computation_output
from moepp_ds.kinds import ExpertKinds
from moepp_ds.losses import balance_loss
from moepp_ds.router import Router


class Parcel(Protocol):
    """Rows on their way to the ranks that own their experts."""

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        """Wait; the rows this rank works on, sorted by local expert, and their number per local expert."""

    def give_back(self, rows_QD: Tensor) -> Tensor:
        """The results for the rows that were sent, in the order they were sent in."""


class Exchange(Protocol):
    """Carries FFN assignments between the ranks of an expert-parallel group."""

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        """Start sending rows sorted by FFN expert, `counts[e]` for expert e of all; the rows are not waited for."""


@dataclass(frozen=True)
class _KeptAtHome:
    """A parcel that never left: this rank owns every expert."""

    rows_RD: Tensor
    counts: Sequence[int]

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        return self.rows_RD, self.counts

    def give_back(self, rows_QD: Tensor) -> Tensor:
        return rows_QD


class LocalExchange:
    """The exchange of a rank that owns every FFN expert."""

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        """Keep the rows."""
        return _KeptAtHome(rows_RD, counts)


@dataclass(frozen=True)
class MoEOutput:
    """What a layer returns; nothing is stored in it.

    output_TD: in the dtype of x. logits_TE: fp32, for the next layer's gating residual. balance_loss: scalar, not yet
    weighted. wanted_E, kept_E: int64, assignments per expert before and after seats.
    """

    output_TD: Tensor
    logits_TE: Tensor
    balance_loss: Tensor
    wanted_E: Tensor
    kept_E: Tensor


@dataclass(frozen=True)
class LayerSettings:
    """The choices of one MoE++ layer that are not sizes.

    seats: from a number of tokens, the seats of every expert in index order (eq 8); None is dropless.
    """

    top_k: int
    tau: float
    seats: Callable[[int], Sequence[int]] | None
    drop_policy: DropPolicy


class MoELayer(nn.Module):
    """y_T = sum over the experts i that token t chose and that had a seat: g_ti E_i(x_t)   (MoE++, eq 1)

    1 route    G = W x + Wg G_before; p = softmax(G); the K best                         (eq 1, 6)
    2 seat     C_FFN and C_ZC seats per expert, or as many as asked for                   (eq 8)
    3 compute  FFN assignments travel to their experts' ranks; meanwhile zero, copy and
               constant experts are one scale of x and one small product, at home         (eq 3, 4, 5)
    4 combine  results return, times g, and are added where they came from                (eq 1)
    5 report   balance loss and counts are returned                                       (eq 7)

    Evaluation is dropless: seats bound the cost of a training step, and with them the output for one token would
    depend on later tokens of the batch.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        kinds: ExpertKinds,
        settings: LayerSettings,
        *,
        has_residual: bool,
        num_local_experts: int | None = None,
        first_local_expert: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): the expert-parallel subclass also inherits DeepSpeed's MoE
        self.kinds = kinds
        self.settings = settings
        self.first_local_expert = first_local_expert
        self.exchange = exchange or LocalExchange()
        self.router = Router(hidden_size, kinds.total, top_k=settings.top_k, has_residual=has_residual)
        self.experts = FFNExperts(num_local_experts or kinds.num_ffn, hidden_size, ffn_hidden_size)
        self.constants = ConstantExperts(kinds.num_constant, hidden_size) if kinds.num_constant else None

    def forward(self, x_TD: Tensor, previous_logits_TE: Tensor | None, *, recompute: bool = False) -> MoEOutput:
        """Apply the layer to the tokens of one micro batch.

        recompute: the experts' activations are computed again in the backward pass. The routing is not: it is an
        input of what is recomputed, so a token cannot be routed anew and nothing is counted twice.
        """
        routing = self.router(x_TD, previous_logits_TE)
        plan = plan_dispatch(
            expert_N=routing.expert_N,
            probability_N=routing.gate_N,
            num_experts=self.kinds.total,
            num_ffn=self.kinds.num_ffn,
            capacity_E=self.settings.seats(len(x_TD)) if self.settings.seats and self.training else None,
            drop_policy=self.settings.drop_policy,
        )
        inputs = (x_TD, routing.gate_N, routing.token_N, routing.expert_N, plan)
        if recompute and torch.is_grad_enabled():
            output_TD = checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            output_TD = self.compute(*inputs)
        loss = balance_loss(
            probability_TE=routing.probability_TE,
            wanted_E=plan.wanted_E,
            num_ffn=self.kinds.num_ffn,
            tau=self.settings.tau,
        )
        return MoEOutput(output_TD, routing.logits_TE, loss, plan.wanted_E, plan.kept_E)

    def compute(
        self, x_TD: Tensor, gate_N: Tensor, token_N: Tensor, expert_N: Tensor, plan: DispatchPlan
    ) -> Tensor:
        """Steps 3 and 4 on a routing that is already decided: the output for x_TD."""
        rows_token_R = token_N[plan.order_R]
        parcel = self.exchange.send(x_TD.index_select(0, rows_token_R), plan.ffn_counts)
        output_TD = self._zero_computation(x_TD, gate_N * plan.kept_N, token_N, expert_N)
        rows_QD, counts = parcel.receive()
        result_RD = parcel.give_back(self.experts(rows_QD, counts))
        gate_R1 = gate_N[plan.order_R].unsqueeze(-1)
        return output_TD.index_add(0, rows_token_R, (gate_R1 * result_RD).to(x_TD.dtype))

    def _zero_computation(self, x_TD: Tensor, gate_N: Tensor, token_N: Tensor, expert_N: Tensor) -> Tensor:
        if not self.kinds.num_copy and not self.kinds.num_constant:
            return torch.zeros_like(x_TD)
        ranges = self.kinds.slices()
        gate_TE = gate_N.new_zeros(len(x_TD), self.kinds.total).index_put((token_N, expert_N), gate_N)
        return zero_computation_output(
            x_TD,
            copy_gate_T=gate_TE[:, ranges["copy"]].sum(dim=-1),
            constant_gate_TJ=gate_TE[:, ranges["constant"]],
            constants=self.constants,
        )
