"""Which of our parameters is which tensor of a Hugging Face folder, range by range.

One expert's matrix is a range of our stacked parameter. Matrices of experts are stored transposed there, gate rows
above value rows; all else is stored as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from moepp_ds.config import ModelConfig
from moepp_ds.hf_names.configs import Layout

ROUTER_HIDDEN = 8
"""Hidden features of a two-layer router for each expert."""


@dataclass(frozen=True)
class Part:
    """A range of one of our parameters, and the tensors that hold its numbers.

    parameter: global name. start: the range's first element in the flattened parameter. shape: the range as we have
    it. tensors: by name, with their shapes.
    form: `same` elements in the same order, `transposed`, or `halves`: two tensors, the transposes of the left and the
    right half of our columns.
    """

    parameter: str
    start: int
    shape: tuple[int, ...]
    tensors: Mapping[str, tuple[int, ...]]
    form: Literal["same", "transposed", "halves"] = "same"

    @property
    def stop(self) -> int:
        """One past the range's last element."""
        return self.start + prod(self.shape)

    def to_hf(self, values_N: Tensor) -> dict[str, Tensor]:
        """The tensors that hold our numbers, given flattened; views where that can be."""
        values = values_N.view(self.shape)
        if self.form == "halves":
            return {name: half.t() for name, half in zip(self.tensors, values.chunk(2, dim=1))}
        ((name, shape),) = self.tensors.items()
        return {name: values.t() if self.form == "transposed" else values.view(shape)}

    def from_hf(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our numbers, in our shape, from the tensors by name."""
        found = [tensors[name] for name in self.tensors]
        if self.form == "halves":
            return torch.cat([half.t() for half in found], dim=1)
        return found[0].t() if self.form == "transposed" else found[0].reshape(self.shape)


def parts(model: ModelConfig) -> Iterator[Part]:
    """Every element of every parameter exactly once."""
    width = model.hidden_size
    yield _same("embedding.weight", "model.embed_tokens.weight", model.vocab_size, width)
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield _same(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight", width)
        yield from _attention(model, f"{ours}attention.", f"{theirs}self_attn.")
        yield _same(f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight", width)
        if model.is_moe(layer):
            yield from _moe(model, f"{ours}moe.", f"{theirs}mlp.moe.", first=layer < model.moe.every)
        else:
            yield from _dense(model, f"{ours}ffn.", f"{theirs}mlp.")
    yield _same("norm.weight", "model.norm.weight", width)
    yield _same("head.weight", "lm_head.weight", model.vocab_size, width)


def bias_names(model: ModelConfig) -> list[str]:
    """Tensors of the controller's selection biases, [E] in fp32 each, one for each MoE layer; none without one."""
    if model.moe.controller is None:
        return []
    return [f"model.layers.{i}.mlp.moe.gate.bias" for i in range(model.num_layers) if model.is_moe(i)]


def unused_tensors(model: ModelConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Tensors that a layout has and no computation uses: the released one maps logits before its first layer too."""
    if layout != "released":
        return {}
    return {"model.layers.0.mlp.moe.gate.gate_map.weight": (model.moe.num_experts,) * 2}


def _same(ours: str, theirs: str, *shape: int) -> Part:
    return Part(ours, 0, shape, {theirs: shape})


def _attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[Part]:
    query, shared = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for name, width in (("q", query), ("k", shared), ("v", shared)):
        yield _same(f"{ours}{name}_proj.weight", f"{theirs}{name}_proj.weight", width, model.hidden_size)
        if model.qkv_bias:
            yield _same(f"{ours}{name}_proj.bias", f"{theirs}{name}_proj.bias", width)
        if model.qk_norm != "none" and name != "v":
            normed = width if model.qk_norm == "full" else model.head_dim
            yield _same(f"{ours}{name}_norm.weight", f"{theirs}{name}_norm.weight", normed)
    yield _same(f"{ours}o_proj.weight", f"{theirs}o_proj.weight", model.hidden_size, query)


def _dense(model: ModelConfig, ours: str, theirs: str) -> Iterator[Part]:
    width, inner = model.hidden_size, model.ffn_hidden_size
    halves = {f"{theirs}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    yield Part(f"{ours}gate_up_EDG", 0, (width, 2 * inner), halves, "halves")
    yield _transposed(f"{ours}down_EFD", 0, f"{theirs}down_proj.weight", inner, width)


def _moe(model: ModelConfig, ours: str, theirs: str, *, first: bool) -> Iterator[Part]:
    moe, width, experts = model.moe, model.hidden_size, model.moe.num_experts
    router, gate = f"{ours}router.", f"{theirs}gate."
    if moe.router.num_layers == 1:
        yield _same(f"{router}weight_ED", f"{gate}wg.weight", experts, width)
    else:
        yield _same(f"{router}hidden_XD", f"{gate}wg.0.weight", ROUTER_HIDDEN * experts, width)
        yield _same(f"{router}weight_EX", f"{gate}wg.2.weight", experts, ROUTER_HIDDEN * experts)
    if moe.gating_residual and not first:
        yield _same(f"{router}residual_EE", f"{gate}gate_map.weight", experts, experts)
    for e in range(moe.num_ffn_experts):
        yield from _ffn(f"{ours}experts.", f"{theirs}experts.experts.{e}.", e, width, model.expert_ffn_hidden_size)
    for j in range(moe.num_constant):
        constant = f"{theirs}experts.experts.{moe.num_ffn_experts + j}."
        selector = {f"{constant}wg.weight": (2, width)}
        yield Part(f"{ours}constants.selector_J2D", j * 2 * width, (2, width), selector)
        yield Part(f"{ours}constants.value_JD", j * width, (width,), {f"{constant}constant": (width,)})
    if moe.num_shared_experts:
        inner = moe.num_shared_experts * model.expert_ffn_hidden_size
        yield from _ffn(f"{ours}shared.", f"{theirs}shared.", 0, width, inner)
    if moe.shared_expert_gate:
        yield Part(f"{ours}shared_gate_D", 0, (width,), {f"{theirs}shared_gate.weight": (1, width)})


def _ffn(ours: str, theirs: str, expert: int, width: int, inner: int) -> Iterator[Part]:
    """Expert number `expert` of a stack: gate and value stay side by side in one tensor."""
    size = width * inner
    yield _transposed(f"{ours}gate_up_EDG", expert * 2 * size, f"{theirs}up_proj.weight", width, 2 * inner)
    yield _transposed(f"{ours}down_EFD", expert * size, f"{theirs}down_proj.weight", inner, width)


def _transposed(ours: str, start: int, theirs: str, rows: int, columns: int) -> Part:
    return Part(ours, start, (rows, columns), {theirs: (columns, rows)}, "transposed")
