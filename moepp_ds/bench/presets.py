"""The layers of the paper's four models (MoE++, table 2), by name; launch/recipes has the same sizes."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_ds.kinds import ExpertKinds


@dataclass(frozen=True)
class LayerSizes:
    """One MoE++ layer: model width D, width F of an FFN expert, experts by kind, and choices of a token."""

    hidden_size: int
    ffn_hidden_size: int
    kinds: ExpertKinds
    top_k: int = 2


PRESETS = {
    "0.6b": LayerSizes(768, 2048, ExpertKinds(num_ffn=8, num_constant=2, num_copy=1, num_zero=1)),
    "1b": LayerSizes(768, 2048, ExpertKinds(num_ffn=16, num_constant=2, num_copy=1, num_zero=1)),
    "2b": LayerSizes(768, 2048, ExpertKinds(num_ffn=32, num_constant=6, num_copy=1, num_zero=1)),
    "7b": LayerSizes(1536, 4096, ExpertKinds(num_ffn=16, num_constant=2, num_copy=1, num_zero=1)),
}
