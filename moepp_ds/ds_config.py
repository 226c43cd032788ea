"""The one dictionary that DeepSpeed is given: the user's JSON, checked, with the recipe's numbers filled in.

1. Read the JSON that the recipe names; a key given twice is refused.
2. Refuse keys that the recipe owns, and keys that are not in `ACCEPTED` (DeepSpeed itself takes any top-level
   key in silence), naming the recipe's key or the nearest valid one.
3. Refuse settings under which a mixture of experts trains wrongly (`_refuse_unsound`).
4. Let DeepSpeed's own models check the values of its sections.
5. Fill in batch sizes, clipping and precision from the recipe.

Why the shipped files in ds_configs/ say what they say:

* `stage` 2: optimizer states and gradients are spread over the ranks that hold the same parameter.
* `contiguous_gradients`, `reduce_scatter`: said although they are the defaults, because without them experts'
  gradients are wrong.
* `overlap_comm`: gradients are reduced while the backward pass goes on; no effect on a CPU.
* `reduce_bucket_size` 50 M elements: 100 MB in bf16, large enough for full bandwidth, small enough that the
  first bucket leaves early in the backward pass. DeepSpeed holds two such buffers for each kind of parameter.
* `allgather_bucket_size` 200 M elements: updated weights come back after the step, when memory is free.
* `grad_accum_dtype` fp32 (bf16 file): an update adds up many micro batches, and bf16 keeps 8 bits of a sum.
* `communication_data_type`: not set in the bf16 file, so that bf16 gradients travel as they are, at half the
  bytes. fp32 in the fp32 file: the default, said because the comparison of layouts depends on it.
* `offload_optimizer` (offload file, for bf16 and fp32): the optimizer's weights and moments are in host memory and
  the host updates them. The optimizer stays torch's fused AdamW (hence `zero_force_ds_cpu_optimizer: false`): one
  core takes 0.65 ns a parameter, and 0.71 with DeepSpeedCPUAdam, which must be compiled first and rounds otherwise.

A gradient that is not finite never reaches the weights: DeepSpeed skips the update and sets
`optimizer.overflow` when the global norm is not finite (fp32 from DeepSpeed 0.19.8 on, fp16), or the
gradients themselves are not (fp16, and bf16 through `bf16.check_grad_overflow`, which is filled in here).
`compute_grad_norm: false` would remove that in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, WandbConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from moepp_ds.config.errors import RecipeError, nearest
from moepp_ds.config.recipe import Recipe

ACCEPTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "": (
            "zero_optimization",
            "data_types",
            "communication_data_type",
            "fp16",
            "comms_logger",
            "csv_monitor",
            "wandb",
            "memory_breakdown",
            "wall_clock_breakdown",
        ),
        "zero_optimization": (
            "stage",
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "compute_grad_norm",
            "ignore_unused_parameters",
            "enable_sanity_checks",
            "offload_optimizer",
        ),
        "zero_optimization.offload_optimizer": ("device", "pin_memory"),
        "data_types": ("grad_accum_dtype",),
        "fp16": (
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        ),
        "comms_logger": ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
        "csv_monitor": ("enabled", "output_path", "job_name"),
        "wandb": ("enabled", "group", "team", "project"),
    }
)
"""Keys that a JSON may hold, by section ("" is the top). DeepSpeed has many more: those that this project
owns, has no use for (pipelines, tensor parallelism, inference, its own checkpoints and profilers), or has not
proven right with experts. A section is added here together with the test that it trains.
`round_robin_gradients` stays out: under it DeepSpeed 0.19.8 links parameters to wrong ranges of the optimizer, and
checkpoints would be wrong."""

OWNED: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": "train.batch_tokens / data.seq_len",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.batch_tokens",
        "gradient_clipping": "train.gradient_clipping",
        "optimizer": "train.max_lr, train.adam_betas, train.adam_eps and train.weight_decay",
        "scheduler": "train.max_lr, train.final_lr and train.warmup_steps",
        "bf16": "train.precision",
        "bfloat16": "train.precision",
        "fp16.enabled": "train.precision",
        "fp16.auto_cast": "train.precision",
        "torch_autocast": "train.precision",
        "data_types.param_dtype": "train.precision",
        "activation_checkpointing": "train.activation_checkpointing",
        "steps_per_print": "train.log_every",
        "checkpoint": "checkpoint",
        "tensorboard": "monitor.tensorboard",
    }
)
"""DeepSpeed's keys that say what a recipe says, and the recipe's keys that say it."""

_TYPES = ("fp32", "bf16", "fp16")


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize` on `world` ranks.

    Raises RecipeError when the JSON cannot be read, holds a key it may not, or asks for something unsound,
    and when `world` ranks cannot share the batch or the experts.
    """
    file = Path(recipe.deepspeed)
    config = _read(file)
    _refuse_keys(config, file)
    _refuse_unsound(config, file, precision=recipe.train.precision)
    _check_values(config, file)
    return _fill(config, recipe, world)


def _read(file: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise RecipeError(f"{file}: {', '.join(twice)} is given twice in one section; keep one")
        return dict(pairs)

    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read (the recipe's deepspeed): {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{file}: a DeepSpeed configuration is a JSON object, not {type(config).__name__}")
    return config


def _refuse_keys(config: Mapping[str, Any], file: Path) -> None:
    """Refuse every key that the recipe owns or that `ACCEPTED` does not have, all in one message."""
    problems = _section_problems("", config, file)
    if problems:
        raise RecipeError("\n".join(problems))


def _section_problems(section: str, content: Mapping[str, Any], file: Path) -> list[str]:
    """What is wrong with the keys of a section and of the sections in it, the outer ones first."""
    problems: list[str] = []
    for key, value in content.items():
        problems += _key_problem(section, key, file)
        dotted = _dotted(section, key)
        if dotted not in ACCEPTED or dotted in OWNED:
            continue
        if isinstance(value, dict):
            problems += _section_problems(dotted, value, file)
        else:
            problems.append(f"{dotted} in {file} is {value!r}; it is a section, written as an object")
    return problems


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _key_problem(section: str, key: str, file: Path) -> list[str]:
    dotted = _dotted(section, key)
    if dotted in OWNED:
        return [
            f"{dotted} is set in {file} and owned by the recipe as {OWNED[dotted]}; delete it from the JSON"
        ]
    if key in ACCEPTED[section]:
        return []
    near = _nearest(key, section)
    return [f"{dotted} in {file} is not a key this project gives DeepSpeed{near}"]


def _nearest(key: str, section: str) -> str:
    owned = [name.rpartition(".")[2] for name in OWNED if name.rpartition(".")[0] == section]
    near = nearest(key, [*ACCEPTED[section], *owned])
    if near is None:
        return f"; valid here: {', '.join(ACCEPTED[section])}"
    dotted = _dotted(section, near)
    if dotted in OWNED:
        return f"; if you mean {dotted}, the recipe owns it as {OWNED[dotted]}"
    return f"; did you mean {dotted}?"


def _refuse_unsound(config: Mapping[str, Any], file: Path, *, precision: str) -> None:
    """Refuse settings that DeepSpeed takes and that train experts wrongly or let a bad gradient through."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2):
        why = {
            0: "clipping would average the norms of experts on different ranks",
            3: "experts are not supported",
        }
        reason = why[stage] if stage in (0, 3) and isinstance(stage, int) else "there is no such stage"
        raise RecipeError(f"zero_optimization.stage in {file} is {stage!r}: {reason}; use 1 or 2")
    reasons = {
        "contiguous_gradients": "gradients of experts come out wrong without it",
        "reduce_scatter": "gradients of experts are averaged over the wrong ranks without it",
        "use_multi_rank_bucket_allreduce": "gradients of experts are proven right only with it",
        "compute_grad_norm": "it finds gradients that are not finite, and clips",
    }
    for key, reason in reasons.items():
        if zero.get(key, True) is not True:
            raise RecipeError(
                f"zero_optimization.{key} in {file} is {zero[key]!r}: {reason}; use true or leave it out"
            )
    _refuse_unproven_offload(zero.get("offload_optimizer", {}), file, precision=precision)
    for dotted in ("communication_data_type", "data_types.grad_accum_dtype"):
        section, _, key = dotted.rpartition(".")
        value = (config.get(section, {}) if section else config).get(key, "fp32")
        if value not in _TYPES:
            raise RecipeError(f"{dotted} in {file} is {value!r}; use one of {', '.join(_TYPES)}")
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    if precision == "bf16" and stage == 1 and accumulate == "fp32":
        raise RecipeError(
            f"data_types.grad_accum_dtype in {file} is 'fp32' with zero_optimization.stage 1 and "
            "train.precision bf16: DeepSpeed then takes another optimizer (BF16_Optimizer), which this "
            "project does not use; use stage 2"
        )
    if precision == "fp32" and accumulate not in (None, "fp32"):
        raise RecipeError(
            f"data_types.grad_accum_dtype in {file} is {accumulate!r} with train.precision fp32; "
            "use 'fp32' or leave it out"
        )


def _refuse_unproven_offload(offload: Mapping[str, Any], file: Path, *, precision: str) -> None:
    key = "zero_optimization.offload_optimizer"
    device = offload.get("device", "none")
    if device not in ("cpu", "none"):
        raise RecipeError(
            f"{key}.device in {file} is {device!r}: checkpoints and updates are proven with the optimizer in host "
            "memory alone; use 'cpu', or 'none' for no offload"
        )
    if device == "cpu" and precision == "fp16":
        raise RecipeError(
            f"{key}.device in {file} is 'cpu' with train.precision fp16: skipped updates are not proven right there; "
            "use train.precision bf16"
        )


def _check_values(config: Mapping[str, Any], file: Path) -> None:
    """Let DeepSpeed's own models check the types and ranges of their sections."""
    models: dict[str, Callable[..., DeepSpeedConfigModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
    }
    for section, model in models.items():
        try:
            model(**config.get(section, {}))
        except ValidationError as error:
            found = [".".join(map(str, (section, *e["loc"]))) + f": {e['msg']}" for e in error.errors()]
            raise RecipeError(f"{file}: {'; '.join(found)}") from None
    for key in ("reduce_bucket_size", "allgather_bucket_size"):  # DeepSpeed takes true as 1, and divides by 0
        value = config["zero_optimization"].get(key, 1)
        if isinstance(value, bool) or int(value) < 1:
            raise RecipeError(f"{file}: zero_optimization.{key}: {value!r} is no number of elements; use 1 or more")
    for key in ("memory_breakdown", "wall_clock_breakdown"):
        if not isinstance(config.get(key, False), bool):
            raise RecipeError(f"{file}: {key}: {config[key]!r} is not true or false")


def _fill(config: Mapping[str, Any], recipe: Recipe, world: int) -> dict[str, Any]:
    layout, train = recipe.layout(world), recipe.train
    return {
        **config,
        # else DeepSpeed refuses torch's AdamW with offload; see `offload_optimizer` above
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": layout.rows,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {**config.get("fp16", {}), "enabled": train.precision == "fp16"},
        # the project prints its own progress: DeepSpeed's line never comes
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": config.get("wall_clock_breakdown", False),
    }
