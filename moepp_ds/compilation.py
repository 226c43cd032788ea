"""`train.compile`: torch.compile where it helps, the norms and the attention of every block.

What stands there between two products passes over memory several times in a row; compiled, once. MoE layers are made of
operators that are fused by hand and have sizes that the routing decides: they are left as they are.
"""

from __future__ import annotations

import os
import warnings

import torch

from moepp_ds.config import RecipeError
from moepp_ds.model import Block, MoEPlusPlusModel


def compile_attention(model: MoEPlusPlusModel) -> None:
    """Have these parts compiled at their first use; parameters keep their names, results change by rounding alone."""
    # Dynamo asks once where the code remembers the answer: what the processor can do.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    for block in model.blocks:
        assert isinstance(block, Block)
        for part in (block.attention_norm, block.attention, block.ffn_norm):
            part.compile()
    model.norm.compile()


def check_compiler(device: torch.device) -> None:
    """Compile something small for this device. Raises RecipeError where that does not work, before training would."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise RecipeError(
            "train.compile true with TORCHDYNAMO_DISABLE=1 in the environment: nothing would be compiled; unset the "
            "one, or set the other to false"
        )
    try:
        torch.compile(torch.sin)(torch.zeros(16, device=device))
    except Exception as error:  # of many kinds, by platform and by what is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"train.compile true, but torch.compile does not work for {device} here ({reason}); install what it needs "
            "(on a CPU a C++ compiler and Python's headers, on a GPU Triton), or set train.compile=false"
        ) from error
