"""Checks of an optimizer on the host, and of the memory plan, in real ranks; started by tests/test_offload.py.

    ... --module tests.programs.offload_checks FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moepp_ds.agreement import gather
from moepp_ds.checkpoint.live import Saver, load_checkpoint
from moepp_ds.config import Recipe
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.engine import join_ranks
from moepp_ds.memory import Group, plan_memory
from moepp_ds.memory.plan import sizes_by_expert
from tests.programs import checks, tiny

RANKS = join_ranks()
FOLDER = Path(sys.argv[1])
LARGE = 10**6
"""A bucket that holds the gradients of the whole model."""

WIDER = ("model.hidden_size=32", "model.ffn_hidden_size=48")
"""So wide that what is no part of a plan, such as tokens and counts, is less than the tolerance."""

WAYS = (RANKS.world,)


def asked(
    precision: str,
    stage: int,
    *settings: str,
    offload: bool,
    ways: int = 1,
    bucket: int = LARGE,
    overlap: bool = True,
) -> Recipe:
    """The tiny recipe with that ZeRO."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": bucket}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {"zero_optimization": zero}
    if precision == "bf16" and stage == 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    file = FOLDER / f"{precision}-{stage}-{offload}-{bucket}-{overlap}.json"
    if RANKS.is_first:
        file.write_text(json.dumps(config))
    dist.barrier()
    return tiny.recipe(f"deepspeed={file}", f"train.precision={precision}", *settings, expert_parallel=ways)


def trained(recipe: Recipe, steps: Sequence[int]) -> tuple[Any, list[tuple[float, float]], dict[str, Tensor]]:
    engine = tiny.engine_for(recipe, RANKS)
    return engine, tiny.train(engine, recipe, RANKS, steps), tiny.global_arrays(engine)


def offload_changes_no_loss() -> None:
    """Losses equal to the rounding of the gradient norm, which is summed in another order; so are all states."""
    for precision, stage, ways in product(("fp32", "bf16"), (1, 2), WAYS):
        runs = [trained(asked(precision, stage, offload=offload, ways=ways), range(3))[1:] for offload in (False, True)]
        (here, states), (there, offloaded) = runs
        # bf16 rounds what differs in the last bit of fp32 to other weights now and then
        tolerance = 1e-6 if precision == "fp32" else 3e-3
        torch.testing.assert_close(torch.tensor(there), torch.tensor(here), rtol=tolerance, atol=0)
        tiny.close(offloaded, states, relative=1e-5 if precision == "fp32" else 3e-2)


def many_buckets_lose_no_gradient() -> None:
    """Losses and norms are those of plain PyTorch with buckets smaller than the model, and than a parameter.

    What ZeRO does with a full bucket depends on whether the backward pass is the update's last: engine._tell_boundary.
    """
    recipe = asked("fp32", 2, offload=False)
    plain = tiny.PlainRun.start(recipe)
    expected = [plain.update(step, rate=recipe.learning_rate(step)) for step in range(2)]
    for stage, offload, (overlap, bucket) in product((1, 2), (False, True), ((False, 4000), (True, 200))):
        recipe = asked("fp32", stage, offload=offload, bucket=bucket, overlap=overlap, ways=RANKS.world)
        losses = trained(recipe, range(2))[1]
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


def _resumes(precision: str, ways: int, *, saved_offloaded: bool) -> None:
    root = FOLDER / f"{precision}-{ways}-{saved_offloaded}"
    engine, _, states = trained(asked(precision, 2, offload=saved_offloaded, ways=ways), range(2))
    saver = Saver(engine, root, keep=1)
    saver.save(step=2, facts={"recipe": {"name": "tiny"}, "data": {"rows": 16}})
    folder, recipe = saver.complete(), asked(precision, 2, offload=not saved_offloaded, ways=ways)
    going_on = tiny.train(engine, recipe, RANKS, range(2, 4))
    other = tiny.engine_for(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 7})}), RANKS)
    assert folder is not None
    load_checkpoint(other, folder)
    tiny.same(tiny.global_arrays(other), states)
    again = tiny.train(other, recipe, RANKS, range(2, 4))
    assert again[0][0] == going_on[0][0]  # the live weights follow from the same masters
    tolerance = 1e-6 if precision == "fp32" else 3e-3
    torch.testing.assert_close(torch.tensor(again), torch.tensor(going_on), rtol=tolerance, atol=0)


def resumes_on_the_host_and_back() -> None:
    """Weights and moments, bit for bit, from a run with offload to one without and the other way."""
    for precision, ways, offloaded in product(("fp32", "bf16"), WAYS, (False, True)):
        _resumes(precision, ways, saved_offloaded=offloaded)


def offloaded_is_digit_for_digit_again() -> None:
    recipe = asked("bf16", 2, offload=True, ways=RANKS.world)
    engine, _, _ = trained(recipe, range(2))
    saver = Saver(engine, FOLDER / "again", keep=1)
    saver.save(step=2, facts={"recipe": {"name": "tiny"}, "data": {"rows": 16}})
    going_on = tiny.train(engine, recipe, RANKS, range(2, 5))
    other, folder = tiny.engine_for(recipe, RANKS), saver.complete()
    assert folder is not None
    load_checkpoint(other, folder)
    assert tiny.train(other, recipe, RANKS, range(2, 5)) == going_on
    tiny.same(tiny.global_arrays(other), tiny.global_arrays(engine))


def groups_are_those_of_the_engine() -> None:
    """What the plan takes the optimizer groups for, and what DeepSpeed makes of them."""
    for ways in WAYS:
        recipe = asked("fp32", 2, offload=False, ways=ways)
        zero = tiny.engine_for(recipe, RANKS).optimizer
        groups = [
            Group(sizes, copies=RANKS.world // ways if expert else RANKS.world)
            for expert, sizes in sizes_by_expert(recipe)
        ]
        assert [group.sizes for group in groups] == [tuple(p.numel() for p in group) for group in zero.bit16_groups]
        assert [group.padded for group in groups] == [len(flat) for flat in zero.bit16_groups_flat]
        assert [group.part for group in groups] == [int(size) for size in zero.partition_size]
        mine = [sum(p.numel() for p in inside) for inside in zero.params_in_partition]
        assert [group.touched for group in groups] == [max(sizes) for sizes in zip(*gather(mine))]


def _live_bytes() -> int:
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
    # which nobody has asked for in Python yet
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _most_bytes(recipe: Recipe) -> int:
    """Of live tensors in the second update, where what a backward pass keeps for itself is gone.

    With stage 2 that is at its end, before the last bucket is dealt with; with stage 1 after the first micro batch.
    """
    before, seen = _live_bytes(), [0]
    engine = tiny.engine_for(recipe, RANKS)
    zero = engine.optimizer
    at, name = (zero, "independent_gradient_partition_epilogue") if zero.partition_gradients else (engine, "step")
    watched = getattr(at, name)

    def watch() -> None:
        if engine.global_steps and (zero.partition_gradients or not engine.is_gradient_accumulation_boundary()):
            seen.append(_live_bytes() - before)
        watched()

    setattr(at, name, watch)
    for _ in range(2):
        batches = tiny.micro_batches(0)[: recipe.accumulation_steps(RANKS.world)]
        tiny.update(engine, batches, RANKS, rate=1e-3, num_sources=1, stop=lambda: False)
    engine.destroy()
    return max(seen)


def plan_is_what_engines_take() -> None:
    """Within 2 % of the bytes of all tensors, on the rank that has most."""
    for precision, stage, offload, ways in product(("fp32", "bf16"), (1, 2), (False, True), WAYS):
        for accumulation in ((2,) if stage == 1 else (1, 2)):
            rows = accumulation * tiny.MICRO_BATCH * RANKS.world
            settings = (f"train.batch_tokens={rows * tiny.SEQUENCE}", *WIDER)
            recipe = asked(precision, stage, *settings, offload=offload, ways=ways, bucket=16000)
            plan = plan_memory(recipe, deepspeed_config(recipe, RANKS.world), RANKS.world, on_cpu=True)
            planned = plan.needed("device", "host")
            if stage == 1:  # which gets its part of the gradients with the last micro batch
                planned -= sum(item.bytes for item in plan.items if item.name == "gradients of this rank's part")
            found = max(gather(_most_bytes(recipe)))
            what = f"{precision}, stage {stage}, offload {offload}, EP {ways}, {accumulation} micro batches"
            assert found == pytest.approx(planned, rel=0.02), f"{what}: {found:,} bytes, planned {planned:,}"


if __name__ == "__main__":
    checks.run(
        [
            offload_changes_no_loss,
            many_buckets_lose_no_gradient,
            resumes_on_the_host_and_back,
            offloaded_is_digit_for_digit_again,
            groups_are_those_of_the_engine,
            plan_is_what_engines_take,
        ]
    )
