"""Which part of which dense FFN becomes which expert.

copy, noise   expert e is the FFN of folder e mod n, whole
split         an FFN of width F is cut into F / W parts, W the width of an expert. The shared experts are the first S
              of them, the other R are the routed ones, over and over: expert e is part S + e mod R of folder
              (e // R) mod n. Without a width in the recipe, every part of every folder becomes one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moepp_ds.config import ModelConfig, MoEConfig
from moepp_ds.hf_folder import FolderError

Experts = Literal["copy", "noise", "split"]


@dataclass(frozen=True)
class Part:
    """Inner features start..stop of the FFN of one folder."""

    folder: int
    start: int
    stop: int


def split_width(moe: MoEConfig, ffn_hidden_size: int, folders: int) -> int:
    """The width of an expert when every part of every folder becomes one expert or belongs to the shared ones."""
    parts, rest = divmod(moe.num_ffn_experts, folders)
    parts += moe.num_shared_experts
    if rest or ffn_hidden_size % parts:
        raise FolderError(
            f"{folders} FFN of width {ffn_hidden_size} cannot be cut into model.moe.num_ffn_experts "
            f"{moe.num_ffn_experts} (and {moe.num_shared_experts} shared) equal experts; choose a number that divides "
            "it, or give model.moe.expert_ffn_hidden_size, a divisor of the width"
        )
    return ffn_hidden_size // parts


def routed_parts(model: ModelConfig, experts: Experts, folders: int) -> list[Part]:
    """The part of every routed expert, in index order; raises FolderError where the sizes do not go together."""
    moe, width = model.moe, model.expert_ffn_hidden_size
    if experts != "split":
        _check_whole(model, experts, folders)
        return [Part(e % folders, 0, width) for e in range(moe.num_ffn_experts)]
    parts, rest = divmod(model.ffn_hidden_size, width)
    shared, routed = moe.num_shared_experts, parts - moe.num_shared_experts
    if rest or routed < 1:
        raise FolderError(
            f"model.moe.expert_ffn_hidden_size {width} must divide the checkpoint's width {model.ffn_hidden_size} into "
            f"more parts than num_shared_experts {shared}"
        )
    if moe.num_ffn_experts % routed or moe.num_ffn_experts < routed * folders:
        raise FolderError(
            f"model.moe.num_ffn_experts {moe.num_ffn_experts} must be a multiple of {routed}, the parts of width "
            f"{width} in an FFN of width {model.ffn_hidden_size} beside {shared} shared ones, and {routed * folders} "
            f"or more for {folders} folders"
        )
    if shared and folders > 1:
        raise FolderError(f"num_shared_experts {shared} would come from one of {folders} folders; name one folder")
    cut = [Part(0, start, start + width) for start in range(shared * width, model.ffn_hidden_size, width)]
    experts_of = range(moe.num_ffn_experts)
    return [Part(e // routed % folders, cut[e % routed].start, cut[e % routed].stop) for e in experts_of]


def _check_whole(model: ModelConfig, experts: str, folders: int) -> None:
    moe = model.moe
    if model.expert_ffn_hidden_size != model.ffn_hidden_size:
        raise FolderError(
            f"model.moe.expert_ffn_hidden_size {model.expert_ffn_hidden_size} is not the checkpoint's width "
            f"{model.ffn_hidden_size}, and --experts {experts} takes whole FFNs; leave it out, or use --experts split"
        )
    if moe.num_shared_experts:
        raise FolderError(
            f"model.moe.num_shared_experts {moe.num_shared_experts}: --experts {experts} has no FFN for them; use 0, "
            "or --experts split, which gives them the first parts"
        )
    if moe.num_ffn_experts < folders:
        raise FolderError(f"model.moe.num_ffn_experts {moe.num_ffn_experts} leaves some of {folders} folders unused")
