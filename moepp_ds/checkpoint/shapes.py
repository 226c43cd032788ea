"""The parameters that a recipe's model has, over all ranks: their names and shapes, without one of their numbers."""

from __future__ import annotations

import torch

from moepp_ds.config import ModelConfig
from moepp_ds.model import MoEPlusPlusModel


def global_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The shape of every parameter by global name, in the model's order; FFN experts stacked, all of them."""
    with torch.device("meta"):  # shapes without memory
        model = MoEPlusPlusModel(config, eos_id=0)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}
