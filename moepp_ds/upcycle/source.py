"""A published checkpoint as this project sees it: the model section that its config.json asks for, and what it has that
this model has not.

config.json is read by transformers' own config classes, so that a key it lacks has the value that transformers gives.

| model_type     | attention                     | FFN                                              |
|----------------|-------------------------------|--------------------------------------------------|
| llama, mistral | plain                         | dense                                            |
| qwen2          | biases of q, k and v          | dense                                            |
| qwen3          | norm of q and k in each head  | dense                                            |
| mixtral        | plain                         | MoE, weights renormalized over the chosen        |
| olmoe          | norm of q and k over all heads| MoE                                              |
| qwen2_moe      | biases of q, k and v          | MoE, gated shared expert, dense layers in between|
| qwen3_moe      | norm of q and k in each head  | MoE, dense layers in between                     |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CONFIG_MAPPING

from moepp_ds.hf_folder import FolderError, HFFolder


@dataclass(frozen=True)
class Family:
    """What a model_type says beside the keys of its config.json."""

    qk_norm: Literal["none", "full", "per_head"] = "none"
    qkv_bias: bool | None = False
    """None: config.json says it."""
    moe: bool = False
    renormalizes: bool | None = None
    """Whether chosen experts' weights are renormalized; None: norm_topk_prob says it."""
    expert_width: Literal["intermediate_size", "moe_intermediate_size"] = "intermediate_size"
    shared_expert: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="per_head"),
    "mixtral": Family(moe=True, renormalizes=True),
    "olmoe": Family(qk_norm="full", moe=True),
    "qwen2_moe": Family(qkv_bias=None, moe=True, expert_width="moe_intermediate_size", shared_expert=True),
    "qwen3_moe": Family(qk_norm="per_head", moe=True, expert_width="moe_intermediate_size"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder.

    section: the recipe's model section that it asks for; with a key moe when it is a MoE.
    window: tokens that attention sees where it is limited, else None. context: longest text it was made for.
    tied: whether its head is its embedding.
    """

    folder: HFFolder
    model_type: str
    section: dict[str, Any]
    window: int | None
    context: int | None
    tied: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder and read its config; raises FolderError that lists everything this model cannot do."""
    folder = HFFolder(path)
    model_type = folder.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FolderError(
            f"{path}: model_type {model_type!r} cannot be upcycled; these can: {', '.join(FAMILIES)}"
            + ("; use moepp import for MoE++" if str(model_type).lower().startswith("moe") else "")
        )
    family = FAMILIES[model_type]
    _check_present(folder, family)
    config = _with_defaults(folder, model_type)
    problems = list(_unsupported(config, folder.config, family))
    if problems:
        raise FolderError("\n  ".join([f"{path} has what this model has not:", *problems]))
    return Checkpoint(
        folder=folder,
        model_type=model_type,
        section=_section(config, family),
        window=_window(config),
        context=getattr(config, "max_position_embeddings", None),
        tied=bool(config.tie_word_embeddings),
    )


def _check_present(folder: HFFolder, family: Family) -> None:
    """Sizes must be said, since transformers' defaults for them are those of its example model, and be of this folder.

    The latter keeps a config from asking for a list of more tensors than memory holds.
    """
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    needed += ["num_experts", "num_experts_per_tok", family.expert_width] if family.moe else []
    needed += ["shared_expert_intermediate_size"] if family.shared_expert else []
    known = dict(folder.config)
    known["num_experts"] = known.get("num_experts", known.get("num_local_experts"))
    longest = max(len(folder.shapes), *(size for shape in folder.shapes.values() for size in shape), 0)
    wrong = [
        f"{key} is {known.get(key)!r}"
        for key in dict.fromkeys(needed)
        if not isinstance(known.get(key), int) or isinstance(known[key], bool) or not 1 <= known[key] <= longest
    ]
    if wrong:
        raise FolderError(
            f"{folder.path}/config.json: {'; '.join(wrong)}; these must be whole numbers from 1 to {longest}, the "
            "longest that the weights have; fetch the folder again"
        )


def _with_defaults(folder: HFFolder, model_type: str) -> Any:
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(folder.config))
    except Exception as error:  # whatever transformers finds wrong with a value
        lines = " ".join(str(error).split())
        raise FolderError(f"{folder.path}/config.json is not a config of {model_type}: {lines}") from error


def _unsupported(config: Any, raw: dict[str, Any], family: Family) -> Iterator[str]:
    if raw.get("quantization_config"):
        yield "quantization_config: its weights are quantized; use the folder with bf16 or fp32 weights"
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act}: experts here are SwiGLU, which is silu"
    rope = config.rope_parameters or {}
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    rest = {key: value for key, value in rest.items() if (key, value) != ("partial_rotary_factor", 1.0)}
    if rope.get("rope_type", "default") != "default" or rest:
        kind = rope.get("rope_type", "default")
        yield f"rope_scaling {kind} ({', '.join(rest) or 'no more keys'}): rotary positions here are not scaled"
    theta = rope.get("rope_theta")
    if theta is not None and (not isinstance(theta, (int, float)) or isinstance(theta, bool)):
        yield f"rope_theta {theta!r}: it must be a number"
    if getattr(config, "attention_bias", False):
        yield "attention_bias true: it puts a bias on o_proj, and only q, k and v can have one here (qkv_bias)"
    if getattr(config, "mlp_bias", False):
        yield "mlp_bias true: experts here have no biases"
    if getattr(config, "clip_qkv", None) is not None:
        yield f"clip_qkv {config.clip_qkv}: queries, keys and values are not clipped here"
    other = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if other:
        yield f"layer_types {', '.join(other)}: attention here is full attention"
    if family.moe and _every(config) is None:
        yield (
            f"decoder_sparse_step {config.decoder_sparse_step} with mlp_only_layers {config.mlp_only_layers}: "
            "here layer i (from 0) is MoE when (i + 1) is a multiple of moe.every"
        )
    if family.shared_expert and config.shared_expert_intermediate_size % config.moe_intermediate_size:
        yield (
            f"shared_expert_intermediate_size {config.shared_expert_intermediate_size}: shared experts here are a "
            f"whole number of experts, so a multiple of moe_intermediate_size {config.moe_intermediate_size}"
        )


def _every(config: Any) -> int | None:
    """The `every` that gives just the MoE layers of a config; None if there is none."""
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    layers = range(config.num_hidden_layers)
    moe = [i for i in layers if step > 0 and (i + 1) % step == 0 and i not in dense]
    every = moe[0] + 1 if moe else 1
    return every if moe == [i for i in layers if (i + 1) % every == 0] else None


def _window(config: Any) -> int | None:
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    limited = isinstance(window, int) and window > 0 and (not types or "sliding_attention" in types)
    return window if limited else None


def _section(config: Any, family: Family) -> dict[str, Any]:
    heads = config.num_attention_heads
    section = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "qkv_bias": config.qkv_bias if family.qkv_bias is None else family.qkv_bias,
        "qk_norm": family.qk_norm,
        "ffn_hidden_size": config.intermediate_size,
        "norm_eps": float(config.rms_norm_eps),
        "rope_theta": float((config.rope_parameters or {}).get("rope_theta") or 1e4),
        "init_std": float(config.initializer_range),
    }
    if family.moe:
        section["moe"] = _moe_section(config, family)
    return section


def _moe_section(config: Any, family: Family) -> dict[str, Any]:
    width = getattr(config, family.expert_width)
    renormalizes = config.norm_topk_prob if family.renormalizes is None else family.renormalizes
    return {
        "every": _every(config),
        "num_ffn_experts": config.num_experts,
        "num_shared_experts": config.shared_expert_intermediate_size // width if family.shared_expert else 0,
        "shared_expert_gate": family.shared_expert,
        "expert_ffn_hidden_size": None if width == config.intermediate_size else width,
        "top_k": config.num_experts_per_tok,
        "combine": "renormalize_selected" if renormalizes else "softmax",
    }
