"""The dictionary DeepSpeed gets: what the recipe fills in, what a JSON may not say, and its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, DeepSpeedMonitorConfig, WandbConfig
from deepspeed.runtime import constants
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

from moepp_ds.config import Recipe, RecipeError, load_recipe
from moepp_ds.ds_config import ACCEPTED, OWNED, deepspeed_config

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def recipe_with(tmp_path: Path, config: Any, overrides: tuple[str, ...] = ()) -> Recipe:
    file = tmp_path / "ds.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    layout = ("data.seq_len=256", "train.batch_tokens=8192", "train.micro_batch_size=4")  # 32 rows, by 4
    recipe = ROOT / "launch" / "recipes" / "quickstart.yaml"
    return load_recipe(recipe, [f"deepspeed={file}", *layout, *overrides])


def test_recipe_fills_in_what_it_owns(tmp_path: Path) -> None:
    recipe = recipe_with(
        tmp_path,
        {"zero_optimization": {"stage": 2}, "fp16": {"hysteresis": 4}, "communication_data_type": "fp32"},
        ("train.gradient_clipping=0.5",),
    )
    assert deepspeed_config(recipe, 4) == {
        "zero_optimization": {"stage": 2},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"hysteresis": 4, "enabled": False},
        "steps_per_print": 2147483647,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_one_precision_is_on_and_deepspeed_agrees(tmp_path: Path, precision: str) -> None:
    config = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "fp16": {"initial_scale_power": 8}}
    recipe = recipe_with(tmp_path, config, (f"train.precision={precision}", "parallel.expert_parallel=1"))
    known = DeepSpeedConfig(deepspeed_config(recipe, 1))
    assert known.bfloat16_config.enabled == (precision == "bf16")
    assert known.bfloat16_config.check_grad_overflow
    assert known.float16_config.enabled == (precision == "fp16")
    assert known.float16_config.initial_scale_power == 8
    assert (known.train_batch_size, known.gradient_accumulation_steps) == (32, 8)
    assert known.gradient_clipping == 1.0
    assert known.zero_config.stage == 2
    assert known.zero_config.compute_grad_norm


@pytest.mark.parametrize(
    ("file", "precision"),
    [("zero2_bf16", "bf16"), ("zero2_fp32", "fp32"), ("zero2_offload", "bf16"), ("zero2_offload", "fp32")],
)
def test_shipped_files_are_accepted(file: str, precision: str) -> None:
    assert {found.stem for found in SHIPPED} == {"zero2_bf16", "zero2_fp32", "zero2_offload"}
    settings = (f"deepspeed={ROOT}/ds_configs/{file}.json", f"train.precision={precision}")
    recipe = load_recipe(
        ROOT / "launch" / "recipes" / "quickstart.yaml", [*settings, "parallel.expert_parallel=1"]
    )
    known = DeepSpeedConfig(deepspeed_config(recipe, 1))
    assert known.zero_config.stage == 2
    assert not known.zero_force_ds_cpu_optimizer  # an optimizer of torch's is taken with offload too


GOOD = {"stage": 2}


@pytest.mark.parametrize(
    "config, words",
    [
        (
            {"zero_optimization": GOOD, "gradient_clipping": 1.0},
            (
                "gradient_clipping is set in {file} and owned by the recipe as train.gradient_clipping;"
                " delete it from the JSON"
            ),
        ),
        (
            {"zero_optimization": GOOD, "bf16": {"enabled": True}},
            "bf16 is set in {file} and owned by the recipe as train.precision; delete it from the JSON",
        ),
        (
            {"zero_optimization": GOOD, "fp16": {"enabled": True}},
            (
                "fp16.enabled is set in {file} and owned by the recipe as train.precision; delete it from the"
                " JSON"
            ),
        ),
        (
            {"zero_optimisation": GOOD},
            (
                "zero_optimisation in {file} is not a key this project gives DeepSpeed; did you mean"
                " zero_optimization?"
            ),
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_buket_size": 1}},
            (
                "zero_optimization.reduce_buket_size in {file} is not a key this project gives DeepSpeed; "
                "did you mean zero_optimization.reduce_bucket_size?"
            ),
        ),
        (
            {"zero_optimization": GOOD, "gradient_cliping": 1.0},
            (
                "gradient_cliping in {file} is not a key this project gives DeepSpeed; "
                "if you mean gradient_clipping, the recipe owns it as train.gradient_clipping"
            ),
        ),
        (
            {"zero_optimization": GOOD, "data_types": {"zzz": 1}},
            (
                "data_types.zzz in {file} is not a key this project gives DeepSpeed; valid here:"
                " grad_accum_dtype"
            ),
        ),
        (
            {"zero_optimization": True},
            "zero_optimization in {file} is True; it is a section, written as an object",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            (
                "zero_optimization.stage in {file} is 0: clipping would average the norms of experts on"
                " different ranks; use 1 or 2"
            ),
        ),
        ({}, "zero_optimization.stage in {file} is 0: clipping would average"),
        ({"zero_optimization": {"stage": 3}}, "stage in {file} is 3: experts are not supported; use 1 or 2"),
        ({"zero_optimization": {"stage": "2"}}, "stage in {file} is '2': there is no such stage; use 1 or 2"),
        (
            {"zero_optimization": {"stage": 2, "contiguous_gradients": False}},
            (
                "zero_optimization.contiguous_gradients in {file} is False: gradients of experts come out"
                " wrong without it; use true or leave it out"
            ),
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
            (
                "zero_optimization.reduce_scatter in {file} is False: gradients of experts are averaged over"
                " the wrong ranks"
            ),
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm in {file}",
        ),
        (
            {"zero_optimization": {**GOOD, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            (
                "zero_optimization.offload_optimizer.nvme_path in {file} is not a key this project gives DeepSpeed; "
                "valid here: device, pin_memory"
            ),
        ),
        (
            {"zero_optimization": {**GOOD, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device in {file} is 'nvme': checkpoints and updates are proven",
        ),
        (
            {"zero_optimization": {**GOOD, "offload_optimizer": {"divice": "cpu"}}},
            "did you mean zero_optimization.offload_optimizer.device?",
        ),
        (
            {"zero_optimization": {**GOOD, "offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer in {file} is 'cpu'; it is a section, written as an object",
        ),
        (
            {"zero_optimization": {**GOOD, "offload_optimizer": {"device": "cpu", "pin_memory": "perhaps"}}},
            "{file}: zero_optimization.offload_optimizer.pin_memory: Input should be a valid boolean",
        ),
        (
            {"zero_optimization": {**GOOD, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param in {file} is not a key this project gives DeepSpeed; did you mean",
        ),
        (
            {"zero_optimization": GOOD, "communication_data_type": "bf17"},
            "communication_data_type in {file} is 'bf17'; use one of fp32, bf16, fp16",
        ),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "DeepSpeed then takes another optimizer (BF16_Optimizer)",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
            "{file}: zero_optimization.reduce_bucket_size: Input",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": True}},
            "{file}: zero_optimization.reduce_bucket_size: True is no number of elements; use 1 or more",
        ),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": 0}},
            "{file}: zero_optimization.allgather_bucket_size: 0 is no number of elements; use 1 or more",
        ),
        (
            {"zero_optimization": GOOD, "comms_logger": {"enabled": "perhaps"}},
            "{file}: comms_logger.enabled: Input",
        ),
        (
            {"zero_optimization": GOOD, "memory_breakdown": 1},
            "{file}: memory_breakdown: 1 is not true or false",
        ),
        (
            '{"zero_optimization": {"stage": 2, "stage": 1}}',
            "{file}: stage is given twice in one section; keep one",
        ),
        ('{"a": }', "{file}: is not valid JSON: Expecting value: line 1 column 7"),
        ("[]", "{file}: a DeepSpeed configuration is a JSON object, not list"),
        ("[" * 5000, "{file}: is not valid JSON: "),
    ],
)
def test_what_a_json_may_not_say(tmp_path: Path, config: Any, words: str) -> None:
    recipe = recipe_with(tmp_path, config)
    with pytest.raises(RecipeError) as error:
        deepspeed_config(recipe, 2)
    assert words.format(file=recipe.deepspeed) in str(error.value)


def test_all_bad_keys_are_listed_at_once(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, {"zero_optimization": {"stage": 2, "x1": 1}, "optimizer": {}, "x2": 2})
    with pytest.raises(RecipeError) as error:
        deepspeed_config(recipe, 2)
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "zero_optimization.x1",
        "optimizer",
        "x2",
    ]


def test_fp32_does_not_accumulate_in_less(tmp_path: Path) -> None:
    config = {"zero_optimization": GOOD, "data_types": {"grad_accum_dtype": "bf16"}}
    recipe = recipe_with(tmp_path, config, ("train.precision=fp32",))
    with pytest.raises(RecipeError, match="is 'bf16' with train.precision fp32; use 'fp32' or leave it out"):
        deepspeed_config(recipe, 2)


def test_fp16_is_not_offloaded(tmp_path: Path) -> None:
    config = {"zero_optimization": {**GOOD, "offload_optimizer": {"device": "cpu"}}}
    recipe = recipe_with(tmp_path, config, ("train.precision=fp16",))
    with pytest.raises(RecipeError, match="is 'cpu' with train.precision fp16: .*; use train.precision bf16$"):
        deepspeed_config(recipe, 2)


def test_a_json_that_went_away(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, {"zero_optimization": GOOD})
    Path(recipe.deepspeed).unlink()
    with pytest.raises(RecipeError, match=r"cannot be read \(the recipe's deepspeed\): No such file"):
        deepspeed_config(recipe, 2)


@pytest.mark.parametrize(
    "world, words",
    [
        (
            3,
            (
                "expert_parallel 2 does not divide the world of 3 ranks; start 2 or 4 ranks, or set expert_parallel to"
                " one of 1, 3"
            ),
        ),
        (6, "batch of 32 rows is not divisible by micro_batch_size 4 x world 6 = 24; start 4 or 8 ranks, or begin"),
    ],
)
def test_worlds_that_cannot_share_the_batch(tmp_path: Path, world: int, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        deepspeed_config(recipe_with(tmp_path, {"zero_optimization": GOOD}), world)
    assert words in str(error.value)


def test_installed_deepspeed_knows_every_accepted_and_owned_name() -> None:
    """A name that DeepSpeed dropped would be ignored in silence; an upgrade that drops one fails here."""
    top = {value for value in vars(constants).values() if isinstance(value, str)} | {ZERO_OPTIMIZATION}
    # named in the modules that read them
    elsewhere = {"comms_logger", "activation_checkpointing", *DeepSpeedMonitorConfig.model_fields}
    assert {name for name in ACCEPTED[""] if name not in top} <= elsewhere
    assert {name for name in OWNED if "." not in name and name not in top} <= elsewhere
    assert constants.GRAD_ACCUM_DTYPE in ACCEPTED["data_types"]
    for section, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("fp16", DeepSpeedFP16Config),
        ("comms_logger", CommsLoggerConfig),
        ("csv_monitor", CSVConfig),
        ("wandb", WandbConfig),
    ):
        assert set(ACCEPTED[section]) <= model.model_fields.keys()
    assert {"enabled", "check_grad_overflow"} <= DeepSpeedBF16Config.model_fields.keys()
    assert not {name for section, names in ACCEPTED.items() for name in names} & OWNED.keys()
