"""Routing that is forced: every token's experts are given, and each kind gets exactly the share that tau implies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp_ds.config import RecipeError
from moepp_ds.dispatch import DispatchPlan, plan_dispatch
from moepp_ds.kinds import ExpertKinds


@dataclass(frozen=True)
class Routes:
    """What `MoELayer.compute` is given beside x: N = T*K assignments, ordered by token."""

    gate_N: Tensor
    token_N: Tensor
    expert_N: Tensor
    plan: DispatchPlan


def ideal_speedup(kinds: ExpertKinds, tau: float) -> float:
    """Vanilla assignments to FFN experts for each of MoE++: (tau N_FFN + N_ZC) / (tau N_FFN)   (MoE++, section 3.3)."""
    return (tau * kinds.num_ffn + kinds.num_zero_computation) / (tau * kinds.num_ffn)


def balanced_counts(kinds: ExpertKinds, tau: float, assignments: int) -> list[int]:
    """Assignments per expert: an FFN expert gets tau of what a zero-computation expert gets, to a rounding."""
    ffn = round(assignments / ideal_speedup(kinds, tau)) if kinds.num_zero_computation else assignments
    return [*_evenly(ffn, kinds.num_ffn), *_evenly(assignments - ffn, kinds.num_zero_computation)]


def _evenly(total: int, parts: int) -> list[int]:
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def balanced_choices(kinds: ExpertKinds, *, tau: float, tokens: int, top_k: int, seed: int = 0) -> Tensor:
    """Tokens at random over the experts, each at `top_k` different ones, in balance: [T, K] int64, on the host.

    Raises RecipeError where an expert would need a token twice.
    """
    counts = balanced_counts(kinds, tau, tokens * top_k)
    if max(counts) > tokens:
        raise RecipeError(
            f"tau {tau:g} gives one expert {max(counts)} of {tokens} tokens: with {kinds.num_zero_computation} "
            f"zero-computation experts and top {top_k} it is too small; use a larger tau"
        )
    generator = torch.Generator().manual_seed(seed)
    # Experts in order meet the tokens in turn, K times around: no expert has more than T, so none meets a token twice.
    expert_KT = torch.repeat_interleave(torch.arange(kinds.total), torch.tensor(counts)).view(top_k, tokens)
    return expert_KT[:, torch.randperm(tokens, generator=generator)].t().contiguous()


def forced_routes(
    kinds: ExpertKinds, *, tau: float, tokens: int, top_k: int, device: torch.device, seed: int = 0
) -> Routes:
    """`balanced_choices` with combine weights at random; dropless."""
    expert_TK = balanced_choices(kinds, tau=tau, tokens=tokens, top_k=top_k, seed=seed)
    expert_N = expert_TK.flatten().to(device)
    gate_N = torch.rand(tokens * top_k, generator=torch.Generator().manual_seed(seed)).to(device)
    plan = plan_dispatch(
        expert_N=expert_N,
        rank_N=torch.arange(top_k, device=device).repeat(tokens),
        probability_N=gate_N,
        num_experts=kinds.total,
        num_ffn=kinds.num_ffn,
        capacity_E=None,
    )
    return Routes(gate_N, torch.arange(tokens, device=device).repeat_interleave(top_k), expert_N, plan)


def steered_tokens(
    choices: Sequence[Tensor], num_experts: Sequence[int], *, hidden_size: int, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Tokens x_TD, and for each of the choices [T, K] a router [E, D] by which x chooses just these, best first.

    Every expert of every router has a direction of its own, at right angles to all others. A token is noise without
    these directions, plus its experts': its logits are K + 3 for the first choice, one less for each after, 0 for the
    rest. Raises RecipeError where there are more experts than directions.
    """
    total = sum(num_experts)
    if total > hidden_size:
        raise RecipeError(f"{total} experts need as many directions, but tokens have {hidden_size}; use a wider model")
    tokens, top_k = choices[0].shape
    generator = torch.Generator().manual_seed(seed)
    direction_DE, _ = torch.linalg.qr(torch.randn(hidden_size, total, generator=generator))
    x_TD = torch.randn(tokens, hidden_size, generator=generator)
    x_TD -= x_TD @ direction_DE @ direction_DE.t()
    routers = [part_DE.t().contiguous() for part_DE in direction_DE.split(list(num_experts), dim=1)]
    for expert_TK, weight_ED in zip(choices, routers):
        for rank, expert_T in enumerate(expert_TK.unbind(1)):
            x_TD += (top_k + 3 - rank) * weight_ED[expert_T]
    return x_TD, routers
