"""Pre-training of mixture-of-experts language models with zero-computation experts (MoE++) on DeepSpeed.

The package reads top to bottom: `config` is the run's recipe, `router`, `dispatch`, `experts` and `losses`
are the parts of one layer, `moe_layer` and `model` put them together, `engine` hands the model to DeepSpeed,
and `train` is the program. `reference` is the same layer written slowly, as the truth that everything else is
tested against.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moepp_ds")
except PackageNotFoundError:  # a checkout that is on the path but was never installed
    __version__ = "0+not.installed"
