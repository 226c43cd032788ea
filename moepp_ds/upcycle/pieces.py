"""All parameters of the upcycled model, one piece after another, as `start.write_start` takes them.

No more than one stored tensor of each folder is in memory at a time, two for an FFN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moepp_ds.config import ModelConfig
from moepp_ds.hf_folder import HFFolder
from moepp_ds.upcycle.fresh import complete_router, fresh_parameter, normal
from moepp_ds.upcycle.layout import Layout, Matrix, StoredFFN
from moepp_ds.upcycle.parts import Part

Piece = tuple[str, int, Tensor]
Attention = Literal["average", "first"]


@dataclass(frozen=True)
class Source:
    """An open folder and where things are in it."""

    folder: HFFolder
    layout: Layout


@dataclass(frozen=True)
class Plan:
    """Everything that decides the new weights.

    parts: of each routed expert of a dense model, None for a MoE. noise: relative to an expert's own spread.
    even: whether fresh routers start with all FFN experts alike.
    """

    sources: Sequence[Source]
    model: ModelConfig
    parts: Sequence[Part] | None
    attention: Attention
    noise: float
    even: bool
    seed: int


def upcycled_pieces(plan: Plan, shapes: dict[str, list[int]]) -> Iterator[Piece]:
    """Pieces (parameter, first element, tensor) that together are every parameter; shapes: of all parameters."""
    common = plan.sources if plan.attention == "average" else plan.sources[:1]
    for name in plan.sources[0].layout.plain:
        yield name, 0, _mean(source.folder.read(source.layout.plain[name]).float() for source in common)
    for i in range(plan.model.num_layers):
        if plan.model.is_moe(i):
            yield from _experts(plan, i)
        else:
            networks = [(source.folder, source.layout.dense[i]) for source in common]
            yield from _network(f"blocks.{i}.ffn", 0, networks)
    for name, shape in shapes.items():
        parameter = _trained_router(plan, name, shape)
        if parameter is None:
            parameter = fresh_parameter(name, shape, plan.model, seed=plan.seed, even=plan.even)
        if parameter is not None:
            yield name, 0, parameter


def _trained_router(plan: Plan, name: str, shape: list[int]) -> Tensor | None:
    """A router whose FFN rows the checkpoint has."""
    source = plan.sources[0]
    if plan.parts is not None or not name.endswith(".router.weight_ED"):
        return None
    rows_MD = source.folder.read(source.layout.routers[int(name.split(".")[1])]).float()
    return complete_router(name, shape, rows_MD, seed=plan.seed)


def _experts(plan: Plan, i: int) -> Iterator[Piece]:
    """The routed and the shared experts of one layer."""
    routed, shared, first = f"blocks.{i}.moe.experts", f"blocks.{i}.moe.shared", plan.sources[0]
    shared_width = plan.model.moe.num_shared_experts * plan.model.expert_ffn_hidden_size
    if plan.parts is None:
        for e, network in enumerate(first.layout.experts[i]):
            yield from _network(routed, e, [(first.folder, network)])
        if shared_width:
            yield from _network(shared, 0, [(first.folder, first.layout.shared[i])])
        return
    for e, part in enumerate(plan.parts):
        source = plan.sources[part.folder]
        for name, start, tensor in _network(routed, e, [(source.folder, source.layout.dense[i])], part):
            if plan.noise:
                spread = (tensor - tensor.mean()).square().mean().sqrt()
                tensor = tensor + plan.noise * spread * normal(list(tensor.shape), f"{name}/{e}", seed=plan.seed)
            yield name, start, tensor
    if shared_width:
        yield from _network(shared, 0, [(first.folder, first.layout.dense[i])], Part(0, 0, shared_width))


def _network(
    name: str, expert: int, networks: Sequence[tuple[HFFolder, StoredFFN]], part: Part | None = None
) -> Iterator[Piece]:
    """The two pieces of expert `expert`: the mean over folders of one FFN, or of a part of its inner features."""
    inner = slice(None) if part is None else slice(part.start, part.stop)
    gate_up_DG = _mean(
        torch.cat((_matrix(folder, network.gate)[inner], _matrix(folder, network.value)[inner])).T.float()
        for folder, network in networks
    )
    yield f"{name}.gate_up_EDG", expert * gate_up_DG.numel(), gate_up_DG
    down_FD = _mean(_matrix(folder, network.down)[:, inner].T.float() for folder, network in networks)
    yield f"{name}.down_EFD", expert * down_FD.numel(), down_FD


def _matrix(folder: HFFolder, matrix: Matrix) -> Tensor:
    if matrix.expert is None:
        return folder.read(matrix.tensor, matrix.start, matrix.stop)
    return folder.read(matrix.tensor, matrix.expert, matrix.expert + 1)[0][matrix.start : matrix.stop]


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    """The mean, and of one tensor that tensor."""
    iterator = iter(tensors)
    total, count = next(iterator), 1
    for tensor in iterator:
        total, count = total + tensor, count + 1
    return total / count if count > 1 else total
