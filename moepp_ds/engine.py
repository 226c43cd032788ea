"""From a recipe to a DeepSpeed engine. The one place that calls `deepspeed.initialize`.

1. Join the other ranks, with a limit on how long one waits for another.
2. Refuse, on all ranks, a recipe that DeepSpeed would train wrongly, or whose memory there is not.
3. Choose algorithms that give the same bits every time, if the recipe asks for it.
4. Make the model and its optimizer, hand them to DeepSpeed, and put right what it does not see.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from moepp_ds.agreement import all_or_none
from moepp_ds.compilation import check_compiler, compile_attention
from moepp_ds.config import Recipe, RecipeError
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.expert_parallel import ExpertParallelMoE, parameter_groups
from moepp_ds.memory import agreed_room, check_fits
from moepp_ds.model import MoEPlusPlusModel, initialize

COLLECTIVE_TIMEOUT = 1800
"""How long ranks wait for one another where no recipe says it. Seconds."""

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""The settings of CUBLAS_WORKSPACE_CONFIG with which cuBLAS gives the same bits every time."""


class LostRankError(RuntimeError):
    """A collective that did not end: another rank died, hangs, cannot be reached, or is slower than allowed."""


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


def join_ranks(*, timeout: int = COLLECTIVE_TIMEOUT) -> Ranks:
    """Join the process group of the launcher (`deepspeed`, `torchrun`), or make one of a single rank.

    timeout: seconds that a collective waits for the other ranks; `build_engine` gives it to DeepSpeed's groups too.
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
    # DeepSpeed's call, on every rank at every start; nothing a user could do about it
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(), timeout=timedelta(seconds=timeout), verbose=False
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
    room = agreed_room(ranks.device)
    with all_or_none():
        config = deepspeed_config(recipe, world=ranks.world)
        if recipe.train.precision == "fp16" and ranks.device.type == "cpu":
            raise RecipeError("train.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
        choose_algorithms(recipe, ranks.device)
        if recipe.train.compile:
            check_compiler(ranks.device)
        check_fits(recipe, config, ranks.world, room)
    model = MoEPlusPlusModel(
        recipe.model,
        eos_id=eos_id,
        layer_factory=partial(ExpertParallelMoE, expert_parallel=recipe.parallel.expert_parallel),
        recompute=recipe.train.activation_checkpointing,
    )
    initialize(model, seed=recipe.train.seed, std=recipe.model.init_std)
    if recipe.train.compile:
        compile_attention(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=recipe.train.weight_decay),
        lr=recipe.learning_rate(0),
        betas=recipe.train.adam_betas,
        eps=recipe.train.adam_eps,
        fused=True,
    )
    given = deepcopy(config)  # DeepSpeed changes the dictionary it is given
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    model.register_forward_pre_hook(partial(_tell_boundary, engine))
    limit_waiting(recipe.safety.collective_timeout)
    return engine, given


def choose_algorithms(recipe: Recipe, device: torch.device) -> None:
    """With train.deterministic, let PyTorch use only what gives the same bits every time. Before a GPU's first product.

    NCCL's sums depend on its algorithm, which it chooses by the machines: equal machines, equal sums. Raises
    RecipeError for what has no such form.
    """
    asked = recipe.train.deterministic
    if asked and device.type == "cuda":
        if recipe.model.moe.router.threshold is not None:
            raise RecipeError(
                "train.deterministic true with model.moe.router.threshold: a GPU's running sums of probabilities are "
                "not the same bits every time; use top_k, or train.deterministic false"
            )
        given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
        if given not in CUBLAS_WORKSPACES:
            raise RecipeError(
                f"train.deterministic true with CUBLAS_WORKSPACE_CONFIG={given} in the environment: cuBLAS repeats its "
                f"bits only with {' or '.join(CUBLAS_WORKSPACES)}; unset it, or use one of these"
            )
    torch.use_deterministic_algorithms(asked)
    torch.backends.cudnn.deterministic = asked


def limit_waiting(seconds: int) -> None:
    """Set how long this rank waits for the others in every group it is in; DeepSpeed makes its own without a limit."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def naming_lost_ranks(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """Turn what a backend says of a collective that did not end into LostRankError, which says what to look at.

    NCCL on a GPU ends the process by itself after the same time, and its last lines name the collective.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        limit = f"{recipe.safety.collective_timeout} s (safety.collective_timeout)"
        if "timed out" in str(error).lower():
            said = f"waited in vain for another rank, {limit}; if that one is only slow, as in a save, raise the limit"
        else:
            said = "lost the connection to another rank"
        raise LostRankError(
            f"rank {ranks.rank} {said}. Look for what the others said last, for a rank that was killed (memory?), for "
            f"a node or link that is down. The backend's words: {error}"
        ) from error


def _tell_boundary(engine: Any, *_: Any) -> None:
    """Before every forward pass: tell ZeRO whether the backward pass after it is the update's last.

    DeepSpeed does so itself in hooks on the tensors of an output, which it does not find in a dataclass; later it does
    so again, but then all gradients except those of the last bucket have been dealt with by what held before. Offload,
    and stage 1 with overlap_comm, lose gradients by that.
    """
    engine.optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())
