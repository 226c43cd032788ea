"""What takes turns in a measurement of layers: layers, on one machine, forward alone and forward and backward."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moepp_ds import __version__
from moepp_ds.bench.presets import LayerSizes
from moepp_ds.experts import FFNExperts
from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings, MoELayer, MoEOutput
from moepp_ds.products import multiply, product_dtype
from moepp_ds.timing import take_turns

DIRECTIONS = ("forward", "forward_backward")


class Case(Protocol):
    """Something measured."""

    def forward(self) -> object:
        """As in evaluation: nothing is kept for a backward pass."""

    def forward_backward(self) -> object:
        """As in training: gradients of everything that learns, and of the tokens."""


@dataclass(frozen=True)
class Graph:
    """A case by automatic differentiation. compute: the outputs. wanted: what gets a gradient."""

    compute: Callable[[], Sequence[Tensor]]
    wanted: Sequence[Tensor]

    @torch.no_grad()
    def forward(self) -> None:
        """The outputs."""
        self.compute()

    def forward_backward(self) -> None:
        """The outputs, and gradients where they have some."""
        outputs = self.compute()
        torch.autograd.grad(outputs, self.wanted, [torch.ones_like(output) for output in outputs])


@dataclass(frozen=True)
class PlainProducts:
    """Nothing but the matrix products of FFN experts, by the library and in the dtype that are fastest here.

    Two forward (gate beside value is one) and four more backward, for each expert with `counts[e]` consecutive rows.
    What a layer can be at best, if all else took no time.
    """

    rows_RD: Tensor
    hidden_RF: Tensor
    product_RG: Tensor
    gate_up_EDG: Tensor
    down_EFD: Tensor
    counts: tuple[int, ...]

    def forward(self) -> None:
        """x W_gate and x W_up together, then W_down."""
        for at, gate_up_DG, down_FD in self._blocks():
            multiply(self.rows_RD[at], gate_up_DG)
            multiply(self.hidden_RF[at], down_FD)

    def forward_backward(self) -> None:
        """The same, and for each product one for its input and one for its weight."""
        self.forward()
        for at, gate_up_DG, down_FD in self._blocks():
            multiply(self.rows_RD[at], down_FD.t())
            multiply(self.hidden_RF[at].t(), self.rows_RD[at])
            multiply(self.product_RG[at], gate_up_DG.t())
            multiply(self.rows_RD[at].t(), self.product_RG[at])

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        start = 0
        for count, gate_up_DG, down_FD in zip(self.counts, self.gate_up_EDG, self.down_EFD):
            yield slice(start, start + count), gate_up_DG, down_FD
            start += count


def plain_products(experts: FFNExperts, counts: Sequence[int]) -> PlainProducts:
    """The products of these experts with so many rows each; what is multiplied is at random."""
    gate_up_EDG, down_EFD = (parameter.detach() for parameter in (experts.gate_up_EDG, experts.down_EFD))
    dtype = product_dtype(gate_up_EDG)
    _, width, hidden = down_EFD.shape

    def at_random(columns: int) -> Tensor:
        return torch.randn(sum(counts), columns, dtype=dtype, device=down_EFD.device)

    return PlainProducts(
        rows_RD=at_random(hidden),
        hidden_RF=at_random(width),
        product_RG=at_random(2 * width),
        gate_up_EDG=gate_up_EDG.to(dtype),
        down_EFD=down_EFD.to(dtype),
        counts=tuple(counts),
    )


def measure(cases: Mapping[str, Case], *, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by direction and case, a time for each round; in a round all cases take turns."""
    return {
        direction: take_turns({name: getattr(case, direction) for name, case in cases.items()}, repeats=repeats)
        for direction in DIRECTIONS
    }


@contextmanager
def watching_layers(model: nn.Module, watch: Callable[[Any, Any, MoEOutput], None]) -> Iterator[None]:
    """Inside, every forward pass of a MoE layer of the model is followed by watch(layer, inputs, output)."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_layer(
    sizes: LayerSizes, kinds: ExpertKinds, settings: LayerSettings, *, dtype: torch.dtype, device: torch.device
) -> MoELayer:
    """A layer with weights at random."""
    layer = MoELayer(sizes.hidden_size, sizes.ffn_hidden_size, kinds, settings, has_residual=False).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(dtype)


def behind_router(layer: MoELayer) -> list[nn.Parameter]:
    """What learns in a layer whose routing is given."""
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith("router.")]


def vanilla(kinds: ExpertKinds) -> ExpertKinds:
    """The FFN experts alone."""
    return replace(kinds, num_constant=0, num_copy=0, num_zero=0)


def in_words(machine: Mapping[str, Any]) -> str:
    """What `machine` tells, on a line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "moepp_ds": __version__,
    }


def _processor() -> str:
    """Its model; by that and its libraries products differ."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
