"""From a recipe to a DeepSpeed engine. The one place that calls `deepspeed.initialize`."""

from __future__ import annotations

import os
import socket
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from moepp_ds.agreement import all_or_none
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.expert_parallel import ExpertParallelMoE, parameter_groups
from moepp_ds.model import MoEPlusPlusModel, initialize

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective of all ranks waits for one of them before the job fails: loading a large checkpoint takes
minutes. DeepSpeed makes the groups of expert parallelism with the backend's own time."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The rank that writes shared files and prints."""
        return self.rank == 0


def join_ranks() -> Ranks:
    """Join the process group of the launcher (`deepspeed`, `torchrun`), or make one of a single rank.

    RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* come from the launcher; without one they are set here.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    accelerator = get_accelerator()
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError("RANK is set and LOCAL_RANK is not, so ranks of a node would share a device; set both")
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        # Made for inference and used nowhere here; left on, a first start needs a C++ compiler and a minute of it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(), timeout=COLLECTIVE_TIMEOUT, verbose=False
        )
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(accelerator.device_name(local_rank)))


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def build_engine(recipe: Recipe, ranks: Ranks, *, eos_id: int) -> tuple[Any, dict[str, Any]]:
    """Return the DeepSpeed engine around a freshly initialised model, and the configuration DeepSpeed was given.

    eos_id: the token that ends a document in the shards. Collective; raises AgreedError for a recipe that cannot run.
    """
    with all_or_none():
        config = deepspeed_config(recipe, world=ranks.world)
        if recipe.train.precision == "fp16" and ranks.device.type == "cpu":
            raise RecipeError("train.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    model = MoEPlusPlusModel(
        recipe.model,
        eos_id=eos_id,
        layer_factory=partial(ExpertParallelMoE, expert_parallel=recipe.parallel.expert_parallel),
        recompute=recipe.train.activation_checkpointing,
    )
    initialize(model, seed=recipe.train.seed, std=recipe.model.init_std)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=recipe.train.weight_decay),
        lr=recipe.learning_rate(0),
        betas=recipe.train.adam_betas,
        eps=recipe.train.adam_eps,
        fused=True,
    )
    given = deepcopy(config)  # DeepSpeed changes the dictionary it is given
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, given
