"""The recipe of a run: what the user writes, checked once, and every number that follows from it.

* `schema`  one frozen model per concern; a sentence and a unit under each field
* `derived` pure functions of those models: capacity, parameters, FLOPs, batch layout, learning rate
* `recipe`  the whole: sections together, the checks that need two of them, the arithmetic printed at start
* `loading` YAML file and `--set a.b=c` to a Recipe, or one `RecipeError` that lists every problem

Nothing here imports torch or deepspeed, so `moepp-data` and error messages stay fast.
"""

from __future__ import annotations

from moepp_ds.config.derived import (
    Capacity,
    Layout,
    ParameterCounts,
    count_parameters,
    expert_capacity,
    flops_per_token,
    plan_layout,
    scheduled_learning_rate,
)
from moepp_ds.config.errors import RecipeError
from moepp_ds.config.loading import load_recipe
from moepp_ds.config.recipe import Recipe
from moepp_ds.config.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    MoEConfig,
    MonitorConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "Capacity",
    "CheckpointConfig",
    "EvaluationConfig",
    "Layout",
    "ModelConfig",
    "MoEConfig",
    "MonitorConfig",
    "ParallelConfig",
    "ParameterCounts",
    "Recipe",
    "RecipeError",
    "TrainConfig",
    "count_parameters",
    "expert_capacity",
    "flops_per_token",
    "load_recipe",
    "plan_layout",
    "scheduled_learning_rate",
]
