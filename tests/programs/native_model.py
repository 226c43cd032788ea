"""Models as users of DeepSpeed write them, and which of its checkpoints the tests look at.

`hf`     named as the released model; each block has a deepspeed.moe.layer.MoE whose experts are SwiGLU modules, or
         (every second block of `every: 2`) a dense FFN
`apart`  the same, with gate and value of an expert in two matrices, as LLaMA's FFNs have them
`named`  the same under names of its own: only a file of names can say which is which
`ours`   our own model, whose experts DeepSpeed takes for dense parameters
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepp_ds.attention import CausalSelfAttention, RMSNorm
from moepp_ds.config import Recipe, load_recipe
from moepp_ds.keyed import keyed_generator
from moepp_ds.model import MoEPlusPlusModel

RECIPE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "golden.yaml"
VOCABULARY, WIDTH, INNER, EXPERTS, LAYERS = 512, 16, 20, 4, 2
TOKENS = (torch.arange(48) * 7 % VOCABULARY).view(2, 24)


@dataclass(frozen=True)
class Run:
    """One run of DeepSpeed.

    special: `tied` for one matrix as embedding and head, `frozen` for a norm that is not trained. max_group: parameters
    of one group of experts. switches: of DeepSpeed's zero_optimization.
    """

    name: str
    world: int
    style: str = "hf"
    expert_parallel: int = 1
    precision: str = "fp32"
    stage: int = 2
    every: int = 1
    special: str = ""
    max_group: int = 2**30
    switches: Mapping[str, Any] = field(default_factory=dict)


RUNS = [
    Run("ours-1", 1, "ours"),
    Run("ours-bf16-1", 1, "ours", precision="bf16", stage=1),
    Run("hf-1", 1),
    Run("named-1", 1, "named"),
    Run("zero0-1", 1, stage=0),
    Run("tied-1", 1, special="tied"),
    Run("frozen-bf16-1", 1, precision="bf16", special="frozen", stage=1),
    Run("elastic-1", 1, precision="bf16", switches={"elastic_checkpoint": True}),
    Run("ours-2", 2, "ours", switches={"round_robin_gradients": True}),
    Run("hf-2", 2, stage=1),
    Run("hf-2-ep2", 2, expert_parallel=2, every=2, max_group=1000),
    Run("apart-bf16-2-ep2", 2, "apart", expert_parallel=2, precision="bf16"),
    Run("elastic-2-ep2", 2, expert_parallel=2, switches={"elastic_checkpoint": True}),
    Run("hf-bf16-4-ep2", 4, expert_parallel=2, precision="bf16", switches={"round_robin_gradients": True}),
]


def runs_of_world(world: int) -> list[Run]:
    return [run for run in RUNS if run.world == world]


def settings(run: Run) -> list[str]:
    """What makes the golden recipe one of the same model."""
    sizes = {"num_layers": LAYERS, "hidden_size": WIDTH, "ffn_hidden_size": INNER, "moe.every": run.every}
    experts = {"num_ffn_experts": EXPERTS, "dropless": "true"}
    if run.style != "ours":
        experts |= {"num_zero": 0, "num_copy": 0, "num_constant": 0, "gating_residual": "false"}
        experts["combine"] = "renormalize_selected"
    return [
        *(f"model.{key}={value}" for key, value in sizes.items()),
        *(f"model.moe.{key}={value}" for key, value in experts.items()),
        f"deepspeed=ds_configs/zero2_{run.precision}.json",
        f"train.precision={run.precision}",
    ]


def recipe(run: Run) -> Recipe:
    """Our recipe of the same model."""
    return load_recipe(RECIPE, settings(run))


class SwiGLU(nn.Module):
    """An FFN whose first product is one matrix of gate and value, or two."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        *first, self.last = names
        self.first = tuple(first)
        for name in self.first:
            self.add_module(name, nn.Linear(WIDTH, 2 * INNER // len(self.first), bias=False))
        self.add_module(self.last, nn.Linear(INNER, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        together = torch.cat([self.get_submodule(name)(x) for name in self.first], dim=-1)
        gate, value = together.chunk(2, dim=-1)
        return self.get_submodule(self.last)(nn.functional.silu(gate) * value)


class _Routed(nn.Module):
    """What stands at `mlp` in a block of experts."""

    def __init__(self, run: Run, expert: SwiGLU) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(
            WIDTH,
            expert,
            num_experts=EXPERTS,
            ep_size=run.expert_parallel,
            k=2,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


class _Layer(nn.Module):
    def __init__(self, run: Run, number: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(WIDTH, 1e-6)
        self.self_attn = CausalSelfAttention(WIDTH, 2, 1e4)
        self.post_attention_layernorm = RMSNorm(WIDTH, 1e-6)
        if (number + 1) % run.every:
            self.mlp: nn.Module = SwiGLU(("gate_proj", "up_proj", "down_proj"))
        else:
            names = {"hf": ("up_proj", "down_proj"), "apart": ("gate_proj", "up_proj", "down_proj")}
            self.mlp = _Routed(run, SwiGLU(names.get(run.style, ("w1", "w3", "w2"))))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h))
        return h + self.mlp(self.post_attention_layernorm(h))


class NativeModel(nn.Module):
    """A causal language model around DeepSpeed's own layer of experts."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.model.layers = nn.ModuleList(_Layer(run, number) for number in range(LAYERS))
        self.model.norm = RMSNorm(WIDTH, 1e-6)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            h = layer(h)
        return self.lm_head(self.model.norm(h))


class Renamed(nn.Module):
    """The same under names of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        inner = NativeModel(run)
        self.wte, self.h, self.ln_f = inner.model.embed_tokens, inner.model.layers, inner.model.norm
        self.out = inner.lm_head

    forward = NativeModel.forward

    @property
    def model(self) -> Any:
        return _View(self.wte, self.h, self.ln_f)

    @property
    def lm_head(self) -> nn.Module:
        return self.out


@dataclass(frozen=True)
class _View:
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


@torch.no_grad()
def make_model(run: Run, *, expert_parallel_rank: int) -> nn.Module:
    """The model of a run; every number follows from its global name, so that no two experts are alike."""
    if run.style == "ours":
        model: Any = MoEPlusPlusModel(recipe(run).model, eos_id=0)
    else:
        model = (Renamed if run.style == "named" else NativeModel)(run)
    if run.special == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    if run.special == "frozen":
        model.model.norm.requires_grad_(False)
    for name, parameter in model.named_parameters():
        generator = keyed_generator(global_name(run, name, expert_parallel_rank))
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * values if "norm" in name or "ln_f" in name else 0.2 * values)
    return model


def global_name(run: Run, name: str, expert_parallel_rank: int) -> str:
    """A parameter's name with the number of its expert among all, not those of a rank."""
    first = expert_parallel_rank * EXPERTS // run.expert_parallel
    return re.sub(r"(?<=deepspeed_experts\.)\d+", lambda found: str(first + int(found[0])), name)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """[B, S, V]."""
    if isinstance(model, MoEPlusPlusModel):
        return nn.functional.linear(model.hidden(tokens)[0], model.head.weight)
    return model(tokens)


def loss_of(engine: Any, rows: Tensor) -> Tensor:
    """Cross-entropy of the next tokens; our model's own loss."""
    found = engine(rows)
    if isinstance(engine.module, MoEPlusPlusModel):
        return found.loss
    return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
