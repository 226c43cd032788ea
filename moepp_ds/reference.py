"""The oracle: one MoE++ layer in float64, token by token and expert by expert, written from the equations.

It is as slow and plain as it can be, shares no code with the layer it judges, and is differentiable through
torch autograd, so values, losses and every gradient can be compared. Equation numbers are those of the MoE++
paper (arXiv 2410.07348). The algorithm:

1. route     logits_t = W x_t + Wg logits_t(previous layer)                              eq 6
             p_t = softmax(logits_t) over the experts of all kinds; the K largest logits choose
2. seat      an expert with more wishes than seats keeps as many as it has seats         eq 8
3. compute   FFN: down(silu(gate x) * up x); constant: a1 x + a2 v; copy: x; zero: 0     eq 3, 4, 5
4. combine   y_t = sum of p_te * expert_e(x_t) over the kept choices, not renormalised   eq 1
5. report    balance = sum_e eta_e f_e P_e, choices counted before any is dropped        eq 7

Axis letters: T tokens, D model width, F expert width, E experts (in weights of the FFN experts, E counts
those alone), J constant experts, 2 the pair [a1, a2]. Experts are numbered FFN first, then constant, copy,
zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceWeights:
    """The layer's weights, float64. Their shapes also say how many FFN and constant experts there are."""

    router_ED: Tensor  # W of eq 6, one row for each expert of any kind
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    constant_selector_J2D: Tensor  # W_c of eq 5
    constant_value_JD: Tensor  # v of eq 5
    residual_EE: Tensor | None = None  # Wg of eq 6; E counts all kinds


@dataclass(frozen=True)
class ReferenceSettings:
    """The choices of the layer that no weight's shape tells."""

    top_k: int = 2
    num_copy: int = 1
    num_zero: int = 1
    tau: float = 0.75  # eq 7: weight of a zero-computation expert; eq 8: seats of an FFN expert over its
    capacity_factor: float = 1.1  # gamma of eq 8
    dropless: bool = False
    capacity_counts: Literal["assignments", "tokens"] = "assignments"  # eq 8 times K, or as printed
    drop_policy: Literal["probability", "position"] = "probability"


@dataclass(frozen=True)
class ReferenceOutput:
    """What one pass gives. `routes[t]` lists token t's choices, best first, as (expert, kept)."""

    output_TD: Tensor
    logits_TE: Tensor
    probability_TE: Tensor
    balance_loss: Tensor  # scalar, not yet multiplied by its weight beta
    wanted_E: tuple[int, ...]  # choices per expert before drops
    kept_E: tuple[int, ...]  # choices per expert that got a seat
    routes: tuple[tuple[tuple[int, bool], ...], ...]


def reference_layer(
    x_TD: Tensor,
    previous_logits_TE: Tensor | None,
    weights: ReferenceWeights,
    settings: ReferenceSettings,
    routes: Sequence[Sequence[tuple[int, bool]]] | None = None,
) -> ReferenceOutput:
    """Run the layer on T >= 1 tokens.

    With `routes`, whom each token chose and who got a seat is taken from there (any number of choices per
    token), while gates and balance loss still come from this function's own probabilities: a fast,
    low-precision path is then judged on its own routes, and near-ties do not matter.

    Weights that no kept choice reaches may be missing from the autograd graph: ask `torch.autograd.grad` with
    `allow_unused=True, materialize_grads=True`.

    Raises ValueError for tensors that are not float64, router rows or top_k that do not fit the experts,
    previous logits without a residual map, and routes that do not fit.
    """
    kinds = expert_kinds(weights, settings)
    _check(x_TD, previous_logits_TE, weights, settings, routes, kinds)
    logits, probabilities = route(x_TD, previous_logits_TE, weights)
    if routes is None:
        chosen = [top_experts(logits_E.tolist(), settings.top_k) for logits_E in logits]
        routes = seat(chosen, [p_E.tolist() for p_E in probabilities], kinds, settings)

    outputs = []
    wanted, kept = [0] * len(kinds), [0] * len(kinds)
    for x_D, p_E, choices in zip(x_TD, probabilities, routes, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, has_seat in choices:
            wanted[expert] += 1
            if has_seat:
                kept[expert] += 1
                y_D = y_D + p_E[expert] * expert_output(expert, kinds, x_D, weights)
        outputs.append(y_D)

    return ReferenceOutput(
        output_TD=torch.stack(outputs),
        logits_TE=torch.stack(logits),
        probability_TE=torch.stack(probabilities),
        balance_loss=balance_loss(wanted, probabilities, kinds, settings.tau),
        wanted_E=tuple(wanted),
        kept_E=tuple(kept),
        routes=tuple(tuple((int(expert), bool(has)) for expert, has in choices) for choices in routes),
    )


def route(
    x_TD: Tensor, previous_logits_TE: Tensor | None, weights: ReferenceWeights
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and probabilities over the experts of all kinds, one tensor of E for each token."""
    logits, probabilities = [], []
    for t, x_D in enumerate(x_TD):
        logits_E = weights.router_ED @ x_D
        if previous_logits_TE is not None and weights.residual_EE is not None:
            logits_E = logits_E + weights.residual_EE @ previous_logits_TE[t]
        exp_E = torch.exp(logits_E - logits_E.detach().max())  # the shift cancels; it only keeps exp finite
        logits.append(logits_E)
        probabilities.append(exp_E / exp_E.sum())
    return logits, probabilities


def expert_kinds(weights: ReferenceWeights, settings: ReferenceSettings) -> list[str]:
    """The kind of every expert in index order, for example ["ffn", "ffn", "constant", "copy", "zero"]."""
    num_ffn, num_constant = len(weights.gate_EFD), len(weights.constant_value_JD)
    return (
        ["ffn"] * num_ffn
        + ["constant"] * num_constant
        + ["copy"] * settings.num_copy
        + ["zero"] * settings.num_zero
    )


def top_experts(logits_E: Sequence[float], top_k: int) -> list[int]:
    """The top_k experts of one token, largest logit first; of equal logits the lower index first."""
    return sorted(range(len(logits_E)), key=lambda expert: (-logits_E[expert], expert))[:top_k]


def capacity(kind: str, kinds: Sequence[str], num_tokens: int, settings: ReferenceSettings) -> int:
    """Seats of one expert of that kind, eq 8: rounded up, at least 1, at most one for each token.

    Settings are read as the decimals they were written as (1.1 is 11/10), so that a count which is exactly
    whole is not rounded up by a floating-point residue.
    """
    gamma, tau = Fraction(str(settings.capacity_factor)), Fraction(str(settings.tau))
    num_ffn = kinds.count("ffn")
    counted = num_tokens * (settings.top_k if settings.capacity_counts == "assignments" else 1)
    share = (tau if kind == "ffn" else 1) / (tau * num_ffn + len(kinds) - num_ffn)
    return min(num_tokens, max(1, math.ceil(gamma * share * counted)))


def seat(
    chosen: Sequence[Sequence[int]],
    probability_TE: Sequence[Sequence[float]],
    kinds: Sequence[str],
    settings: ReferenceSettings,
) -> list[list[tuple[int, bool]]]:
    """Decide for every choice of every token whether the expert keeps it."""
    seated: set[tuple[int, int]] = set()
    for expert, kind in enumerate(kinds):
        queue = [t for t in range(len(chosen)) if expert in chosen[t]]
        if settings.drop_policy == "probability":
            queue.sort(key=lambda t: (-probability_TE[t][expert], t))
        seats = len(queue) if settings.dropless else capacity(kind, kinds, len(chosen), settings)
        seated.update((t, expert) for t in queue[:seats])
    return [[(expert, (t, expert) in seated) for expert in experts] for t, experts in enumerate(chosen)]


def expert_output(expert: int, kinds: Sequence[str], x_D: Tensor, weights: ReferenceWeights) -> Tensor:
    """What one expert, of whatever kind, makes of one token."""
    if kinds[expert] == "ffn":
        gate_F, up_F = weights.gate_EFD[expert] @ x_D, weights.up_EFD[expert] @ x_D
        return weights.down_EDF[expert] @ (gate_F * torch.sigmoid(gate_F) * up_F)
    if kinds[expert] == "constant":
        j = expert - kinds.index("constant")
        score_2 = weights.constant_selector_J2D[j] @ x_D
        a1 = torch.sigmoid(score_2[0] - score_2[1])  # a softmax over two
        return a1 * x_D + (1 - a1) * weights.constant_value_JD[j]
    if kinds[expert] == "copy":
        return x_D
    return torch.zeros_like(x_D)


def balance_loss(
    wanted: Sequence[int], probabilities: Sequence[Tensor], kinds: Sequence[str], tau: float
) -> Tensor:
    """Eq 7, not multiplied by beta. The counts f are constants; the gradient goes through P alone."""
    num_tokens = len(probabilities)
    loss = probabilities[0].new_zeros(())
    for expert, kind in enumerate(kinds):
        eta = 1.0 if kind == "ffn" else tau
        f = wanted[expert] / num_tokens
        for p_E in probabilities:
            loss = loss + eta * f * p_E[expert] / num_tokens
    return loss


def _check(
    x_TD: Tensor,
    previous_logits_TE: Tensor | None,
    weights: ReferenceWeights,
    settings: ReferenceSettings,
    routes: Sequence[Sequence[tuple[int, bool]]] | None,
    kinds: Sequence[str],
) -> None:
    """Refuse input that would make the oracle judge something other than what was asked."""
    tensors = {"x_TD": x_TD, "previous_logits_TE": previous_logits_TE, **vars(weights)}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float64:
            raise ValueError(f"{name} is {tensor.dtype}, not torch.float64; pass {name}.double()")
    if len(weights.router_ED) != len(kinds):
        rows = len(weights.router_ED)
        raise ValueError(f"router_ED has {rows} rows for {len(kinds)} experts; it needs one row for each")
    if previous_logits_TE is not None and weights.residual_EE is None:
        raise ValueError("previous_logits_TE without weights.residual_EE: give both, or pass None")
    if not 1 <= settings.top_k <= len(kinds):
        raise ValueError(f"top_k {settings.top_k} is outside 1..{len(kinds)}, the number of experts")
    if routes is not None and len(routes) != len(x_TD):
        raise ValueError(f"{len(routes)} routes for {len(x_TD)} tokens; give each token one list of choices")
    for t, choices in enumerate(routes or ()):
        experts = [expert for expert, _ in choices]
        if len(set(experts)) != len(experts) or any(not 0 <= expert < len(kinds) for expert in experts):
            last = len(kinds) - 1
            raise ValueError(f"token {t} is routed to {experts}; they must differ, within 0..{last}")
