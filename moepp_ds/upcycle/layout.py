"""The tensors of a published checkpoint: their names and shapes, and which parameter of ours each of them is.

FFN experts come in three forms, with F the width of one:
    mlp.experts.{e}.gate_proj, up_proj [F, D], down_proj [D, F]           OLMoE, Qwen
    block_sparse_moe.experts.{e}.w1, w3 [F, D], w2 [D, F]                 Mixtral
    mlp.experts.gate_up_proj [E, 2F, D], down_proj [E, D, F]              all of them as transformers 5 holds them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moepp_ds.config import ModelConfig
from moepp_ds.hf_folder import FolderError, tensor_problems
from moepp_ds.upcycle.source import Checkpoint


@dataclass(frozen=True)
class Matrix:
    """Rows start..stop of a stored matrix, or of matrix `expert` of a stored stack of them."""

    tensor: str
    start: int
    stop: int
    expert: int | None = None


@dataclass(frozen=True)
class StoredFFN:
    """One SwiGLU network: gate and value [F, D], down [D, F]."""

    gate: Matrix
    value: Matrix
    down: Matrix


@dataclass
class Layout:
    """What a checkpoint must hold, and what it is for.

    shapes: of every tensor. plain: our parameter -> the tensor that it is. routers: MoE layer -> the rows of its FFN
    experts. dense, shared: layer -> network. experts: MoE layer -> networks.
    """

    shapes: dict[str, list[int]] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    routers: dict[int, str] = field(default_factory=dict)
    dense: dict[int, StoredFFN] = field(default_factory=dict)
    shared: dict[int, StoredFFN] = field(default_factory=dict)
    experts: dict[int, list[StoredFFN]] = field(default_factory=dict)

    def add(self, ours: str, theirs: str, shape: Sequence[int]) -> None:
        self.plain[ours], self.shapes[theirs] = theirs, list(shape)

    def ffn(self, names: tuple[str, str, str], width: int, hidden_size: int) -> StoredFFN:
        gate, value, down = names
        self.shapes |= {gate: [width, hidden_size], value: [width, hidden_size], down: [hidden_size, width]}
        return StoredFFN(Matrix(gate, 0, width), Matrix(value, 0, width), Matrix(down, 0, hidden_size))


def checkpoint_layout(checkpoint: Checkpoint, model: ModelConfig) -> Layout:
    """The layout of a checkpoint whose sizes are the recipe's, but for experts if it has none."""
    layout = Layout()
    d, tied = model.hidden_size, checkpoint.tied and "lm_head.weight" not in checkpoint.folder.shapes
    layout.add("embedding.weight", "model.embed_tokens.weight", [model.vocab_size, d])
    layout.add("norm.weight", "model.norm.weight", [d])
    layout.add("head.weight", "model.embed_tokens.weight" if tied else "lm_head.weight", [model.vocab_size, d])
    for i in range(model.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        layout.add(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", [d])
        layout.add(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", [d])
        _add_attention(layout, f"{ours}.attention", f"{theirs}.self_attn", model)
        if checkpoint.family.moe and model.is_moe(i):
            _add_moe(layout, i, checkpoint, model)
        else:
            names = [f"{theirs}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
            layout.dense[i] = layout.ffn((names[0], names[1], names[2]), model.ffn_hidden_size, d)
    return layout


def _add_attention(layout: Layout, ours: str, theirs: str, model: ModelConfig) -> None:
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for name, width in (("q", query), ("k", key), ("v", key)):
        layout.add(f"{ours}.{name}_proj.weight", f"{theirs}.{name}_proj.weight", [width, model.hidden_size])
        if model.qkv_bias:
            layout.add(f"{ours}.{name}_proj.bias", f"{theirs}.{name}_proj.bias", [width])
        if model.qk_norm != "none" and name != "v":
            normed = width if model.qk_norm == "full" else model.head_dim
            layout.add(f"{ours}.{name}_norm.weight", f"{theirs}.{name}_norm.weight", [normed])
    layout.add(f"{ours}.o_proj.weight", f"{theirs}.o_proj.weight", [model.hidden_size, query])


def _add_moe(layout: Layout, i: int, checkpoint: Checkpoint, model: ModelConfig) -> None:
    moe, d, width = model.moe, model.hidden_size, model.expert_ffn_hidden_size
    theirs = f"model.layers.{i}.mlp"
    stacked = f"{theirs}.experts.gate_up_proj" in checkpoint.folder.shapes
    if stacked:
        layout.experts[i] = _stacked_experts(layout, theirs, moe.num_ffn_experts, width, d)
    else:
        mixtral = checkpoint.model_type == "mixtral"
        theirs = f"model.layers.{i}.block_sparse_moe" if mixtral else theirs
        kinds = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        layout.experts[i] = []
        for e in range(moe.num_ffn_experts):
            gate, value, down = (f"{theirs}.experts.{e}.{kind}.weight" for kind in kinds)
            layout.experts[i].append(layout.ffn((gate, value, down), width, d))
    layout.routers[i] = f"{theirs}.gate.weight"
    layout.shapes[layout.routers[i]] = [moe.num_ffn_experts, d]
    if moe.num_shared_experts:
        gate, value, down = (f"{theirs}.shared_expert.{kind}_proj.weight" for kind in ("gate", "up", "down"))
        layout.shared[i] = layout.ffn((gate, value, down), moe.num_shared_experts * width, d)
        layout.add(f"blocks.{i}.moe.shared_gate_D", f"{theirs}.shared_expert_gate.weight", [1, d])


def _stacked_experts(layout: Layout, theirs: str, num_experts: int, width: int, hidden_size: int) -> list[StoredFFN]:
    both, down = f"{theirs}.experts.gate_up_proj", f"{theirs}.experts.down_proj"
    layout.shapes |= {both: [num_experts, 2 * width, hidden_size], down: [num_experts, hidden_size, width]}
    return [
        StoredFFN(Matrix(both, 0, width, e), Matrix(both, width, 2 * width, e), Matrix(down, 0, hidden_size, e))
        for e in range(num_experts)
    ]


def check_tensors(checkpoints: Sequence[tuple[Checkpoint, Layout]]) -> None:
    """Raise FolderError that lists every missing, extra, misshapen or non-float tensor of all folders."""
    lines = []
    for checkpoint, layout in checkpoints:
        problems = list(tensor_problems(checkpoint.folder, layout.shapes))
        if problems:
            heading = f"{checkpoint.folder.path} does not hold the tensors that its config.json asks for:"
            lines += [heading, *(f"  {problem}" for problem in problems)]
    if lines:
        raise FolderError("\n".join(lines))
