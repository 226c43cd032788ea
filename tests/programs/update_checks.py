"""Checks of `update` on several ranks; tests/test_update.py starts them.

    ... --module tests.programs.update_checks FOLDER [ONE CHECK ...]

A micro batch is 2 rows and an update 8: rank r of 2 has rows 2r, 2r + 1 of it, and 2r + 4, 2r + 5.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from moepp_ds.checkpoint.fragments import optimizer_facts
from moepp_ds.config import Recipe, SafetyConfig
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.engine import join_ranks
from moepp_ds.expert_parallel import ExpertParallelMoE, parameter_groups
from moepp_ds.guard import Guard
from moepp_ds.model import MoEPlusPlusModel, initialize
from moepp_ds.update import UpdateResult, update
from tests.programs import checks, tiny

RANKS = join_ranks()
FOLDER = Path(sys.argv[1])
SKIP = SafetyConfig(non_finite="skip", on_spike="skip", spike_above=1.0, spike_window=8)
LOW = Guard((1.0,) * 8)
"""After such losses, that of an untrained model of 64 tokens, ln 64 = 4.2, is a spike."""
BAD = 20
"""An update whose rows no run is meant to see."""


def recipe_of(stage: int, ways: int, precision: str) -> Recipe:
    """The tiny recipe under another stage of ZeRO. In bf16, stage 1 has no fp32 gradients here."""
    file = FOLDER / f"stage-{stage}-{precision}-{RANKS.rank}.json"
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if (stage, precision) == (2, "bf16"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    file.write_text(json.dumps(config))
    return tiny.recipe(f"deepspeed={file}", expert_parallel=ways, precision=precision)


def layouts() -> list[Recipe]:
    """Each stage with each expert-parallel size and with each precision, and the optimizer on the host."""
    most = RANKS.world
    chosen = [(1, 1, "fp32"), (2, 1, "bf16")]
    if most > 1:
        chosen += [(1, most, "bf16"), (2, most, "fp32")]
    host = "deepspeed=ds_configs/zero2_offload.json"
    return [
        *(recipe_of(*choice) for choice in chosen),
        *(tiny.recipe(host, expert_parallel=most, precision=precision) for precision in ("fp32", "bf16")),
    ]


def one_update(engine: Any, step: int, *, guard: Guard = Guard(), **settings: Any) -> UpdateResult:
    mine = tiny.micro_batches(step)[RANKS.rank :: RANKS.world]
    told = {"rate": 1e-2 / (1 + step % BAD), "num_sources": 1, "stop": lambda: False, "safety": SKIP, **settings}
    return update(engine, mine, RANKS, guard=guard, **told)


@contextmanager
def spoiled_loss(engine: Any, *, rank: int) -> Iterator[None]:
    """Inside, the last micro batch of that rank has a loss that is no number."""
    calls = iter(range(engine.gradient_accumulation_steps()))

    def spoil(module: torch.nn.Module, inputs: Any, h_BSD: Tensor) -> Tensor:
        last = next(calls) == engine.gradient_accumulation_steps() - 1
        return h_BSD * math.nan if last and RANKS.rank == rank else h_BSD

    handle = engine.module.norm.register_forward_hook(spoil)
    yield
    handle.remove()


@contextmanager
def spoiled_gradient(engine: Any, *, rank: int) -> Iterator[None]:
    """Inside, the last micro batch of that rank has finite losses and a gradient that is no number."""
    calls = iter(range(100))

    def spoil(gradient: Tensor) -> Tensor:
        last = next(calls) % engine.gradient_accumulation_steps() == engine.gradient_accumulation_steps() - 1
        return torch.full_like(gradient, math.nan) if last and RANKS.rank == rank else gradient

    handle = engine.module.blocks[1].attention.q_proj.weight.register_hook(spoil)
    yield
    handle.remove()


def places(step: int, *, rank: int) -> str:
    """The last micro batch of that rank in the words of a message."""
    row = (step + 1) * tiny.ROWS - (RANKS.world - rank) * tiny.MICRO_BATCH
    return f"rank {rank} rows {row} to {row + 1}"


# -- what is skipped --------------------------------------------------------------------------------------------


def skipped_updates_leave_no_trace() -> None:
    """Between good updates come a loss that is no number, a spike, and a gradient that is no number."""
    worst = RANKS.world - 1
    for asked in layouts():
        undisturbed, disturbed = tiny.engine_for(asked, RANKS), tiny.engine_for(asked, RANKS)
        expected = [one_update(undisturbed, step) for step in range(4)]
        results = [one_update(disturbed, 0)]
        with spoiled_loss(disturbed, rank=worst):
            results += [one_update(disturbed, BAD)]
        results += [one_update(disturbed, 1), one_update(disturbed, BAD, guard=LOW), one_update(disturbed, 2)]
        with spoiled_gradient(disturbed, rank=worst):
            results += [one_update(disturbed, BAD)]
        results += [one_update(disturbed, 3)]
        kinds = [result.incident and result.incident.kind for result in results]
        assert kinds == [None, "loss", None, "spike", None, "gradient", None], kinds
        good = [result for result in results if result.incident is None]
        assert [(r.loss, r.grad_norm) for r in good] == [(r.loss, r.grad_norm) for r in expected]
        tiny.same(tiny.global_arrays(disturbed), tiny.global_arrays(undisturbed))
        assert optimizer_facts(disturbed) == optimizer_facts(undisturbed)
        live = zip(disturbed.module.parameters(), undisturbed.module.parameters())
        assert all(torch.equal(*pair) for pair in live)
        assert (disturbed.global_steps, undisturbed.global_steps) == (7, 4)


def an_incident_names_ranks_and_rows() -> None:
    worst = RANKS.world - 1
    engine = tiny.engine_for(tiny.recipe(), RANKS)
    with spoiled_loss(engine, rank=worst):
        incident = one_update(engine, 0).incident
    assert incident is not None
    assert (incident.kind, incident.action, incident.number) == ("loss", "skip", 1)
    assert incident.reason == (
        f"update 1 has a loss that is not finite (nan): {places(0, rank=worst)}; the weights were not changed"
    )
    with spoiled_gradient(engine, rank=worst):
        incident = one_update(engine, 1).incident
    assert incident is not None
    assert (incident.kind, incident.action, incident.number) == ("gradient", "skip", 2)
    assert incident.reason == (
        f"update 2 has gradients that are not finite although every loss is: {places(1, rank=worst)}; "
        "the weights were not changed"
    )


def a_spike_names_every_micro_batch_that_has_a_share_in_it() -> None:
    """All four are above: each rank has every second."""
    engine = tiny.engine_for(tiny.recipe(), RANKS)
    incident = one_update(engine, 0, guard=LOW).incident
    assert incident is not None
    shares = {rank: range(rank, 4, RANKS.world) for rank in range(RANKS.world)}
    named = [f"rank {rank} rows {2 * m} to {2 * m + 1}" for rank, own in shares.items() for m in own]
    assert f"(safety.spike_above 1): {', '.join(named)}; the weights were not changed" in incident.reason


def a_gradient_that_only_an_expert_has_is_said_to_be_one() -> None:
    engine = tiny.engine_for(tiny.recipe(expert_parallel=RANKS.world), RANKS)
    weight = next(p for n, p in engine.module.named_parameters() if ".moe.experts." in n)
    handle = weight.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    incident = one_update(engine, 0).incident
    handle.remove()
    assert incident is not None and ": an FFN expert, or the sum over ranks; the weights" in incident.reason


# -- fp16 -------------------------------------------------------------------------------------------------------


def fp16_engine(**section: float) -> Any:
    """The tiny model in fp16, which `build_engine` refuses on a CPU because it is slow there."""
    asked = tiny.recipe(expert_parallel=RANKS.world)
    config = {**deepspeed_config(asked, RANKS.world), "fp16": {"enabled": True, **section}}
    factory = partial(ExpertParallelMoE, expert_parallel=RANKS.world)
    model = MoEPlusPlusModel(asked.model, eos_id=0, layer_factory=factory)
    initialize(model, seed=0, std=0.2)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for instructions that make it fast
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def a_loss_scale_that_is_too_large_is_no_incident() -> None:
    """Of 2^24 the gradients overflow in fp16, and the scale is halved until they do not."""
    engine = fp16_engine(initial_scale_power=24, hysteresis=1)
    guard, scales = Guard(), []
    for step in range(24):
        scales.append(engine.optimizer.loss_scale)
        result = one_update(engine, step, guard=guard)
        guard = result.guard
        assert result.incident is None and result.taken == math.isfinite(result.grad_norm)
        assert guard == (Guard((result.lm_loss,)) if result.taken else Guard())
        if result.taken:
            break
    assert scales == [2.0 ** (24 - step) for step in range(len(scales))] and len(scales) > 3
    assert optimizer_facts(engine)["updates"] == 1


def a_loss_that_is_no_number_says_nothing_about_the_scale() -> None:
    engine = fp16_engine(initial_scale_power=8, hysteresis=1)
    one_update(engine, 0)
    before = optimizer_facts(engine)
    with spoiled_loss(engine, rank=0):
        result = one_update(engine, BAD)
    assert result.incident is not None and result.incident.kind == "loss"
    assert optimizer_facts(engine) == before and before["loss_scaler"]["cur_scale"] == 256.0


def the_lowest_scale_cannot_be_too_large_without_an_incident() -> None:
    engine = fp16_engine(initial_scale_power=1, hysteresis=1, min_loss_scale=1)
    with spoiled_gradient(engine, rank=0):
        assert one_update(engine, BAD).incident is None and engine.optimizer.loss_scale == 1
        result = one_update(engine, BAD, safety=SKIP)
    assert result.incident is not None and (result.incident.kind, result.incident.action) == ("gradient", "skip")
    assert not result.taken and engine.optimizer.loss_scale == 1


def a_fixed_scale_cannot_be_too_large_without_an_incident() -> None:
    engine = fp16_engine(loss_scale=2.0**40)
    incident = one_update(engine, 0).incident
    assert incident is not None and incident.kind == "gradient"


# -- the guard --------------------------------------------------------------------------------------------------


def the_guard_goes_from_update_to_update() -> None:
    engine = tiny.engine_for(tiny.recipe(), RANKS)
    first = one_update(engine, 0)
    assert first.guard == Guard((first.lm_loss,)) and first.taken
    second = one_update(engine, 1, guard=first.guard)
    assert second.guard == Guard((first.lm_loss, second.lm_loss))
    with spoiled_gradient(engine, rank=0):
        third = one_update(engine, BAD, guard=second.guard)
    assert third.guard == Guard((first.lm_loss, second.lm_loss), skipped=1)  # although the loss was finite
    assert math.isinf(third.grad_norm) and not third.taken
    fourth = one_update(engine, BAD, guard=LOW, safety=SKIP.model_copy(update={"on_spike": "stop"}))
    assert fourth.incident is not None and fourth.incident.action == "stop"
    assert fourth.guard == LOW


def flags_of_all_ranks_come_together() -> None:
    engine = tiny.engine_for(tiny.recipe(), RANKS)
    for step, (ready, all_ready) in enumerate([(False, False), (RANKS.rank == 0, RANKS.world == 1), (True, True)]):
        stops = step == 1 and RANKS.is_first
        result = one_update(engine, step, ready=ready, stop=lambda stops=stops: stops)
        assert (result.all_ready, result.stop) == (all_ready, step == 1)
        assert result.source_rows == [tiny.ROWS]


CHECKS: list[Callable[[], None]] = [
    skipped_updates_leave_no_trace,
    an_incident_names_ranks_and_rows,
    a_spike_names_every_micro_batch_that_has_a_share_in_it,
    a_gradient_that_only_an_expert_has_is_said_to_be_one,
    a_loss_scale_that_is_too_large_is_no_incident,
    a_loss_that_is_no_number_says_nothing_about_the_scale,
    the_lowest_scale_cannot_be_too_large_without_an_incident,
    a_fixed_scale_cannot_be_too_large_without_an_incident,
    the_guard_goes_from_update_to_update,
    flags_of_all_ranks_come_together,
]

if __name__ == "__main__":
    checks.run([check for check in CHECKS if not sys.argv[2:] or check.__name__ in sys.argv[2:]])
