"""The float64 oracle with the weights and the choices of a layer, so that the two can be compared.

A layer's parameters are copied, in float64, and become the oracle's weights through differentiable views, so that the
oracle's gradients come out under the layer's own names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as fields_of

import torch
from torch import Tensor

from moepp_ds.config import MoEConfig
from moepp_ds.dispatch import DispatchPlan
from moepp_ds.moe_layer import MoELayer, MoEOutput
from moepp_ds.reference import ReferenceOutput, ReferenceSettings, ReferenceWeights, reference_layer
from moepp_ds.router import Routing

Routes = Sequence[Sequence[tuple[int, bool]]]


@dataclass
class Oracle:
    """The oracle's copy of one layer. `leaves` are float64 and carry the layer's parameter names."""

    layer: MoELayer
    config: MoEConfig
    leaves: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = {
            name: parameter.detach().cpu().double().requires_grad_()
            for name, parameter in self.layer.named_parameters()
        }

    def __call__(
        self,
        x_TD: Tensor,
        previous_TE: Tensor | None,
        routes: Routes | None = None,
        *,
        told: Mapping[str, Tensor | None] | None = None,
        dropless: bool | None = None,
    ) -> ReferenceOutput:
        """As the layer is called; told: bias_E, share_E, noise_TD, in any float type."""
        weights, wide = self._weights(), {name: t if t is None else t.double() for name, t in (told or {}).items()}
        if weights.residual_EE is None:
            previous_TE = None  # what the layer ignores, the oracle refuses
        return reference_layer(x_TD, previous_TE, weights, self._settings(dropless), routes, **wide)

    def _weights(self) -> ReferenceWeights:
        leaves, width = self.leaves, self.layer.experts.down_EFD.shape[1]
        gate_EFD, up_EFD, down_EDF = self._swiglu("experts", width)
        shared = self._swiglu("shared", width) if self.layer.shared else (None, None, None)
        assert self.config.num_shared_experts == (0 if shared[0] is None else len(shared[0]))
        hidden_size = gate_EFD.shape[-1]
        return ReferenceWeights(
            router_ED=leaves.get("router.weight_ED"),
            gate_EFD=gate_EFD,
            up_EFD=up_EFD,
            down_EDF=down_EDF,
            constant_selector_J2D=leaves.get("constants.selector_J2D", gate_EFD.new_zeros(0, 2, hidden_size)),
            constant_value_JD=leaves.get("constants.value_JD", gate_EFD.new_zeros(0, hidden_size)),
            residual_EE=leaves.get("router.residual_EE"),
            hidden_XD=leaves.get("router.hidden_XD"),
            router_EX=leaves.get("router.weight_EX"),
            shared_gate_EFD=shared[0],
            shared_up_EFD=shared[1],
            shared_down_EDF=shared[2],
            shared_gate_D=leaves.get("shared_gate_D"),
        )

    def _swiglu(self, name: str, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of experts of that width each, also where the layer holds several as one wide expert."""
        gate_EDG, up_EDG = self.leaves[f"{name}.gate_up_EDG"].chunk(2, dim=-1)
        down_EGD = self.leaves[f"{name}.down_EFD"]
        hidden_size = down_EGD.shape[-1]
        gate_EFD, up_EFD, down_EFD = (
            rows_EGD.reshape(-1, width, hidden_size)
            for rows_EGD in (gate_EDG.transpose(1, 2), up_EDG.transpose(1, 2), down_EGD)
        )
        return gate_EFD, up_EFD, down_EFD.transpose(1, 2)

    def _settings(self, dropless: bool | None) -> ReferenceSettings:
        config = self.config
        names = {setting.name for setting in fields_of(ReferenceSettings)} & set(type(config).model_fields)
        settings = {name: getattr(config, name) for name in names}
        settings.update(threshold=config.router.threshold, logit_std=config.router.logit_std)
        assert settings.keys() == {setting.name for setting in fields_of(ReferenceSettings)}
        return ReferenceSettings(**settings | ({} if dropless is None else {"dropless": dropless}))


def gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient by name; zero where the graph does not reach, which only the oracle may leave out."""
    found = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return dict(zip(leaves, found))


def routes_of(routing: Routing, plan: DispatchPlan) -> list[list[tuple[int, bool]]]:
    """Whom each token chose, best first, and who got a seat."""
    routes: list[list[tuple[int, bool]]] = [[] for _ in routing.logits_TE]
    for token, expert, kept in zip(routing.token_N.tolist(), routing.expert_N.tolist(), plan.kept_N.tolist()):
        routes[token].append((expert, kept))
    return routes


def counts_of(out: MoEOutput | ReferenceOutput) -> dict[str, list[int]]:
    """What was counted, of a layer or of the oracle."""
    held = out.statistics if isinstance(out, MoEOutput) else out
    return {name: [int(n) for n in getattr(held, name)] for name in ("wanted_E", "kept_E", "first_E", "histogram_H")}


def values_of(out: MoEOutput | ReferenceOutput) -> dict[str, Tensor]:
    """All other results, of a layer or of the oracle, under one set of names."""
    found = {name: getattr(out, name) for name in ("output_TD", "logits_TE", "balance_loss", "z_loss")}
    if isinstance(out, MoEOutput):
        sums, tokens = out.statistics, len(out.output_TD)
        found.update(probability_TE=out.routing.probability_TE, entropy=sums.entropy)
        return {**found, "top 1": sums.top_1, "top 2": sums.top_2, "normalised balance": sums.balance / tokens}
    found.update(probability_TE=out.probability_TE, entropy=out.entropy)
    return {**found, "top 1": out.top1, "top 2": out.top2, "normalised balance": out.normalized_balance}


def close(actual: Tensor, expected: Tensor, name: str, *, limit: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit, msg=lambda text: f"{name}: {text}")


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; 0 / 0, two gradients that are zero, agrees."""
    difference = (actual.detach().cpu().double() - expected).norm().item()
    return difference / expected.norm().item() if difference else 0.0
