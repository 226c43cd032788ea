"""The MoE++ layer: heterogeneous experts behind one router (MoE++, arXiv 2410.07348).

XMoE's threshold router, AdaMoE's null experts and LongCat-Flash's budget are settings of the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp_ds.dispatch import DispatchPlan, DropPolicy, plan_dispatch
from moepp_ds.experts import FFNExperts
from moepp_ds.kinds import ExpertKinds
from moepp_ds.losses import Balance, balance_loss, normalized_balance, z_loss
from moepp_ds.products import linear
from moepp_ds.router import Router, RouterSettings, Routing
from moepp_ds.statistics import RoutingStatistics, first_choices, routing_statistics
from moepp_ds.token_rows import list_rows
from moepp_ds.zero_computation import ConstantExperts, zero_computation_output


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
class MoEReport:
    """What a layer returns beside its output; nothing is stored in the layer.

    logits_TE: fp32, for the next layer's gating residual. balance_loss, z_loss: scalars, not yet weighted.
    statistics: sums over the tokens. routing, plan: who went where.
    """

    logits_TE: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    statistics: RoutingStatistics
    routing: Routing
    plan: DispatchPlan


@dataclass(frozen=True)
class MoEOutput(MoEReport):
    """All that a layer returns. output_TD: in the dtype of x."""

    output_TD: Tensor

    def report(self) -> MoEReport:
        """The rest: who keeps this until the backward pass does not keep an activation as wide as the model with it."""
        return MoEReport(**{field.name: getattr(self, field.name) for field in fields(MoEReport)})


@dataclass(frozen=True)
class LayerSettings:
    """The choices of one MoE++ layer; the recipe explains each under the same name.

    seats: from a number of tokens, the seats of every expert in index order (eq 8); None is dropless.
    shared_ffn_hidden_size: inner width of all shared experts together, 0 for none.
    """

    router: RouterSettings
    tau: float
    seats: Callable[[int], Sequence[int]] | None
    drop_policy: DropPolicy = "probability"
    expert_input_scale: float = 1.0
    shared_ffn_hidden_size: int = 0
    shared_expert_gate: bool = False
    balance: Balance = "per_expert"
    balance_counts: Literal["all", "first"] = "all"


class MoELayer(nn.Module):
    """y_T = sum over the experts i that token t chose and that had a seat: g_ti E_i(x_t)   (MoE++, eq 1)

    1 route    G = W x + Wg G_before; p = softmax(G); the K best, or as many as hold a
               share of p                                                       (eq 1, 6; XMoE)
    2 seat     C_FFN and C_ZC seats per expert, or as many as asked for                   (eq 8)
    3 compute  FFN assignments travel to their experts' ranks; meanwhile zero, copy and
               constant experts are one scale of x and one small product, at home, and
               shared experts, which every token uses, one FFN               (eq 3, 4, 5)
    4 combine  results return, times g, and are added where they came from                (eq 1)
    5 report   losses and statistics are returned                                         (eq 7)

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
        self.router = Router(hidden_size, kinds.total, settings.router, has_residual=has_residual)
        self.experts = FFNExperts(num_local_experts or kinds.num_ffn, hidden_size, ffn_hidden_size)
        self.constants = ConstantExperts(kinds.num_constant, hidden_size) if kinds.num_constant else None
        shared = settings.shared_ffn_hidden_size
        self.shared = FFNExperts(1, hidden_size, shared) if shared else None
        self.shared_gate_D = nn.Parameter(torch.empty(hidden_size)) if settings.shared_expert_gate else None

    def forward(
        self,
        x_TD: Tensor,
        previous_logits_TE: Tensor | None,
        *,
        bias_E: Tensor | None = None,
        share_E: Tensor | None = None,
        noise_TD: Tensor | None = None,
        recompute: bool = False,
    ) -> MoEOutput:
        """Apply the layer to the tokens of one micro batch.

        bias_E: of the controller, for selection alone. share_E: load that the balance loss uses in place of this micro
        batch's. noise_TD: the router's input is multiplied by it.
        recompute: the experts' activations are computed again in the backward pass. The routing is not: it is an
        input of what is recomputed, so a token cannot be routed anew and nothing is counted twice.
        """
        routing = self.router(x_TD, previous_logits_TE, bias_E=bias_E, noise_TD=noise_TD)
        plan = plan_dispatch(
            expert_N=routing.expert_N,
            rank_N=routing.rank_N,
            probability_N=routing.probability_N,
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
        first_E = first_choices(routing, self.kinds.total)
        if share_E is None:
            count_E = plan.wanted_E if self.settings.balance_counts == "all" else first_E
            share_E = count_E.to(routing.probability_TE.dtype) / len(x_TD)
        loss, normalized = self._balance(routing.probability_TE, share_E)
        top_k = self.settings.router.top_k
        return MoEOutput(
            output_TD=output_TD,
            logits_TE=routing.logits_TE,
            balance_loss=loss,
            z_loss=z_loss(routing.scored_TE),
            statistics=routing_statistics(
                routing,
                plan,
                first_E,
                kinds=self.kinds,
                most_ffn=min(top_k or self.kinds.num_ffn, self.kinds.num_ffn),
                balance=normalized,
            ),
            routing=routing,
            plan=plan,
        )

    def compute(
        self, x_TD: Tensor, gate_N: Tensor, token_N: Tensor, expert_N: Tensor, plan: DispatchPlan
    ) -> Tensor:
        """Steps 3 and 4 on a routing that is already decided: the output for x_TD."""
        scale = self.settings.expert_input_scale
        input_TD = x_TD if scale == 1 else x_TD * scale
        rows = list_rows(token_N[plan.order_R], len(x_TD))
        parcel = self.exchange.send(rows.take(input_TD), plan.ffn_counts)
        output_TD = self._zero_computation(input_TD, gate_N * plan.kept_N, token_N, expert_N)
        if self.shared is not None:
            output_TD = output_TD + self._shared(x_TD)
        rows_QD, counts = parcel.receive()
        result_RD = parcel.give_back(self.experts(rows_QD, counts))
        return rows.combine(result_RD, gate_N[plan.order_R], output_TD)

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

    def _shared(self, x_TD: Tensor) -> Tensor:
        """The shared experts together: one FFN as wide as all of them, times a sigmoid of the token if gated."""
        assert self.shared is not None
        output_TD = self.shared(x_TD, (len(x_TD),))
        if self.shared_gate_D is None:
            return output_TD
        return torch.sigmoid(linear(x_TD, self.shared_gate_D.unsqueeze(0))) * output_TD

    def _balance(self, probability_TE: Tensor, share_E: Tensor) -> tuple[Tensor, Tensor]:
        """The balance loss, and beside its perfect value; where no loss is wanted the latter is eq 7's."""
        kinds, tau = self.kinds, self.settings.tau

        def value(balance: Balance) -> Tensor:
            return balance_loss(probability_TE=probability_TE, share_E=share_E, kinds=kinds, tau=tau, balance=balance)

        loss = value(self.settings.balance)
        shown = value("per_expert") if self.settings.balance == "none" else loss
        return loss, normalized_balance(shown.detach(), share_E=share_E, kinds=kinds, tau=tau)
