"""Real checkpoints of DeepSpeed's own saver, made by DeepSpeed's own engine; tests/test_ds_native.py starts it.

    ... --module tests.programs.native_runs FOLDER

For each run of `native_model.RUNS` that this world allows: two updates, `engine.save_checkpoint(FOLDER/<run>/saved)`,
one more update and another save, and beside them what is true of the first one, taken from the live engine:

    FOLDER/<run>/truth-<rank>.safetensors   `kind|name|start`: this rank's ranges, experts under their global numbers
    FOLDER/<run>/logits.safetensors         of `native_model.TOKENS`, by the rank 0
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from safetensors.torch import save_file
from torch import Tensor

from moepp_ds.engine import join_ranks
from tests.programs.native_model import (
    TOKENS,
    VOCABULARY,
    Run,
    global_name,
    logits_of,
    loss_of,
    make_model,
    runs_of_world,
)

RANKS = join_ranks()


def start(run: Run) -> Any:
    model = make_model(run, expert_parallel_rank=RANKS.rank % run.expert_parallel)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer_groups = [
        {"name": "decay", "params": [p for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"name": "plain", "params": [p for n, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    split = split_params_into_different_moe_groups_for_optimizer(optimizer_groups, max_group_size=run.max_group)
    optimizer = torch.optim.AdamW([group for group in split if group["params"]], lr=1e-2, betas=(0.9, 0.95))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": run.stage, **run.switches},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": run.precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def step(engine: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number * 100 + RANKS.rank)
    rows = torch.randint(0, VOCABULARY, (2, TOKENS.shape[1]), generator=generator)
    engine.backward(loss_of(engine, rows))
    engine.step()


def truth(engine: Any, run: Run) -> dict[str, Tensor]:
    """The ranges that this rank owns, from the live optimizer and not from its state_dict."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    zero, found = engine.optimizer, {}
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        arrays = {"weight": flat.detach(), **zero.optimizer.state[flat]}
        first = dist.get_rank(zero.real_dp_process_group[group]) * len(flat)
        for parameter, offset in zip(zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group]):
            start, stop = max(offset, first), min(offset + parameter.numel(), first + len(flat))
            if start >= stop:
                continue
            inside, mine = slice(start - offset, stop - offset), slice(start - first, stop - first)
            assert torch.equal(parameter.detach().flatten()[inside], flat[mine].to(parameter.dtype))
            name = global_name(run, names[id(parameter)], RANKS.rank % run.expert_parallel)
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                found[f"{kind}|{name}|{inside.start}"] = arrays[kind][mine].clone().float()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    for run in runs_of_world(RANKS.world):
        groups.__dict__.update(_EXPERT_PARALLEL_GROUP={}, _EXPERT_DATA_PARALLEL_GROUP={})
        here, engine = folder / run.name, start(run)
        step(engine, 0)
        step(engine, 1)
        engine.save_checkpoint(str(here / "saved"))
        owned = truth(engine, run) if run.stage else {}
        save_file(owned, here / f"truth-{RANKS.rank}.safetensors")
        engine.module.eval()
        with torch.no_grad():
            logits = logits_of(engine.module, TOKENS).float()
        engine.module.train()
        if RANKS.rank == 0:
            save_file({"logits": logits.contiguous()}, here / "logits.safetensors")
        step(engine, 2)
        engine.save_checkpoint(str(here / "saved"))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
