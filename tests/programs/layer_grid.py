"""One MoE layer as a recipe makes it, and a grid of recipes in which every two choices meet.

Programs of several ranks and tests of one process both read it, so it imports nothing of the test tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from moepp_ds.config import ModelConfig, MoEConfig
from moepp_ds.model import MoEPlusPlusModel
from moepp_ds.moe_layer import MoELayer
from moepp_ds.router import jitter

D = 8
"""Width of a token: rows of 8 numbers are multiples of 16 bytes in fp32 and in bf16, which grouped_mm needs."""

# -- a layer and its inputs ------------------------------------------------------------------------------------


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_layer(
    config: MoEConfig,
    *,
    ffn_hidden_size: int,
    has_residual: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    factory: Callable[..., MoELayer] = MoELayer,
) -> MoELayer:
    """A layer in training mode, made from the recipe by the model, with random weights for a lively routing.

    has_residual: it is a later MoE layer than the first.
    """
    sizes = {"num_heads": 1, "hidden_size": D, "ffn_hidden_size": ffn_hidden_size, "vocab_size": 2}
    recipe = ModelConfig.model_validate({**sizes, "num_layers": 1 + has_residual, "moe": config})
    layer = MoEPlusPlusModel(recipe, eos_id=0, layer_factory=factory).get_submodule(f"blocks.{int(has_residual)}.moe")
    assert isinstance(layer, MoELayer)
    layer.to(device, dtype)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        # A second router layer adds up 8 features for each expert; a softmax of two that are far apart loses digits.
        std = 0.2 if name.endswith(("weight_EX", "selector_J2D")) else 0.5
        parameter.data = std * random(*parameter.shape, seed=100 * seed + number, dtype=dtype, device=device)
    return layer


# -- the choices -----------------------------------------------------------------------------------------------

FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "choice": {
        "top 2": {"top_k": 2},
        "top 1": {"top_k": 1},
        "top 3": {"top_k": 3},
        "threshold 0.3": {"router.threshold": 0.3},
        "threshold 0.7": {"router.threshold": 0.7},
        "threshold 1": {"router.threshold": 1.0},
    },
    "experts": {
        "all kinds": {"num_constant": 2},
        "FFN only": {"num_zero": 0, "num_copy": 0, "num_constant": 0},
        "zero": {"num_copy": 0, "num_constant": 0},
        "copy": {"num_zero": 0, "num_constant": 0},
        "constants": {"num_zero": 0, "num_copy": 0, "num_constant": 3},
        "several of each": {"num_ffn_experts": 6, "num_zero": 3, "num_copy": 2, "num_constant": 2},
    },
    "balance": {name: {"balance": name} for name in ("per_expert", "per_group", "null_averaged", "none")},
    "drop policy": {
        "by rule": {},
        **{name: {"drop_policy": name} for name in ("probability", "position", "rank")},
    },
    "seats": {
        "tokens": {"capacity_counts": "tokens", "capacity_factor": 1.5},
        "assignments": {"capacity_counts": "assignments", "capacity_factor": 0.8},
        "dropless": {"dropless": True},
    },
    "combine": {name: {"combine": name} for name in ("softmax", "renormalize_selected", "renormalize_computing")},
    "shared": {
        "none": {},
        "two": {"num_shared_experts": 2},
        "gated": {"num_shared_experts": 1, "shared_expert_gate": True},
    },
    "tau": {str(tau): {"tau": tau} for tau in (0.75, 0.2, 1.0)},
    "fewest seats": {"by rule": {}, "4": {"min_capacity": 4}},
    "router layers": {"1": {}, "2": {"router.num_layers": 2}},
    "logit std": {"free": {}, "1.5": {"router.logit_std": 1.5}},
    "residual": {"yes": {}, "no": {"gating_residual": False}},
    "bias": {"no": {}, "yes": {}},
    "jitter": {"no": {}, "0.3": {"router.jitter": 0.3}},
    "expert width": {"16": {}, "8": {"expert_ffn_hidden_size": 8}},
    "combine scale": {"1": {}, "2.5": {"combine_scale": 2.5}},
    "input scale": {"1": {}, "2": {"expert_input_scale": 2.0}},
    "counts": {name: {"balance_counts": name} for name in ("all", "first")},
    "scope": {name: {"balance_scope": name} for name in ("micro_batch", "global_batch")},
    "z-loss": {"no": {}, "0.5": {"router.z_loss_weight": 0.5}},
    "recompute": {"no": {}, "yes": {}},
}
"""By choice, its values and what each writes into the recipe. The first value goes with every value of the others.

A bias and recomputation are no part of a layer's recipe: they are given to its forward pass.
"""

Combination = Mapping[str, str]
"""A value for each choice."""


def moe_config(combination: Combination) -> MoEConfig:
    """The recipe's section; raises pydantic's ValidationError for choices that contradict each other."""
    section: dict[str, Any] = {"num_ffn_experts": 4, "router": {}}
    for factor, value in combination.items():
        for key, setting in FACTORS[factor][value].items():
            place, _, name = key.rpartition(".")
            (section[place] if place else section)[name] = setting
    return MoEConfig.model_validate(section)


def is_allowed(combination: Combination) -> bool:
    """Whether the recipe takes these choices, what is not named being the first value of its choice."""
    first = {factor: next(iter(values)) for factor, values in FACTORS.items()}
    try:
        moe_config({**first, **combination})
    except ValidationError:
        return False
    return True


# -- every two choices meet ------------------------------------------------------------------------------------

Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """Every value of every choice with every value of every later one."""
    return [
        ((one, a), (other, b))
        for one, other in combinations(factors, 2)
        for a, b in product(factors[one], factors[other])
    ]


def cover(
    factors: Mapping[str, Sequence[str]], allowed: Callable[[Combination], bool], *, times: int
) -> list[dict[str, str]]:
    """Combinations in which each allowed pair of values occurs `times` times or more; greedy, always the same.

    A combination starts from the first pair that is still missing. Then, choice by choice, it takes the value that
    adds most missing pairs with those it has; of equal ones the value that was used least.
    """
    missing = dict.fromkeys((pair for pair in pairs_of(factors) if allowed(dict(pair))), times)
    used = {(factor, value): 0 for factor, values in factors.items() for value in values}
    found = []
    while missing:
        made = dict(next(iter(missing)))
        for factor in factors:
            if factor not in made:
                fits = [value for value in factors[factor] if allowed({**made, factor: value})]
                gains = {value: len(missing.keys() & set(_with(made, factor, value, factors))) for value in fits}
                made[factor] = max(fits, key=lambda value: (gains[value], -used[factor, value]))
        made = {factor: made[factor] for factor in factors}
        for place in made.items():
            used[place] += 1
        for pair in missing.keys() & set(combinations(made.items(), 2)):
            missing[pair] -= 1
            if not missing[pair]:
                del missing[pair]
        found.append(made)
    return found


def _with(made: Combination, factor: str, value: str, factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """The pairs that a value makes with what a combination has, each in the order of the choices."""
    order = list(factors)
    places = [((other, b), (factor, value)) for other, b in made.items()]
    return [(a, b) if order.index(a[0]) < order.index(b[0]) else (b, a) for a, b in places]


CHOICES = {factor: list(values) for factor, values in FACTORS.items()}
COMBINATIONS = cover(CHOICES, is_allowed, times=2)
"""Every two values meet at least twice, in company that differs."""


# -- one combination at work -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A combination with all that a forward pass of its layer takes. T tokens: two rows of a stream."""

    config: MoEConfig
    x_TD: Tensor
    previous_TE: Tensor
    told: dict[str, Tensor | None]
    """bias_E, share_E, noise_TD: fp32, each None where the combination has no such thing."""
    recompute: bool
    output_grad_TD: Tensor
    logits_grad_TE: Tensor


def make_case(number: int, *, micro_batch: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """Inputs for a combination; other ones for another micro batch, and of another length."""
    combination, seed = COMBINATIONS[number], 1000 * (1 + number) + 10 * micro_batch
    config = moe_config(combination)
    seq_len, experts = 4 + (number + micro_batch) % 3, config.num_experts
    wide = torch.promote_types(dtype, torch.float32)

    def drawn(*shape: int, at: int, dtype: torch.dtype = dtype) -> Tensor:
        return random(*shape, seed=seed + at, dtype=dtype, device=device)

    # Both micro batches are told the same biases and load, which belong to an update.
    bias_E = 0.2 * random(experts, seed=number, dtype=torch.float32, device=device)
    bias_E[config.num_ffn_experts :] = 0
    share_E = random(experts, seed=number + 1, dtype=torch.float32, device=device).abs()
    noise_TD = jitter(
        (2, seq_len, D),
        config.router.jitter,
        seed=number,
        first_row=2 * micro_batch,
        layer=1,
        device=torch.device(device),
    )
    return Case(
        config=config,
        x_TD=drawn(2 * seq_len, D, at=0).requires_grad_(),
        previous_TE=drawn(2 * seq_len, experts, at=1, dtype=wide).requires_grad_(),
        told={
            "bias_E": bias_E if combination["bias"] == "yes" else None,
            "share_E": share_E if config.balance_scope == "global_batch" else None,
            "noise_TD": noise_TD if config.router.jitter else None,
        },
        recompute=combination["recompute"] == "yes",
        output_grad_TD=drawn(2 * seq_len, D, at=2),
        logits_grad_TE=drawn(2 * seq_len, experts, at=3, dtype=wide),
    )


def total_loss(case: Case, output_TD: Tensor, logits_TE: Tensor, balance: Tensor, z: Tensor) -> Tensor:
    """Everything that a layer returns and that has a gradient, each in a direction of its own."""
    loss = (output_TD * case.output_grad_TD).sum() + (logits_TE * case.logits_grad_TE).sum() + 3 * balance
    return loss + case.config.router.z_loss_weight * z
