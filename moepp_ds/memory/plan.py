"""The bytes of one rank, worked out from the recipe, the number of ranks and DeepSpeed's configuration.

With n elements on a rank, p of them its part of a ZeRO partition, w bytes an element of the weights:

1. Groups       the optimizer groups, of a model without memory: dense parameters are divided among all ranks, FFN
                experts among those that hold the same ones. DeepSpeed pads each group to a multiple of 2 x copies.
2. Weights      w n
3. Optimizer    4 p of fp32 weights and 8 p of moments; on the host with offload.
4. Gradients    stage 2, summed in fp32 while weights are narrower: 4 p
                stage 2 else: w for every element of a parameter that the rank owns some of, twice with accumulation
                stage 1: w n with accumulation or without overlap_comm, and w for every element of a parameter that
                the rank owns some of
                offload: 4 p more on the host; on the device stage 2 then keeps none but the fp32 sums
                and the one just made, where it is not among them
5. Buffers      DeepSpeed's buckets, two with overlap_comm; with offload those for its copies.
6. Activations  a rough figure, shown and never what a run is refused for.
7. Saves        with checkpoint.background 12 p on the host, the copy that is written while training goes on.

Read off DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py) and compared with engines' bytes in tests/test_offload.py.
Left out: what the CUDA context takes (the device's free memory leaves it out too), allocators' rounding, and NCCL's
buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from moepp_ds.config import Recipe
from moepp_ds.cross_entropy import LOGITS_AT_ONCE
from moepp_ds.expert_parallel import ExpertParallelMoE, parameter_groups
from moepp_ds.model import MoEPlusPlusModel
from moepp_ds.products import product_dtype

Place = Literal["device", "host"]
FP32 = 4
BYTES_PER_NUMBER = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Group:
    """An optimizer group on one rank: its parameters' elements in order, and the ranks that hold copies of them."""

    sizes: tuple[int, ...]
    copies: int

    @property
    def padded(self) -> int:
        """Elements of the flat group, with what DeepSpeed pads it with."""
        unit = 2 * self.copies
        return -(-sum(self.sizes) // unit) * unit

    @property
    def part(self) -> int:
        """Elements of one rank's partition."""
        return self.padded // self.copies

    @property
    def touched(self) -> int:
        """Elements of all parameters that a partition holds some of: of the partition with most of them."""
        by_partition, start = [0] * self.copies, 0
        for size in self.sizes:
            for partition in range(start // self.part, (start + size - 1) // self.part + 1):
                by_partition[partition] += size
            start += size
        return max(by_partition)


@dataclass(frozen=True)
class Item:
    """One thing that takes memory. sure: false where the figure is rough. at_start: only before training."""

    name: str
    bytes: int
    place: Place
    sure: bool = True
    at_start: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank needs; where there is no device but the host itself, both places are the host's memory."""

    items: tuple[Item, ...]

    def needed(self, *places: Place) -> int:
        """Bytes that are surely needed at once, while starting or while training, whichever is more."""
        sure = [item for item in self.items if item.sure and item.place in places]
        return max(sum(item.bytes for item in sure if item.at_start is phase) for phase in (False, True))


def sizes_by_expert(recipe: Recipe) -> list[tuple[bool, tuple[int, ...]]]:
    """The elements of a rank's parameters by optimizer group, and whether the group is one of FFN experts."""
    factory = partial(ExpertParallelMoE, expert_parallel=recipe.parallel.expert_parallel)
    with torch.device("meta"):  # shapes without memory
        model = MoEPlusPlusModel(recipe.model, eos_id=0, layer_factory=factory)
    groups = parameter_groups(model, weight_decay=recipe.train.weight_decay)
    return [(group.get("moe", False), tuple(parameter.numel() for parameter in group["params"])) for group in groups]


def plan_memory(
    recipe: Recipe,
    config: Mapping[str, Any],
    world: int,
    *,
    on_cpu: bool,
    sizes: Sequence[tuple[bool, tuple[int, ...]]] | None = None,
) -> MemoryPlan:
    """What each of `world` ranks needs for `recipe` with DeepSpeed's configuration `config`.

    on_cpu: the device is the host. Its pages take memory only when written, so there a bucket counts for no more than
    there are gradients. sizes: what `sizes_by_expert` gives, which takes a moment, where the caller has it.
    Raises RecipeError when so many ranks cannot share the batch or the experts.
    """
    accumulates, ways = recipe.accumulation_steps(world) > 1, recipe.parallel.expert_parallel
    groups = [
        Group(elements, copies=world // ways if expert else world)
        for expert, elements in (sizes_by_expert(recipe) if sizes is None else sizes)
    ]
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    width = BYTES_PER_NUMBER[recipe.train.precision]
    sums_fp32 = width < FP32 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    items = [
        Item(f"weights, {recipe.train.precision}", width * sum(group.padded for group in groups), "device"),
        *_optimizer(groups, zero),
        *_gradients(groups, zero, width, sums_fp32=sums_fp32, accumulates=accumulates),
        *_buffers(groups, zero, width, on_cpu=on_cpu),
        *_background_save(recipe, groups),
        Item("activations, roughly", rough_activations(recipe, on_cpu=on_cpu), "device", sure=False),
        Item("logits of the loss, in passing", _logits(recipe, on_cpu=on_cpu), "device", sure=False),
    ]
    if not on_cpu:
        elements = sum(sum(group.sizes) for group in groups)
        items.append(Item("the model as it is made, fp32", FP32 * elements, "host", at_start=True))
    return MemoryPlan(tuple(item for item in items if item.bytes))


def offloads(zero: DeepSpeedZeroConfig) -> bool:
    """Whether the optimizer is on the host."""
    return zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"


def _optimizer(groups: Sequence[Group], zero: DeepSpeedZeroConfig) -> Iterator[Item]:
    parts = sum(group.part for group in groups)
    place: Place = "host" if offloads(zero) else "device"
    yield Item("optimizer's weights, fp32", FP32 * parts, place)
    yield Item("optimizer's two moments, fp32", 2 * FP32 * parts, place)


def _gradients(
    groups: Sequence[Group], zero: DeepSpeedZeroConfig, width: int, *, sums_fp32: bool, accumulates: bool
) -> Iterator[Item]:
    all_elements, touched = (sum(sum(group.sizes) for group in groups), sum(group.touched for group in groups))
    parts, offload = sum(group.part for group in groups), offloads(zero)
    waiting = int(zero.stage) == 1 and (accumulates or not zero.overlap_comm)
    if not waiting:
        yield Item("the largest gradient, as it is made", width * max(max(group.sizes) for group in groups), "device")
    if int(zero.stage) == 1:
        yield Item("gradients of all parameters", width * all_elements if waiting else 0, "device")
        yield Item("gradients of this rank's part", 0 if offload else width * touched, "device")
    elif sums_fp32:
        yield Item("gradients of this rank's part, fp32", FP32 * parts, "device")
    elif offload:
        yield Item("gradients' sums on the host", width * touched if accumulates else 0, "host")
    else:
        yield Item("gradients of this rank's part", width * touched * (1 + accumulates), "device")
    if offload:
        yield Item("gradients for the update, fp32", FP32 * parts, "host")


def _buffers(groups: Sequence[Group], zero: DeepSpeedZeroConfig, width: int, *, on_cpu: bool) -> Iterator[Item]:
    bucket = int(zero.reduce_bucket_size)
    if on_cpu:
        bucket = min(bucket, sum(sum(group.sizes) for group in groups))
    buckets = 2 if zero.overlap_comm else 1
    yield Item(f"{buckets} x reduce_bucket_size", buckets * bucket * width, "device")
    if offloads(zero):
        largest = max(max(group.sizes) for group in groups)
        yield Item("the largest parameter, for copies", largest * width, "device")
        yield Item("the largest parameter, for copies", largest * width, "host")
        yield Item("updated weights on their way", width * sum(group.part for group in groups), "host")


def _background_save(recipe: Recipe, groups: Sequence[Group]) -> Iterator[Item]:
    if recipe.checkpoint.background:
        yield Item("copy for background saves", 3 * FP32 * sum(group.part for group in groups), "host")


def _logits(recipe: Recipe, *, on_cpu: bool) -> int:
    """The most that the cross-entropy holds at a time: a block of logits, their softmax, and a copy of either."""
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    return 3 * FP32 * min(LOGITS_AT_ONCE["cpu" if on_cpu else "cuda"], tokens * recipe.model.vocab_size)


def rough_activations(recipe: Recipe, *, on_cpu: bool) -> int:
    """About what the backward pass of one micro batch finds kept, in bytes: matrices' inputs, the head's gradients.

    With full activation checkpointing the inputs of attention, of experts and of their norm, and one block's inside;
    with selective, of attention its input and its kernel's output, and one block's inside. On a GPU norms keep their
    input; a CPU keeps norms in fp32, and where it has no bf16 units multiplies fp32 copies. Masks, routing and what the
    allocator leaves unused are not in it.
    """
    model, train = recipe.model, recipe.train
    tokens = train.micro_batch_size * recipe.data.seq_len
    width = BYTES_PER_NUMBER[train.precision]
    product, norm = (_product_width(train.precision), FP32) if on_cpu else (width, width)
    hidden, heads = model.hidden_size, (model.num_heads + model.num_kv_heads) * model.head_dim
    all_heads = 4 * model.num_heads * model.head_dim  # queries, keys and values given to every head, and the result
    copies = 2 * hidden if product > width else 0  # queries, keys and values each widen their input
    attention: float = norm * (2 * hidden + (0 if model.qk_norm == "none" else 2) * heads)
    attention += product * (2 * hidden + all_heads + copies)
    shared = model.moe.num_shared_experts * 2 * model.expert_ffn_hidden_size + model.moe.shared_expert_gate * hidden
    expert: float = norm * 2 * hidden
    expert += width * (hidden + shared)
    expert += width * model.moe.computed_ffn_experts * 2 * (hidden + model.expert_ffn_hidden_size)
    expert += FP32 * 2 * hidden * bool(model.moe.router.jitter)  # the noise, and tokens that it was multiplied with
    dense: float = norm * 2 * hidden + width * (hidden + 2 * model.ffn_hidden_size)
    moe = model.num_moe_layers
    experts = moe * expert + (model.num_layers - moe) * dense
    if train.activation_checkpointing == "full":
        kept = model.num_layers * 2 * (width + norm) * hidden + attention + max(expert, dense)
    elif train.activation_checkpointing == "selective":
        outside = width * hidden + product * model.num_heads * model.head_dim
        kept = model.num_layers * outside + attention + experts
    else:
        kept = model.num_layers * attention + experts
    of_the_head = FP32 * hidden * (tokens + model.vocab_size)
    return round(tokens * kept) + of_the_head


def _product_width(precision: str) -> int:
    """Bytes of a number as this machine's CPU multiplies it."""
    if precision == "bf16":
        return product_dtype(torch.empty(0, dtype=torch.bfloat16)).itemsize
    return BYTES_PER_NUMBER[precision]
