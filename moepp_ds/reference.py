"""The oracle: one mixture-of-experts layer in float64, token by token and expert by expert, written from the papers.

It is as slow and plain as it can be, shares no code with the layer it judges, and is differentiable through
torch autograd, so values, losses and every gradient can be compared. Equation numbers are those of the MoE++
paper (arXiv 2410.07348); XMoE is arXiv 2403.18926, AdaMoE arXiv 2406.13233, LongCat-Flash arXiv 2509.01322, and
balance between two groups arXiv 2605.18643. The algorithm:

1. score     logits_t = W x_t, or W2 tanh(W1 x_t), + Wg logits_t(previous layer); these travel on      eq 6
             scored_t = logits_t, or normalised to a given standard deviation over the experts
             p_t = softmax(scored_t) over the experts of all kinds
2. choose    best first by scored_t, or by p_t + bias (LongCat-Flash); the K best, or as many as it takes until
             those before hold the threshold (XMoE)
3. seat      an expert with more wishes than seats keeps as many as it has seats                       eq 8
4. compute   FFN: down(silu(gate x) * up x); constant: a1 x + a2 v; copy: x; zero: 0                   eq 3, 4, 5
5. combine   y_t = sum of weight_te expert_e(scale x_t) over the kept choices + shared experts of x_t  eq 1
6. report    balance = sum_e eta_e f_e P_e, choices counted before any is dropped                      eq 7
             z = mean over tokens of (log sum exp scored_t)^2

Axis letters: T tokens, D model width, F expert width, E experts (in weights of the FFN experts, E counts
those alone), J constant experts, X hidden features of a router, H numbers of FFN experts per token, 2 the pair
[a1, a2]. Experts are numbered FFN first, then constant, copy, zero.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceWeights:
    """The layer's weights, float64. Their shapes also say how many FFN, constant and shared experts there are."""

    router_ED: Tensor | None  # W of eq 6, one row for each expert of any kind; None with two layers
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    constant_selector_J2D: Tensor  # W_c of eq 5
    constant_value_JD: Tensor  # v of eq 5
    residual_EE: Tensor | None = None  # Wg of eq 6; E counts all kinds
    hidden_XD: Tensor | None = None  # W1 of a two-layer router
    router_EX: Tensor | None = None  # W2 of a two-layer router; E counts all kinds
    shared_gate_EFD: Tensor | None = None  # E counts the shared experts alone; several add up to one wide FFN
    shared_up_EFD: Tensor | None = None
    shared_down_EDF: Tensor | None = None
    shared_gate_D: Tensor | None = None  # the shared experts count sigmoid(this . x) times


@dataclass(frozen=True)
class ReferenceSettings:
    """The choices of the layer that no weight's shape tells, named as in a recipe.

    The four of capacity are not read with `dropless`, and may be None then.
    """

    top_k: int | None = 2  # None with a threshold
    threshold: float | None = None  # XMoE; None with top_k
    logit_std: float | None = None  # None leaves the logits as they are
    num_copy: int = 1
    num_zero: int = 1
    combine: Literal["softmax", "renormalize_selected", "renormalize_computing"] = "softmax"
    combine_scale: float = 1.0
    expert_input_scale: float = 1.0
    tau: float = 0.75  # eq 7: weight of a zero-computation expert; eq 8: seats of an FFN expert over its
    dropless: bool = False
    capacity_factor: float | None = 1.1  # gamma of eq 8
    capacity_counts: Literal["assignments", "tokens"] | None = "assignments"  # eq 8 times K, or as printed
    min_capacity: int | None = 1
    drop_policy: Literal["probability", "position", "rank"] | None = "probability"
    balance: Literal["per_expert", "per_group", "null_averaged", "none"] = "per_expert"
    balance_counts: Literal["all", "first"] = "all"


@dataclass(frozen=True)
class ReferenceOutput:
    """What one pass gives. `routes[t]` lists token t's choices, best first, as (expert, kept)."""

    output_TD: Tensor
    logits_TE: Tensor  # before normalisation: what the next layer's residual reads
    probability_TE: Tensor
    balance_loss: Tensor  # scalar, not yet multiplied by its weight beta
    normalized_balance: Tensor  # scalar without gradient; 1 is perfect balance
    z_loss: Tensor  # scalar, not yet multiplied by its weight
    wanted_E: tuple[int, ...]  # choices per expert before drops
    kept_E: tuple[int, ...]  # choices per expert that got a seat
    first_E: tuple[int, ...]  # first choices per expert before drops
    histogram_H: tuple[int, ...]  # tokens that 0, 1, 2, ... FFN experts computed, shared ones not counted
    entropy: Tensor  # scalars without gradient, summed over tokens: entropy of p in nats, the highest p, the second
    top1: Tensor
    top2: Tensor
    routes: tuple[tuple[tuple[int, bool], ...], ...]


def reference_layer(
    x_TD: Tensor,
    previous_logits_TE: Tensor | None,
    weights: ReferenceWeights,
    settings: ReferenceSettings,
    routes: Sequence[Sequence[tuple[int, bool]]] | None = None,
    *,
    bias_E: Tensor | None = None,
    share_E: Tensor | None = None,
    noise_TD: Tensor | None = None,
) -> ReferenceOutput:
    """Run the layer on T >= 1 tokens.

    With `routes`, whom each token chose, best first, and who got a seat is taken from there (any number of choices
    per token), while gates and losses still come from this function's own probabilities: a fast, low-precision path
    is then judged on its own routes, and near-ties do not matter. `bias_E` is added for selection alone, `share_E`
    takes the place of this batch's load f in the balance loss, and `noise_TD` multiplies what the router sees.

    Weights that no kept choice reaches may be missing from the autograd graph: ask `torch.autograd.grad` with
    `allow_unused=True, materialize_grads=True`.

    Raises ValueError for tensors that are not float64, weights or settings that contradict each other, and routes
    that do not fit.
    """
    kinds = expert_kinds(weights, settings)
    tensors = {"x_TD": x_TD, "previous_logits_TE": previous_logits_TE, "bias_E": bias_E, "share_E": share_E}
    _check({**tensors, "noise_TD": noise_TD, **vars(weights)}, settings, routes, len(kinds))
    router_input_TD = x_TD if noise_TD is None else x_TD * noise_TD
    logits, scored = score(router_input_TD, previous_logits_TE, weights, settings.logit_std)
    probabilities, log_sums = zip(*(softmax(scored_E) for scored_E in scored))
    if routes is None:
        chosen = [choose(z_E, p_E, bias_E, settings) for z_E, p_E in zip(scored, probabilities, strict=True)]
        routes = seat(chosen, [p_E.tolist() for p_E in probabilities], kinds, settings)

    outputs, computed = [], []
    wanted, kept, first = ([0] * len(kinds) for _ in range(3))
    for x_D, p_E, choices in zip(x_TD, probabilities, routes, strict=True):
        weight_of = combine_weights([expert for expert, _ in choices], p_E, kinds, settings)
        y_D = shared_output(x_D, weights)
        for rank, (expert, has_seat) in enumerate(choices):
            wanted[expert] += 1
            first[expert] += rank == 0
            if has_seat:
                kept[expert] += 1
                scaled_D = settings.expert_input_scale * x_D
                y_D = y_D + weight_of[expert] * expert_output(expert, kinds, scaled_D, weights)
        outputs.append(y_D)
        computed.append(sum(has_seat and kinds[expert] == "ffn" for expert, has_seat in choices))

    counted = first if settings.balance_counts == "first" else wanted
    load_E = [count / len(x_TD) for count in counted] if share_E is None else share_E.tolist()
    tau, num_ffn, rule = settings.tau, kinds.count("ffn"), settings.balance
    reported = balance_loss(load_E, probabilities, kinds, tau, "per_expert" if rule == "none" else rule).detach()
    most = max([min(settings.top_k or num_ffn, num_ffn), *computed])  # more only by imposed routes
    best_first = [sorted(p_E.tolist(), reverse=True) + [0.0] for p_E in probabilities]  # 0: if there is no second
    return ReferenceOutput(
        output_TD=torch.stack(outputs),
        logits_TE=torch.stack(logits),
        probability_TE=torch.stack(probabilities),
        balance_loss=balance_loss(load_E, probabilities, kinds, tau, rule),
        # Over the loss under perfect balance, when both f and P are as tau : 1 for FFN : others.
        normalized_balance=reported * (num_ffn + (len(kinds) - num_ffn) / tau) / sum(load_E),
        z_loss=(torch.stack(log_sums) ** 2).mean(),
        wanted_E=tuple(wanted),
        kept_E=tuple(kept),
        first_E=tuple(first),
        histogram_H=tuple(computed.count(h) for h in range(most + 1)),
        entropy=x_TD.new_tensor(sum(-p * math.log(p) for p_E in best_first for p in p_E if p > 0)),
        top1=x_TD.new_tensor(sum(p_E[0] for p_E in best_first)),
        top2=x_TD.new_tensor(sum(p_E[1] for p_E in best_first)),
        routes=tuple(tuple((int(expert), bool(has)) for expert, has in choices) for choices in routes),
    )


def score(
    x_TD: Tensor, previous_logits_TE: Tensor | None, weights: ReferenceWeights, logit_std: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits over the experts of all kinds (eq 6), and what they are scored by: one tensor of E for each token."""
    logits, scored = [], []
    for t, x_D in enumerate(x_TD):
        if weights.hidden_XD is not None and weights.router_EX is not None:
            logits_E = weights.router_EX @ torch.tanh(weights.hidden_XD @ x_D)
        else:
            assert weights.router_ED is not None  # else refused by _check
            logits_E = weights.router_ED @ x_D
        if previous_logits_TE is not None and weights.residual_EE is not None:
            logits_E = logits_E + weights.residual_EE @ previous_logits_TE[t]
        logits.append(logits_E)
        if logit_std is not None:
            variance = ((logits_E - logits_E.mean()) ** 2).sum() / (len(logits_E) - 1)
            logits_E = logits_E / variance.sqrt() * logit_std
        scored.append(logits_E)
    return logits, scored


def softmax(scored_E: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of one token, and the log of the sum of exponentials that they are divided by."""
    shift = scored_E.detach().max()  # cancels; it only keeps exp finite
    exp_E = torch.exp(scored_E - shift)
    return exp_E / exp_E.sum(), shift + torch.log(exp_E.sum())


def expert_kinds(weights: ReferenceWeights, settings: ReferenceSettings) -> list[str]:
    """The kind of every expert in index order, for example ["ffn", "ffn", "constant", "copy", "zero"]."""
    num_ffn, num_constant = len(weights.gate_EFD), len(weights.constant_value_JD)
    num_copy, num_zero = settings.num_copy, settings.num_zero
    return ["ffn"] * num_ffn + ["constant"] * num_constant + ["copy"] * num_copy + ["zero"] * num_zero


def choose(scored_E: Tensor, p_E: Tensor, bias_E: Tensor | None, settings: ReferenceSettings) -> list[int]:
    """The experts of one token, best first; of equal scores the lower index first.

    With a bias the score is p + bias (LongCat-Flash). A threshold takes an expert while the unbiased mass before
    it is below the threshold, the first always, and at 1 all (XMoE, adaptive router).
    """
    score_E = (scored_E if bias_E is None else p_E + bias_E).tolist()
    best_first = sorted(range(len(score_E)), key=lambda expert: (-score_E[expert], expert))
    if settings.threshold is None:
        return best_first[: settings.top_k]
    taken: list[int] = []
    for expert in best_first:
        mass_before = sum(p_E[other].item() for other in taken)
        if not taken or settings.threshold >= 1 or mass_before < settings.threshold:
            taken.append(expert)
    return taken


def capacity(kind: str, kinds: Sequence[str], num_tokens: int, settings: ReferenceSettings) -> int:
    """Seats of one expert of that kind, eq 8: rounded up, at least min_capacity, at most one for each token.

    Settings are read as the decimals they were written as (1.1 is 11/10), so that a count which is exactly
    whole is not rounded up by a floating-point residue.
    """
    gamma, tau = Fraction(str(settings.capacity_factor)), Fraction(str(settings.tau))
    num_ffn = kinds.count("ffn")
    counted = num_tokens * (settings.top_k or 1 if settings.capacity_counts == "assignments" else 1)
    share = (tau if kind == "ffn" else 1) / (tau * num_ffn + len(kinds) - num_ffn)
    return min(num_tokens, max(settings.min_capacity or 1, math.ceil(gamma * share * counted)))


def seat(
    chosen: Sequence[Sequence[int]],
    probability_TE: Sequence[Sequence[float]],
    kinds: Sequence[str],
    settings: ReferenceSettings,
) -> list[list[tuple[int, bool]]]:
    """Decide for every choice of every token whether the expert keeps it.

    By rank (XMoE), a token that names the expert as an earlier choice comes first, then the higher probability.
    """
    seated: set[tuple[int, int]] = set()
    for expert, kind in enumerate(kinds):
        queue = [t for t in range(len(chosen)) if expert in chosen[t]]
        if settings.drop_policy == "probability":
            queue.sort(key=lambda t: (-probability_TE[t][expert], t))
        if settings.drop_policy == "rank":
            queue.sort(key=lambda t: (chosen[t].index(expert), -probability_TE[t][expert], t))
        seats = len(queue) if settings.dropless else capacity(kind, kinds, len(chosen), settings)
        seated.update((t, expert) for t in queue[:seats])
    return [[(expert, (t, expert) in seated) for expert in experts] for t, experts in enumerate(chosen)]


def combine_weights(
    experts: Sequence[int], p_E: Tensor, kinds: Sequence[str], settings: ReferenceSettings
) -> dict[int, Tensor]:
    """The weight of each choice of one token; a drop later on does not change it.

    Softmax is eq 1. Renormalised over the computing ones (AdaMoE), zero experts weigh 0, and a token that chose
    those alone gives 0. All are multiplied by LongCat-Flash's routed scaling factor.
    """
    if settings.combine == "softmax":
        return {expert: settings.combine_scale * p_E[expert] for expert in experts}
    all_count = settings.combine == "renormalize_selected"
    counted = [expert for expert in experts if all_count or kinds[expert] != "zero"]
    weight_of = {expert: torch.zeros_like(p_E[expert]) for expert in experts}
    for expert in counted:
        weight_of[expert] = settings.combine_scale * p_E[expert] / p_E[counted].sum()
    return weight_of


def ffn(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """SwiGLU without biases."""
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F * torch.sigmoid(gate_F) * (up_FD @ x_D))


def expert_output(expert: int, kinds: Sequence[str], x_D: Tensor, weights: ReferenceWeights) -> Tensor:
    """What one expert, of whatever kind, makes of one token."""
    if kinds[expert] == "ffn":
        return ffn(x_D, weights.gate_EFD[expert], weights.up_EFD[expert], weights.down_EDF[expert])
    if kinds[expert] == "constant":
        j = expert - kinds.index("constant")
        score_2 = weights.constant_selector_J2D[j] @ x_D
        a1 = torch.sigmoid(score_2[0] - score_2[1])  # a softmax over two
        return a1 * x_D + (1 - a1) * weights.constant_value_JD[j]
    if kinds[expert] == "copy":
        return x_D
    return torch.zeros_like(x_D)


def shared_output(x_D: Tensor, weights: ReferenceWeights) -> Tensor:
    """What the experts that every token uses make of it; 0 without any."""
    shared = (weights.shared_gate_EFD, weights.shared_up_EFD, weights.shared_down_EDF)
    y_D = torch.zeros_like(x_D)
    for gate_FD, up_FD, down_DF in zip(*(stack for stack in shared if stack is not None), strict=True):
        y_D = y_D + ffn(x_D, gate_FD, up_FD, down_DF)
    return y_D if weights.shared_gate_D is None else torch.sigmoid(weights.shared_gate_D @ x_D) * y_D


def balance_loss(
    load_E: Sequence[float], probabilities: Sequence[Tensor], kinds: Sequence[str], tau: float, balance: str
) -> Tensor:
    """Eq 7, not multiplied by beta. The load f is constant; the gradient goes through P alone.

    Experts of one pool share the mean of their loads: all FFN and all others (per_group, arXiv 2605.18643), or the
    zero experts (null_averaged, AdaMoE).
    """
    pools: list[Hashable] = list(range(len(kinds)))
    if balance == "per_group":
        pools = [kind == "ffn" for kind in kinds]
    if balance == "null_averaged":
        pools = ["zero" if kind == "zero" else expert for expert, kind in enumerate(kinds)]
    loss = probabilities[0].new_zeros(())
    for expert, kind in enumerate(kinds if balance != "none" else ()):
        eta = 1.0 if kind == "ffn" else tau
        pool = [f for f, other in zip(load_E, pools, strict=True) if other == pools[expert]]
        for p_E in probabilities:
            loss = loss + eta * sum(pool) / len(pool) * p_E[expert] / len(probabilities)
    return loss


def _check(
    tensors: dict[str, Tensor | None], settings: ReferenceSettings, routes: Sequence | None, num_experts: int
) -> None:
    """Refuse input that would make the oracle judge something other than what was asked."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float64:
            raise ValueError(f"{name} is {tensor.dtype}, not torch.float64; pass {name}.double()")
        has_a_row_each = name in ("router_ED", "router_EX", "bias_E", "share_E")
        if tensor is not None and has_a_row_each and len(tensor) != num_experts:
            raise ValueError(f"{name} has {len(tensor)} rows for {num_experts} experts; it needs one row for each")
    given = {name for name, tensor in tensors.items() if tensor is not None}
    if given & {"router_ED", "hidden_XD", "router_EX"} not in ({"router_ED"}, {"hidden_XD", "router_EX"}):
        raise ValueError("a router is router_ED, or hidden_XD and router_EX; give one of the two")
    if "previous_logits_TE" in given and "residual_EE" not in given:
        raise ValueError("previous_logits_TE without weights.residual_EE: give both, or pass None")
    if (settings.top_k is None) == (settings.threshold is None):
        raise ValueError(f"top_k {settings.top_k} with threshold {settings.threshold}; give one and None for the other")
    if settings.top_k is not None and not 1 <= settings.top_k <= num_experts:
        raise ValueError(f"top_k {settings.top_k} is outside 1..{num_experts}, the number of experts")
    if settings.top_k is None and not settings.dropless and settings.capacity_counts == "assignments":
        raise ValueError("capacity_counts assignments with a threshold: there is no top_k to count; use tokens")
    seating = (settings.capacity_factor, settings.capacity_counts, settings.min_capacity, settings.drop_policy)
    if not settings.dropless and None in seating:
        raise ValueError(f"capacity settings {seating} have a None, but seats are limited; give all, or dropless")
    x_TD = tensors["x_TD"]
    if routes is not None and x_TD is not None and len(routes) != len(x_TD):
        raise ValueError(f"{len(routes)} routes for {len(x_TD)} tokens; give each token one list of choices")
    for t, choices in enumerate(routes or ()):
        experts = [expert for expert, _ in choices]
        if len(set(experts)) != len(experts) or any(not 0 <= expert < num_experts for expert in experts):
            last = num_experts - 1
            raise ValueError(f"token {t} is routed to {experts}; they must differ, within 0..{last}")
