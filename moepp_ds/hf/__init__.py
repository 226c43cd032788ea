"""MoE++ models for `transformers`: importing this makes its auto classes know them.

    import moepp_ds.hf
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)

for folders of `moepp export` and for the released model. Exported folders also hold the two files of this package
that define the classes, and load without moepp_ds through `trust_remote_code=True`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moepp_ds.hf.configuration_moepp import MoEPPConfig, ReleasedMoEPPConfig
from moepp_ds.hf.modeling_moepp import (
    MoEPPForCausalLM,
    MoEPPModel,
    ReleasedMoEPPForCausalLM,
    ReleasedMoEPPModel,
)

for _config, _model, _language_model in (
    (MoEPPConfig, MoEPPModel, MoEPPForCausalLM),
    (ReleasedMoEPPConfig, ReleasedMoEPPModel, ReleasedMoEPPForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _language_model)

__all__ = [
    "MoEPPConfig",
    "MoEPPForCausalLM",
    "MoEPPModel",
    "ReleasedMoEPPConfig",
    "ReleasedMoEPPForCausalLM",
    "ReleasedMoEPPModel",
]
