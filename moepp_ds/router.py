"""The router: which experts a token asks for, and with what weight.

1. logits   G_1 = W x;  G_j = W_j x + Wg_j G_{j-1}   (MoE++, eq 6: the logits travel, earlier residuals included)
            or W2 tanh(W1 x) in place of W x, as the released MoE++ model has it
2. scores   p = softmax(G) over experts of all kinds   (eq 1); before it G may be brought to a fixed standard deviation
3. choice   the K highest scores (eq 1), or, best first, experts while those before hold less than a share t of the
            probability (XMoE, arXiv 2403.18926); a bias of the controller counts here and nowhere else
4. weight   the score (eq 1), or its share of the scores of all experts chosen, or of those that compute something
            (AdaMoE, arXiv 2406.13233)

Routing is a list of assignments, token by token, not a rectangle: nothing behind the router assumes that two tokens
chose equally many experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moepp_ds.keyed import keyed_generator
from moepp_ds.products import wide_linear

Combine = Literal["softmax", "renormalize_selected", "renormalize_computing"]

HIDDEN_PER_EXPERT = 8
"""Hidden features of a two-layer router for each expert: the released MoE++ model's number."""


@dataclass(frozen=True)
class Routing:
    """What the router decided. N assignments, ordered by token, best choice first.

    logits_TE travel to the next MoE layer; scored_TE are those behind the scores, the same unless they are brought to
    a fixed standard deviation. probability_TE: the scores. All fp32 (fp64 for fp64 input) and differentiable, and so
    is gate_N, the combine weights.
    token_N, expert_N, rank_N: int64; rank 0 is a token's best choice. probability_N: its score, without a gradient.
    """

    logits_TE: Tensor
    scored_TE: Tensor
    probability_TE: Tensor
    token_N: Tensor
    expert_N: Tensor
    rank_N: Tensor
    gate_N: Tensor
    probability_N: Tensor


@dataclass(frozen=True)
class RouterSettings:
    """The choices of a router that are not sizes; the recipe explains each under the same name.

    Exactly one of top_k and threshold is given. num_zero: how many of the last experts are zero experts.
    """

    top_k: int | None
    threshold: float | None = None
    num_layers: int = 1
    logit_std: float | None = None
    combine: Combine = "softmax"
    combine_scale: float = 1.0
    num_zero: int = 0


class Router(nn.Module):
    """Scores all experts for every token and chooses (MoE++ eq 1 and 6, XMoE section 3).

    `has_residual` is False in the first MoE layer: it has no earlier logits, and a parameter that never gets a
    gradient would stall DeepSpeed's reduction.
    """

    def __init__(self, hidden_size: int, num_experts: int, settings: RouterSettings, *, has_residual: bool) -> None:
        super().__init__()
        if (settings.top_k is None) == (settings.threshold is None):
            raise ValueError(f"top_k {settings.top_k}, threshold {settings.threshold}: give exactly one of the two")
        self.settings = settings
        if settings.num_layers == 1:
            self.weight_ED = nn.Parameter(torch.empty(num_experts, hidden_size))
        else:
            self.hidden_XD = nn.Parameter(torch.empty(HIDDEN_PER_EXPERT * num_experts, hidden_size))
            self.weight_EX = nn.Parameter(torch.empty(num_experts, HIDDEN_PER_EXPERT * num_experts))
        self.residual_EE = nn.Parameter(torch.empty(num_experts, num_experts)) if has_residual else None

    def forward(
        self,
        x_TD: Tensor,
        previous_logits_TE: Tensor | None,
        *,
        bias_E: Tensor | None = None,
        noise_TD: Tensor | None = None,
    ) -> Routing:
        """Route x_TD. `previous_logits_TE`: the logits of the MoE layer before, None in the first.

        bias_E: added to the scores for the choice alone. noise_TD: the input is multiplied by it, see `jitter`.
        All of it runs in fp32 at least: in bf16 the softmax of 20 experts has near-ties by the thousand. The master
        weight is fp32 in ZeRO's optimizer; the bf16 copy is widened here.
        """
        logits_TE = self._logits(x_TD if noise_TD is None else x_TD * noise_TD, previous_logits_TE)
        scored_TE = logits_TE
        if self.settings.logit_std is not None:
            scored_TE = logits_TE / logits_TE.std(dim=-1, keepdim=True) * self.settings.logit_std
        probability_TE = torch.softmax(scored_TE, dim=-1)
        # By logits, not scores: where softmax underflows to 0 the order is lost.
        preference_TE = scored_TE if bias_E is None else probability_TE + bias_E
        expert_TM, taken_TM = self._choose(preference_TE.detach(), probability_TE.detach())
        gate_TM = self._weigh(scored_TE, probability_TE, expert_TM, taken_TM)
        token_T, rank_M = (torch.arange(n, device=x_TD.device) for n in expert_TM.shape)
        token_N, expert_N, rank_N, gate_N, probability_N = _listed(
            taken_TM,
            token_T.unsqueeze(-1).expand_as(expert_TM),
            expert_TM,
            rank_M.expand_as(expert_TM),
            gate_TM,
            probability_TE.detach().gather(-1, expert_TM),
        )
        return Routing(
            logits_TE=logits_TE,
            scored_TE=scored_TE,
            probability_TE=probability_TE,
            token_N=token_N,
            expert_N=expert_N,
            rank_N=rank_N,
            gate_N=gate_N,
            probability_N=probability_N,
        )

    def _logits(self, x_TD: Tensor, previous_logits_TE: Tensor | None) -> Tensor:
        if self.settings.num_layers == 1:
            logits_TE = wide_linear(x_TD, self.weight_ED)
        else:
            logits_TE = wide_linear(torch.tanh(wide_linear(x_TD, self.hidden_XD)), self.weight_EX)
        if self.residual_EE is None or previous_logits_TE is None:
            return logits_TE
        if previous_logits_TE.shape != logits_TE.shape:
            raise ValueError(
                f"logits of shape {list(previous_logits_TE.shape)} come from the MoE layer before, this one makes "
                f"{list(logits_TE.shape)}; a gating residual needs as many experts in every MoE layer"
            )
        return logits_TE + wide_linear(previous_logits_TE, self.residual_EE)

    def _choose(self, preference_TE: Tensor, probability_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Experts best first, and which of them are taken; None where it is all of them."""
        # Not topk, which leaves open which of equal scores it takes: the lower index comes first, on every device.
        expert_TE = torch.argsort(preference_TE, dim=-1, descending=True, stable=True)
        if self.settings.top_k is not None:
            return expert_TE[:, : self.settings.top_k], None
        assert self.settings.threshold is not None
        if self.settings.threshold >= 1:  # not left to the rounding of a sum of probabilities
            return expert_TE, torch.ones_like(expert_TE, dtype=torch.bool)
        sorted_TE = probability_TE.gather(-1, expert_TE)
        mass_before_TE = nn.functional.pad(sorted_TE.cumsum(dim=-1)[:, :-1], (1, 0))
        taken_TE = mass_before_TE < self.settings.threshold
        taken_TE[:, 0] = True
        return expert_TE, taken_TE

    def _weigh(
        self, scored_TE: Tensor, probability_TE: Tensor, expert_TM: Tensor, taken_TM: Tensor | None
    ) -> Tensor:
        """Combine weights. Renormalising is a softmax over the logits that count: no sum of scores can underflow."""
        settings = self.settings
        if settings.combine == "softmax":
            gate_TM = probability_TE.gather(-1, expert_TM)
        else:
            counts_TM = torch.ones_like(expert_TM, dtype=torch.bool) if taken_TM is None else taken_TM
            if settings.combine == "renormalize_computing":
                counts_TM = counts_TM & (expert_TM < scored_TE.shape[-1] - settings.num_zero)
            # A finite floor, not -inf: where nothing counts the softmax is even instead of nan, and times 0.
            lowest = torch.finfo(scored_TE.dtype).min
            gate_TM = torch.softmax(scored_TE.gather(-1, expert_TM).masked_fill(~counts_TM, lowest), dim=-1) * counts_TM
        return gate_TM if settings.combine_scale == 1 else gate_TM * settings.combine_scale


def _listed(taken_TM: Tensor | None, *values_TM: Tensor) -> list[Tensor]:
    """Of each tensor the entries that are taken, token by token and best first; all of them if `taken_TM` is None."""
    if taken_TM is None:
        return [value_TM.flatten() for value_TM in values_TM]
    # index_select, not a mask or two indices: their backward pass sorts on a GPU.
    place_N = taken_TM.flatten().nonzero().squeeze(-1)
    return [value_TM.flatten().index_select(0, place_N) for value_TM in values_TM]


def jitter(
    shape_BSD: Sequence[int], amount: float, *, seed: int, first_row: int, layer: int, device: torch.device
) -> Tensor:
    """Factors from 1 - amount to 1 + amount for the tokens of consecutive rows, [B*S, D] in fp32.

    A row's factors follow from (seed, its number in the whole stream, MoE layer) alone, so they are the same on any
    number of ranks and after a resume.
    """
    num_rows, seq_len, width = shape_BSD
    noise_BSD = torch.empty(num_rows, seq_len, width, device=device)
    for number, row_SD in enumerate(noise_BSD):
        generator = keyed_generator(f"jitter/{seed}/{first_row + number}/{layer}", device)
        row_SD.uniform_(1 - amount, 1 + amount, generator=generator)
    return noise_BSD.flatten(0, 1)
