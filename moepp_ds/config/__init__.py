"""The recipe of a run: what the user writes, checked once, and every number that follows from it.

* `model`, `moe`, `routing`, `training`  one frozen section per concern; a sentence and a unit under each field
* `section` what they share: strict, frozen, closed to keys they do not know
* `derived` pure functions of the sections: capacity, parameters, FLOPs, batch layout, learning rate
* `recipe`  the whole: sections together, the checks that need two of them, the arithmetic printed at start
* `loading` YAML file and `--set a.b=c` to a Recipe, or one `RecipeError` that lists every problem
* `stored`  the same for a recipe that a checkpoint holds

Nothing here imports torch or deepspeed, so `moepp-data` and error messages stay fast.
"""

from __future__ import annotations

from moepp_ds.config.derived import (
    Capacity,
    Layout,
    ParameterCounts,
    controller_rate,
    count_parameters,
    expert_capacity,
    flops_per_token,
    journeys_of_an_assignment,
    plan_layout,
    recomputed_flops_per_token,
    scheduled_learning_rate,
)
from moepp_ds.config.errors import RecipeError
from moepp_ds.config.loading import load_recipe
from moepp_ds.config.model import ModelConfig
from moepp_ds.config.moe import MoEConfig
from moepp_ds.config.recipe import Recipe
from moepp_ds.config.routing import ControllerConfig, RouterConfig
from moepp_ds.config.safety import SafetyConfig
from moepp_ds.config.training import (
    ActivationCheckpointing,
    CheckpointConfig,
    EvaluationConfig,
    MonitorConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "ActivationCheckpointing",
    "Capacity",
    "CheckpointConfig",
    "ControllerConfig",
    "EvaluationConfig",
    "Layout",
    "ModelConfig",
    "MoEConfig",
    "MonitorConfig",
    "ParallelConfig",
    "ParameterCounts",
    "Recipe",
    "RecipeError",
    "RouterConfig",
    "SafetyConfig",
    "TrainConfig",
    "controller_rate",
    "count_parameters",
    "expert_capacity",
    "flops_per_token",
    "journeys_of_an_assignment",
    "load_recipe",
    "plan_layout",
    "recomputed_flops_per_token",
    "scheduled_learning_rate",
]
