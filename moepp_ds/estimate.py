"""What a recipe will take, before anything is bought or allocated (`moepp estimate`).

* parameters and FLOPs by `config.derived`, memory of one rank by `memory.plan`
* all-to-all: an FFN assignment whose expert is on another rank travels there and back, its gradient too, as D numbers.
  In balance (P - 1) / P of them leave a rank of P; with full activation checkpointing they travel once more
* time: the FLOPs of an update, three times those of the forward pass and what activation checkpointing does again, at
  a share of what the device can do. Communication that does not hide behind products,
  the optimizer and data are in that share: measure it once for a cluster, then it carries over
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from moepp_ds.config import Recipe, RecipeError, count_parameters, flops_per_token, journeys_of_an_assignment
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.load import default_device
from moepp_ds.memory.check import table
from moepp_ds.memory.plan import BYTES_PER_NUMBER, MemoryPlan, plan_memory
from moepp_ds.products import multiply, product_dtype
from moepp_ds.timing import seconds_of

THIS_MACHINE = "this"
_SIDE = {"cpu": 2048, "cuda": 8192}
_PRODUCTS = 7


@dataclass(frozen=True)
class Device:
    """What one rank computes on. flops: dense matrix products a second in bf16. bytes: memory; None if not known."""

    flops: float
    bytes: int | None


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "a100-40gb": Device(312e12, 40 * 10**9),
        "a100-80gb": Device(312e12, 80 * 10**9),
        "h100": Device(989e12, 80 * 10**9),
        "h200": Device(989e12, 141 * 10**9),
        "b200": Device(2250e12, 180 * 10**9),
        "mi300x": Device(1307e12, 192 * 10**9),
    }
)
"""Vendors' data sheets: bf16 without sparsity. Products in fp32 are far slower there and have no estimate."""


@dataclass(frozen=True)
class Estimate:
    """Of one rank where not said otherwise; an update is one optimizer step.

    flops_per_token: of the forward pass. all_to_all_bytes: sent by a rank in an update. memory: of one rank, see
    `MemoryPlan`. seconds_per_update and what follows from it: at `utilization` of the device's FLOPs.
    """

    world: int
    expert_parallel: int
    parameters_total: int
    parameters_activated: int
    flops_per_token: float
    flops_per_update: float
    all_to_all_bytes: int
    memory: MemoryPlan
    device: str
    device_flops: float
    device_bytes: int | None
    utilization: float
    seconds_per_update: float
    tokens_per_second: float
    updates: int
    days: float

    def as_json(self) -> dict[str, Any]:
        """All of it, with the sums of the memory."""
        memory = {
            "device": self.memory.needed("device"),
            "host": self.memory.needed("host"),
            "items": [asdict(item) for item in self.memory.items],
        }
        return {**asdict(self), "memory": memory}


def estimate(recipe: Recipe, world: int, *, device: str, utilization: float) -> Estimate:
    """Estimate a run of `recipe` on `world` ranks. Raises RecipeError where they cannot share it.

    device: a name of DEVICES, or `this`, whose speed is measured with a matrix product in the recipe's precision.
    """
    if not 0 < utilization <= 1:
        raise RecipeError(f"a utilization of {utilization:g} is no share of a device; give one in (0, 1], such as 0.4")
    on = _this_machine(recipe) if device == THIS_MACHINE else _named(device, recipe)
    on_cpu = device == THIS_MACHINE and default_device().type == "cpu"
    memory = plan_memory(recipe, deepspeed_config(recipe, world), world, on_cpu=on_cpu)
    flops = recipe.flops_per_update / world
    seconds = flops / (utilization * on.flops)
    parameters = count_parameters(recipe.model)
    return Estimate(
        world=world,
        expert_parallel=recipe.parallel.expert_parallel,
        parameters_total=parameters.total,
        parameters_activated=parameters.activated,
        flops_per_token=flops_per_token(recipe.model, recipe.data.seq_len),
        flops_per_update=flops,
        all_to_all_bytes=all_to_all_bytes(recipe, world),
        memory=memory,
        device=device,
        device_flops=on.flops,
        device_bytes=on.bytes,
        utilization=utilization,
        seconds_per_update=seconds,
        tokens_per_second=recipe.train.batch_tokens / seconds,
        updates=recipe.total_steps,
        days=recipe.total_steps * seconds / 86400,
    )


def all_to_all_bytes(recipe: Recipe, world: int) -> int:
    """What a rank sends to others in an update, in bytes, when all experts have what the balance aims at."""
    model, ways = recipe.model, recipe.parallel.expert_parallel
    assignments = recipe.train.batch_tokens / world * model.moe.computed_ffn_experts * model.num_moe_layers
    journeys = journeys_of_an_assignment(recipe.train.activation_checkpointing)
    row = model.hidden_size * BYTES_PER_NUMBER[recipe.train.precision]
    return round(assignments * (ways - 1) / ways * journeys * row)


def _named(device: str, recipe: Recipe) -> Device:
    if device not in DEVICES:
        raise RecipeError(f"no device is called {device}; use {', '.join(DEVICES)}, or {THIS_MACHINE} to measure")
    if recipe.train.precision == "fp32":
        raise RecipeError(
            f"the speed of a {device} is known for bf16 and fp16, not for train.precision fp32; "
            f"add --set train.precision=bf16, or measure with --device {THIS_MACHINE}"
        )
    return DEVICES[device]


def _this_machine(recipe: Recipe) -> Device:
    """Measured with products of square matrices, as fast as this machine makes them in the recipe's precision."""
    device = default_device()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.train.precision]
    dtype = product_dtype(torch.empty(0, dtype=dtype, device=device))
    side = _SIDE["cpu" if device.type == "cpu" else "cuda"]  # the clock of a GPU takes as long as a small product
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: multiply(left, right)) for _ in range(_PRODUCTS)]
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Device(2 * side**3 / median(seconds), memory)


def print_estimate(found: Estimate, recipe: Recipe) -> None:
    """What was estimated, as lines and as the table of a rank's memory."""
    lines = [*recipe.arithmetic(found.world), "", table(found.memory)]
    if found.device_bytes is not None:
        roughly = sum(item.bytes for item in found.memory.items if item.place == "device" and not item.at_start)
        lines.append(f"with activations {roughly / 1e9:.3g} of the {found.device_bytes / 1e9:.3g} GB of {found.device}")
        if roughly > found.device_bytes:
            lines.append(
                "too much; what takes less: a smaller train.micro_batch_size, train.activation_checkpointing selective "
                "or full, a larger parallel.expert_parallel, ds_configs/zero2_offload.json, more ranks"
            )
    sent = f"{found.all_to_all_bytes / 1e9:.3g} GB sent by a rank in an update"
    lines += [
        "",
        f"all-to-all: {sent if found.expert_parallel > 1 else 'none, every rank has all experts'}",
        f"{found.device}: {found.device_flops / 1e12:.3g} TFLOP/s; at {found.utilization:.0%} of it an update takes "
        f"{found.seconds_per_update:.3g} s, which is {found.tokens_per_second:,.0f} tokens/s; "
        f"{found.updates:,} updates take {found.days:,.3g} days",
    ]
    print("\n".join(lines))
