"""How a model of ours is called in a folder as Hugging Face publishes them, and back.

Two layouts, with the same tensor names (those of the released MoE++ model, extended where it has none):

* released  model type `MoE++`: the released model's own config keys, which can say one kind of layer only
* moepp     model type `moepp_ds`: LLaMA's keys, and the recipe's `moe` section under `moe`

Nothing here reads or writes a file.
"""

from __future__ import annotations

from moepp_ds.hf_names.configs import (
    MODEL_TYPES,
    Layout,
    changed_settings,
    layout_of,
    model_section,
    moepp_config,
    released_config,
    released_differences,
)
from moepp_ds.hf_names.tensors import Part, bias_names, parts, unused_tensors

__all__ = [
    "MODEL_TYPES",
    "Layout",
    "Part",
    "bias_names",
    "changed_settings",
    "layout_of",
    "model_section",
    "moepp_config",
    "parts",
    "released_config",
    "released_differences",
    "unused_tensors",
]
