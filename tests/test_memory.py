"""What a rank needs, by hand; what a host has; what is said when the one is more than the other.

That engines take what is planned is checked in real ranks: tests/test_offload.py.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import tiny
from torch import Tensor

from moepp_ds import products
from moepp_ds.agreement import AgreedError
from moepp_ds.config import Recipe, RecipeError, count_parameters, load_recipe
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.engine import Ranks, build_engine
from moepp_ds.memory import Group, Item, MemoryPlan, Room, check_fits, plan_memory
from moepp_ds.memory.check import settings_that_fit, table
from moepp_ds.memory.plan import rough_activations, sizes_by_expert
from moepp_ds.memory.room import free_on_host, least_room
from moepp_ds.model import MoEPlusPlusModel, initialize

ROOT = Path(__file__).parent.parent
GIB = 2**30
SIZES = [(False, (10, 20)), (True, (8,))]
"""Of a dense group and of a group of experts, whatever the recipe."""


@pytest.mark.parametrize(
    ("sizes", "copies", "padded", "part", "touched"),
    [
        ((10, 20), 1, 30, 30, 30),
        ((10, 21), 1, 32, 32, 31),  # to 2 x copies
        ((10, 20), 2, 32, 16, 30),  # 0-15 | 16-31: the second holds 14 of the 20, the first both
        ((16, 14), 2, 32, 16, 16),  # cut between them
        ((3,), 4, 8, 2, 3),  # 0-1 | 2-3 | nothing | nothing
        ((4, 4, 4, 4), 4, 16, 4, 4),
        ((1, 9, 2), 3, 12, 4, 11),  # 0-3 | 4-7 | 8-11: the last holds some of 9 and all of 2
    ],
)
def test_a_group_is_padded_and_cut(sizes: tuple[int, ...], copies: int, padded: int, part: int, touched: int) -> None:
    group = Group(sizes, copies)
    assert (group.padded, group.part, group.touched) == (padded, part, touched)


def config(stage: int = 2, *, bucket: int = 100, **sections: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": bucket, **sections.pop("zero", {})}
    return {"zero_optimization": zero, **sections}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


def planned(
    precision: str, given: dict[str, Any], *, world: int = 2, rows: int = 8, on_cpu: bool = False
) -> dict[tuple[str, str], int]:
    """(name, place) -> bytes of what is sure, for `SIZES`; on two ranks with experts on each n = 38, p = 16 + 8."""
    recipe = tiny.recipe(
        f"train.precision={precision}", f"train.batch_tokens={rows * tiny.SEQUENCE}", expert_parallel=world
    )
    plan = plan_memory(recipe, given, world, on_cpu=on_cpu, sizes=SIZES)
    return {(item.name, item.place): item.bytes for item in plan.items if item.sure}


def test_bf16_with_sums_in_fp32_by_hand() -> None:
    assert planned("bf16", config(**FP32_SUMS)) == {
        ("weights, bf16", "device"): 2 * (32 + 8),
        ("optimizer's weights, fp32", "device"): 4 * (16 + 8),
        ("optimizer's two moments, fp32", "device"): 8 * (16 + 8),
        ("the largest gradient, as it is made", "device"): 2 * 20,
        ("gradients of this rank's part, fp32", "device"): 4 * (16 + 8),
        ("1 x reduce_bucket_size", "device"): 2 * 100,
        ("the model as it is made, fp32", "host"): 4 * 38,
    }


def test_offload_by_hand() -> None:
    assert planned("bf16", config(zero=OFFLOAD, **FP32_SUMS)) == {
        ("weights, bf16", "device"): 2 * (32 + 8),
        ("optimizer's weights, fp32", "host"): 4 * (16 + 8),
        ("optimizer's two moments, fp32", "host"): 8 * (16 + 8),
        ("the largest gradient, as it is made", "device"): 2 * 20,
        ("gradients of this rank's part, fp32", "device"): 4 * (16 + 8),
        ("gradients for the update, fp32", "host"): 4 * (16 + 8),
        ("1 x reduce_bucket_size", "device"): 2 * 100,
        ("the largest parameter, for copies", "device"): 2 * 20,
        ("the largest parameter, for copies", "host"): 2 * 20,
        ("updated weights on their way", "host"): 2 * (16 + 8),
        ("the model as it is made, fp32", "host"): 4 * 38,
    }


def only_gradients(found: dict[tuple[str, str], int]) -> dict[str, int]:
    return {f"{name} | {place}": size for (name, place), size in found.items() if "gradient" in name}


MADE, PART, ALL = (
    "the largest gradient, as it is made | device",
    "gradients of this rank's part | device",
    "gradients of all parameters | device",
)
SUMS, UPDATE = "gradients' sums on the host | host", "gradients for the update, fp32 | host"


@pytest.mark.parametrize(
    ("precision", "rows", "given", "expected"),
    [
        # 4 rows are one micro batch of each of the two ranks, 8 are two; 30 + 8 elements are touched
        ("fp32", 4, config(), {MADE: 4 * 20, PART: 4 * 38}),
        ("fp32", 8, config(), {MADE: 4 * 20, PART: 2 * 4 * 38}),
        ("bf16", 8, config(), {MADE: 2 * 20, PART: 2 * 2 * 38}),
        ("fp32", 8, config(**FP32_SUMS), {MADE: 4 * 20, PART: 2 * 4 * 38}),
        ("fp32", 4, config(1, zero={"overlap_comm": True}), {MADE: 4 * 20, PART: 4 * 38}),
        ("fp32", 4, config(1), {ALL: 4 * 38, PART: 4 * 38}),
        ("bf16", 8, config(1, zero={"overlap_comm": True}), {ALL: 2 * 38, PART: 2 * 38}),
        ("fp32", 4, config(zero=OFFLOAD), {MADE: 4 * 20, UPDATE: 4 * 24}),
        ("fp32", 8, config(zero=OFFLOAD), {MADE: 4 * 20, SUMS: 4 * 38, UPDATE: 4 * 24}),
        ("bf16", 8, config(1, zero=OFFLOAD), {ALL: 2 * 38, UPDATE: 4 * 24}),
    ],
)
def test_gradients_by_hand(precision: str, rows: int, given: dict[str, Any], expected: dict[str, int]) -> None:
    assert only_gradients(planned(precision, given, rows=rows)) == expected


def test_buckets() -> None:
    """Two where they overlap; a host's pages count only when written; DeepSpeed's own size where none is given."""
    two = config(zero={"overlap_comm": True})
    assert planned("fp32", two)["2 x reduce_bucket_size", "device"] == 2 * 100 * 4
    assert planned("fp32", two, on_cpu=True)["2 x reduce_bucket_size", "device"] == 2 * 38 * 4
    assert planned("fp32", config(bucket=10), on_cpu=True)["1 x reduce_bucket_size", "device"] == 10 * 4
    unsaid = {"zero_optimization": {"stage": 2}}
    assert planned("bf16", unsaid)["1 x reduce_bucket_size", "device"] == 2 * 500_000_000


def test_a_background_save_copies_the_optimizer() -> None:
    recipe = tiny.recipe("checkpoint.background=true", expert_parallel=2)
    plan = plan_memory(recipe, config(), 2, on_cpu=False, sizes=SIZES)
    assert Item("copy for background saves", 12 * (16 + 8), "host") in plan.items


def test_experts_are_divided_among_their_copies_alone() -> None:
    recipe = tiny.recipe(expert_parallel=2)
    plan = plan_memory(recipe, config(), 4, on_cpu=False, sizes=[(False, (80,)), (True, (16,))])
    masters = next(item for item in plan.items if item.name == "optimizer's weights, fp32")
    assert masters.bytes == 4 * (80 // 4 + 16 // 2)


@pytest.mark.parametrize("name", ["moepp_0.6b", "moepp_7b", "xmoe_64x384", "released_7b"])
@pytest.mark.parametrize("ways", [1, 8])
def test_sizes_are_those_of_the_recipe(name: str, ways: int) -> None:
    """Dense parameters whole and experts divided by expert parallelism: what the recipe's own counting says."""
    recipe = load_recipe(ROOT / f"launch/recipes/{name}.yaml", [f"parallel.expert_parallel={ways}"])
    moe, model = recipe.model.moe, recipe.model
    experts = 3 * model.num_moe_layers * moe.num_ffn_experts * model.hidden_size * model.expert_ffn_hidden_size
    sizes = sizes_by_expert(recipe)
    assert sum(sum(group) for expert, group in sizes if expert) == experts // ways
    assert sum(sum(group) for expert, group in sizes if not expert) == count_parameters(model).total - experts


def test_needed_is_the_larger_of_starting_and_training() -> None:
    items = (
        Item("a", 5, "device"),
        Item("b", 3, "host"),
        Item("c", 4, "host", at_start=True),
        Item("d", 100, "device", sure=False),
    )
    plan = MemoryPlan(items)
    assert (plan.needed("device"), plan.needed("host"), plan.needed("device", "host")) == (5, 4, 8)


def test_activation_checkpointing_keeps_less() -> None:
    full, selective, none = (
        rough_activations(load_recipe(ROOT / "launch/recipes/moepp_7b.yaml", [setting]), on_cpu=False)
        for setting in (f"train.activation_checkpointing={how}" for how in ("full", "selective", "none"))
    )
    assert 0 < full < none / 3 and full < selective < 0.8 * none


SETTINGS = (
    "model.moe.every=1",
    "model.moe.every=2",
    "model.moe.num_shared_experts=1",
    "model.moe.router.jitter=0.01",
    "model.num_kv_heads=1",
    "model.qk_norm=full",
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 without units"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_activations_are_about_what_the_graph_keeps(
    setting: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16 without units":
        monkeypatch.setattr(products, "_cpu_multiplies_bf16", lambda: False)
    elif precision == "bf16":
        monkeypatch.setattr(products, "_cpu_multiplies_bf16", lambda: True)
    recipe = small_recipe(precision, setting)
    assert rough_activations(recipe, on_cpu=True) == pytest.approx(bytes_kept(recipe), rel=0.1)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_block_adds_about_what_checkpointing_keeps_of_it(precision: str, how: str) -> None:
    """Between models of 4 and 8 blocks: what is inside one block while it is recomputed is in both."""
    few, many = (
        small_recipe(precision, f"train.activation_checkpointing={how}", f"model.num_layers={layers}")
        for layers in (4, 8)
    )
    expected = rough_activations(many, on_cpu=True) - rough_activations(few, on_cpu=True)
    assert expected == pytest.approx(bytes_kept(many) - bytes_kept(few), rel=0.15)


def small_recipe(precision: str, *settings: str) -> Recipe:
    sizes = "num_layers=4 hidden_size=256 num_heads=4 ffn_hidden_size=512 vocab_size=1024".split()
    batch = ["data.seq_len=256", "train.micro_batch_size=4", "train.batch_tokens=1024"]
    config = ["deepspeed=ds_configs/zero2_fp32.json", "train.precision=fp32"] if precision == "fp32" else []
    overrides = [*(f"model.{size}" for size in sizes), *settings, *batch, *config]
    return load_recipe(ROOT / "launch/recipes/moepp_0.6b.yaml", overrides)


def bytes_kept(recipe: Recipe) -> int:
    """What a forward pass leaves for the backward pass: in the graph, and in the hands of what recomputes."""
    model = MoEPlusPlusModel(recipe.model, eos_id=0, recompute=recipe.train.activation_checkpointing)
    initialize(model, seed=0, std=0.02)
    model.to(torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16)
    tokens_BS1 = torch.randint(1, 1024, (4, 257), generator=torch.Generator().manual_seed(0))
    gc.collect()
    before = storages().keys()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens_BS1).loss
    after = storages()
    loss.backward()
    return sum(size for place, size in after.items() if place not in before)


def storages() -> dict[int, int]:
    """Where all dense tensors are that Python holds, and their bytes."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    dense = [one for one in tensors if one.layout == torch.strided]  # other tests may hold sparse ones
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in dense}


# -- what there is ---------------------------------------------------------------------------------------------


def machine(folder: Path, files: dict[str, str]) -> int | None:
    """What a machine with these files says is free."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return free_on_host(folder / "proc", folder / "cgroup")


MEMINFO = {"proc/meminfo": "MemTotal:  2000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 1024_000),
        ({}, None),
        # version 2: the tightest of the groups above, what files hold given back
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/job/task\n",
                "cgroup/job/task/memory.max": "max\n",
                "cgroup/job/task/memory.current": "70000\n",
                "cgroup/job/memory.max": "100000\n",
                "cgroup/job/memory.current": "70000\n",
                "cgroup/job/memory.stat": "anon 40000\ninactive_file 5000\n",
            },
            35_000,
        ),
        # version 2 in a container: the path is the host's, what is mounted is the group
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/docker/abc\n",
                "cgroup/memory.max": "50000",
                "cgroup/memory.current": "60000",
            },
            0,
        ),
        # version 1; its "no limit" is a very large number
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "4:memory:/job\n1:cpu:/job\n0::/\n",
                "cgroup/memory/job/memory.limit_in_bytes": "200000\n",
                "cgroup/memory/job/memory.usage_in_bytes": "150000\n",
                "cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 30000\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": "150000\n",
            },
            80_000,
        ),
    ],
    ids=["available", "nothing known", "v2", "v2 in a container", "v1"],
)
def test_free_on_host(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    assert machine(tmp_path, files) == free


def test_this_host_has_memory() -> None:
    assert (free_on_host() or 0) > 2**20


def test_the_rank_with_least_decides() -> None:
    """Ranks of a node share its memory; a device is a rank's own."""
    found = [("a", 80, 900), ("a", 70, 1000), ("b", 75, 600), ("b", 80, 1200), ("b", 80, 1200)]
    assert least_room(found) == Room(device=70, host=200, ranks_per_node=3)
    assert least_room([("", None, None)]) == Room(device=None, host=None, ranks_per_node=1)


# -- what is said ----------------------------------------------------------------------------------------------


def seven_billion(*overrides: str, ds: str = "zero2_bf16") -> tuple[Recipe, dict[str, Any]]:
    recipe = load_recipe(
        ROOT / "launch/recipes/moepp_7b.yaml", [f"deepspeed={ROOT}/ds_configs/{ds}.json", *overrides]
    )
    return recipe, deepspeed_config(recipe, 8)


def test_a_run_that_fits_gives_its_plan() -> None:
    recipe, given = seven_billion("parallel.expert_parallel=8")
    plan = check_fits(recipe, given, 8, Room(80 * GIB, 60 * GIB, 8))
    assert plan == plan_memory(recipe, given, 8, on_cpu=False)


def test_a_refusal_shows_the_arithmetic_and_what_would_fit() -> None:
    recipe, given = seven_billion("parallel.expert_parallel=1")
    with pytest.raises(RecipeError) as error:
        check_fits(recipe, given, 8, Room(20 * GIB, 60 * GIB, 8))
    said = str(error.value)
    plan = plan_memory(recipe, given, 8, on_cpu=False)
    in_all = next(line.split() for line in said.splitlines() if line.split()[:2] == ["in", "all"])
    assert in_all[2:] == [f"{plan.needed(place) / GIB:.3f}" for place in ("device", "host")]
    assert "a rank of 8 needs more memory than there is:\n" in said
    assert "free                                        20.000    60.000" in said
    assert said.endswith("(safety.check_memory: false starts it all the same)")
    named = [line.strip() for line in said.partition("Each of these would fit:\n")[2].splitlines()[:-1]]
    assert named == list(settings_that_fit(recipe, given, 8, Room(20 * GIB, 60 * GIB, 8)))
    assert [line.split()[0] for line in named] == ["parallel.expert_parallel:", "the", "32"]


def test_each_setting_named_is_the_least_that_fits() -> None:
    recipe, given = seven_billion("parallel.expert_parallel=1")
    room = Room(20 * GIB, 60 * GIB, 8)
    named = list(settings_that_fit(recipe, given, 8, room))
    ways = next(int(line.rpartition(" ")[2]) for line in named if line.startswith("parallel."))
    needs = {}
    for n in (1, 2, 4, 8):
        spread, config_n = seven_billion(f"parallel.expert_parallel={n}")
        needs[n] = plan_memory(spread, config_n, 8, on_cpu=False).needed("device")
    assert ways == min(n for n, need in needs.items() if need <= room.device)
    assert needs[8] < needs[4] < needs[2] < needs[1]


def test_offload_is_not_named_where_it_is_refused() -> None:
    recipe, given = seven_billion("parallel.expert_parallel=1", "train.precision=fp16")
    named = list(settings_that_fit(recipe, given, 8, Room(20 * GIB, 60 * GIB, 8)))
    assert [line.split()[0] for line in named] == ["parallel.expert_parallel:", "32"]


def test_nothing_fits_a_device_that_cannot_hold_the_weights() -> None:
    recipe, given = seven_billion()
    with pytest.raises(RecipeError, match="No number of ranks, nor offload, would make it fit"):
        check_fits(recipe, given, 8, Room(GIB, 60 * GIB, 8))


def test_a_host_that_is_too_small_for_offload() -> None:
    recipe, given = seven_billion("parallel.expert_parallel=8", ds="zero2_offload")
    check_fits(recipe, given, 8, Room(20 * GIB, 20 * GIB, 8))
    with pytest.raises(RecipeError, match="16 ranks"):
        check_fits(recipe, given, 8, Room(20 * GIB, 12 * GIB, 8))


def test_a_host_without_a_gpu_holds_all_of_it() -> None:
    recipe = tiny.recipe()
    given = deepspeed_config(recipe, 1)
    needed = plan_memory(recipe, given, 1, on_cpu=True).needed("device", "host")
    check_fits(recipe, given, 1, Room(None, needed, 1))
    with pytest.raises(RecipeError, match="needs more memory than there is"):
        check_fits(recipe, given, 1, Room(None, needed - 1, 1))
    check_fits(recipe, given, 1, Room(None, None, 1))  # nothing known, nothing refused


def test_the_check_can_be_turned_off() -> None:
    recipe, given = seven_billion("safety.check_memory=false")
    assert check_fits(recipe, given, 8, Room(0, 0, 8)).items


def test_the_table_names_what_is_not_counted() -> None:
    recipe, given = seven_billion()
    lines = table(plan_memory(recipe, given, 8, on_cpu=False)).splitlines()
    assert any(line.strip().startswith("not counted: activations, roughly") for line in lines)
    assert any(line.strip().startswith("before: the model as it is made, fp32") for line in lines)
    assert not any(line.strip().startswith("free") for line in lines)


def test_an_engine_is_not_built_where_it_does_not_fit(tmp_path: Path) -> None:
    """A trillion parameters in host memory; refused before any of it is asked for."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config()))
    recipe = tiny.recipe(f"deepspeed={file}", "model.num_layers=2", "model.vocab_size=30000000000")
    with pytest.raises(AgreedError, match="a rank of 1 needs more memory than there is"):
        build_engine(recipe, Ranks(0, 1, torch.device("cpu")), eos_id=0)
