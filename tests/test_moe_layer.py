"""The layer against the float64 oracle: outputs, losses, logits, counts and every gradient.

A layer's parameters are copied, in float64, and become the oracle's weights through differentiable views, so
that the oracle's gradients come out under the layer's own names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moepp_ds import moe_layer
from moepp_ds.config import MoEConfig, expert_capacity
from moepp_ds.dispatch import DispatchPlan, plan_dispatch
from moepp_ds.experts import Backend
from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings, LocalExchange, MoELayer, MoEOutput, Parcel
from moepp_ds.reference import ReferenceOutput, ReferenceSettings, ReferenceWeights, reference_layer
from moepp_ds.router import Routing

D, F = 8, 4
"""Rows of 8 and 4 numbers are multiples of 16 bytes in fp32; bf16 needs F = 8 for grouped_mm."""


def moe_config(**changes: object) -> MoEConfig:
    """4 FFN + 2 constant + 1 copy + 1 zero experts, top 2, unless changed."""
    return MoEConfig.model_validate({"num_ffn_experts": 4, "num_constant": 2, **changes})


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_layer(
    config: MoEConfig,
    *,
    has_residual: bool = False,
    seed: int = 0,
    ffn_hidden_size: int = F,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> MoELayer:
    """A layer in training mode with random weights, wide enough apart for a lively routing."""

    def seats(num_tokens: int) -> list[int]:
        capacity = expert_capacity(config, num_tokens)
        others = [capacity.zero_computation] * config.num_zero_computation
        return [capacity.ffn] * config.num_ffn_experts + others

    settings = LayerSettings(
        top_k=config.top_k,
        tau=config.tau,
        seats=None if config.dropless else seats,
        drop_policy=config.drop_policy,
    )
    kinds = ExpertKinds(config.num_ffn_experts, config.num_constant, config.num_copy, config.num_zero)
    layer = MoELayer(D, ffn_hidden_size, kinds, settings, has_residual=has_residual).to(device, dtype)
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = 0.5 * random(*parameter.shape, seed=100 * seed + number, dtype=dtype, device=device)
    return layer


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
        routes: Sequence[Sequence[tuple[int, bool]]] | None = None,
        dropless: bool | None = None,
    ) -> ReferenceOutput:
        gate_up_EDG, config = self.leaves["experts.gate_up_EDG"], self.config
        width = gate_up_EDG.shape[-1] // 2
        weights = ReferenceWeights(
            router_ED=self.leaves["router.weight_ED"],
            gate_EFD=gate_up_EDG[:, :, :width].transpose(1, 2),
            up_EFD=gate_up_EDG[:, :, width:].transpose(1, 2),
            down_EDF=self.leaves["experts.down_EFD"].transpose(1, 2),
            constant_selector_J2D=self.leaves.get("constants.selector_J2D", torch.zeros(0, 2, D).double()),
            constant_value_JD=self.leaves.get("constants.value_JD", torch.zeros(0, D).double()),
            residual_EE=self.leaves.get("router.residual_EE"),
        )
        settings = ReferenceSettings(
            top_k=config.top_k,
            num_copy=config.num_copy,
            num_zero=config.num_zero,
            tau=config.tau,
            capacity_factor=config.capacity_factor,
            dropless=config.dropless if dropless is None else dropless,
            capacity_counts=config.capacity_counts,
            drop_policy=config.drop_policy,
        )
        return reference_layer(x_TD, previous_TE, weights, settings, routes)


Layer = Callable[[Tensor, Tensor | None], MoEOutput | ReferenceOutput]
"""A layer and its oracle are called alike, and what they return has the same names for the same things."""


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient by name; zero where the graph does not reach, which only the oracle may leave out."""
    found = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return dict(zip(leaves, found))


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")


def check_exact(config: MoEConfig, *, num_tokens: int, has_residual: bool, seed: int = 0) -> None:
    """Layer and oracle, each routing for itself, agree to 1e-10 in all they return and in every gradient."""
    layer = make_layer(config, has_residual=has_residual, seed=seed)
    oracle = Oracle(layer, config)
    x_TD = random(num_tokens, D, seed=seed + 1).requires_grad_()
    inputs, before_TE = {"x": x_TD}, None
    if has_residual:
        before_TE = random(num_tokens, config.num_experts, seed=seed + 2).requires_grad_()
        inputs["previous logits"] = before_TE

    out, expected = layer(x_TD, before_TE), oracle(x_TD, before_TE)
    close(out.output_TD, expected.output_TD, "output")
    close(out.logits_TE, expected.logits_TE, "logits")
    close(out.balance_loss, expected.balance_loss, "balance loss")
    assert tuple(out.wanted_E.tolist()) == expected.wanted_E
    assert tuple(out.kept_E.tolist()) == expected.kept_E

    # Random directions, so that no gradient can hide behind another: all three outputs at once.
    output_grad_TD = random(num_tokens, D, seed=seed + 3)
    logits_grad_TE = random(num_tokens, config.num_experts, seed=seed + 4)

    def loss_of(output_TD: Tensor, logits_TE: Tensor, balance: Tensor) -> Tensor:
        return (output_TD * output_grad_TD).sum() + (logits_TE * logits_grad_TE).sum() + 3 * balance

    loss = loss_of(out.output_TD, out.logits_TE, out.balance_loss)
    actual_grads = gradients(loss, {**inputs, **dict(layer.named_parameters())})
    loss = loss_of(expected.output_TD, expected.logits_TE, expected.balance_loss)
    for name, expected_grad in gradients(loss, {**inputs, **oracle.leaves}).items():
        close(actual_grads[name], expected_grad, f"gradient of {name}")


# float64, the layer routes for itself

KINDS: dict[str, dict[str, object]] = {
    "all kinds": {},
    "vanilla": {"num_constant": 0, "num_copy": 0, "num_zero": 0},
    "no constant": {"num_constant": 0},
    "no copy": {"num_copy": 0},
    "no zero": {"num_zero": 0},
    "several of each": {"num_ffn_experts": 3, "num_constant": 3, "num_copy": 2, "num_zero": 2},
    "one FFN": {"num_ffn_experts": 1, "num_constant": 1},
}
SEATING: dict[str, dict[str, object]] = {
    "dropless": {"dropless": True},
    "probability, assignments": {},
    "probability, tokens": {"capacity_counts": "tokens"},
    "position, assignments": {"drop_policy": "position"},
    "position, tokens": {"drop_policy": "position", "capacity_counts": "tokens"},
}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seating", SEATING)
@pytest.mark.parametrize("kinds", KINDS)
def test_layer_is_the_oracle(kinds: str, seating: str, top_k: int) -> None:
    config = moe_config(**KINDS[kinds], **SEATING[seating], top_k=top_k)
    cases = ((1, 0.75, True), (2, 1.0, False), (9, 0.25, True), (13, 0.75, False))
    for num_tokens, tau, has_residual in cases:
        changed = config.model_copy(update={"tau": tau})
        check_exact(changed, num_tokens=num_tokens, has_residual=has_residual, seed=num_tokens)


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("drop_policy", ["probability", "position"])
def test_tokens_that_lose_every_choice(drop_policy: str, tau: float) -> None:
    # gamma 0.1: FFN experts have one seat and the others one or two, at most 12 in all, so at least 12 of 24
    # tokens get none of the two experts that each wants.
    config = moe_config(capacity_factor=0.1, tau=tau, drop_policy=drop_policy)
    check_exact(config, num_tokens=24, has_residual=True)
    out = make_layer(config)(random(24, D, seed=1), None)
    assert out.kept_E[:4].max() == 1 and out.kept_E.sum() <= 12 and out.wanted_E.sum() == 48
    assert (out.output_TD == 0).all(dim=-1).sum() >= 12


def test_every_expert_at_once() -> None:
    config = moe_config(top_k=8)
    check_exact(config, num_tokens=5, has_residual=True)
    assert make_layer(config)(random(5, D, seed=1), None).wanted_E.tolist() == [5] * 8


@pytest.mark.parametrize("seating", SEATING)
def test_two_layers_chained_by_the_gating_residual(seating: str) -> None:
    # The loss is of the second layer alone: the first router learns through the logits that travel, too.
    config = moe_config(**SEATING[seating])
    layers = [make_layer(config, has_residual=second, seed=7 + second) for second in (False, True)]
    oracles = [Oracle(layer, config) for layer in layers]
    x_TD, grad_TD = random(11, D, seed=1).requires_grad_(), random(11, D, seed=2)

    def run(first: Layer, second: Layer) -> tuple[Tensor, Tensor]:
        out = first(x_TD, None)
        after = second(x_TD + out.output_TD, out.logits_TE)
        return after.output_TD, (after.output_TD * grad_TD).sum() + 3 * after.balance_loss

    output_TD, loss = run(*layers)
    expected_TD, expected_loss = run(*oracles)
    close(output_TD, expected_TD, "output")
    for layer, oracle in zip(layers, oracles):
        actual = gradients(loss, dict(layer.named_parameters()))
        for name, expected in gradients(expected_loss, oracle.leaves).items():
            close(actual[name], expected, name)
    actual_x, expected_x = (gradients(total, {"x": x_TD})["x"] for total in (loss, expected_loss))
    close(actual_x, expected_x, "x")
    first_router = gradients(output_TD.sum(), dict(layers[0].named_parameters()))["router.weight_ED"]
    assert first_router.abs().max() > 0


@pytest.mark.parametrize("top_k", [1, 3])
def test_every_parameter_is_in_the_graph(top_k: int) -> None:
    # One token reaches at most three of eight experts; all parameters take part nevertheless (no materialised
    # zeros).
    layer = make_layer(moe_config(top_k=top_k), has_residual=True)
    layer(random(1, D, seed=1), random(1, 8, seed=2)).output_TD.sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is None] == []


# by hand


def test_layer_by_hand() -> None:
    """One FFN (0), one constant (1), one copy (2), one zero expert (3); top 2, dropless.

    Logits are x itself for x = [a, b, c, d, 0...]: token 0 has log 4, log 2, 0, 0 and chooses FFN and
    constant with 4/8 and 2/8; token 1 has 0, 0, log 3, log 5 and chooses zero (5/10) and copy (3/10).
    The FFN expert has gate 0, hence silu(0) = 0 and gives nothing. The constant expert has W_c = 0, hence
    (x + v) / 2 with v = ones. Balance: f = [1/2] * 4, P = [(4/8 + 1/10) / 2, ...] = [.3, .175, .2125, .3125];
    L = 1/2 * (.3 + 0.75 * .7) = 0.4125.
    """
    layer = make_layer(moe_config(num_ffn_experts=1, num_constant=1, dropless=True))
    assert layer.constants is not None
    layer.router.weight_ED.data = torch.eye(4, D).double()
    layer.experts.gate_up_EDG.data[..., :F] = 0
    layer.constants.selector_J2D.data.zero_()
    layer.constants.value_JD.data.fill_(1)
    x_TD = torch.zeros(2, D, dtype=torch.float64)
    x_TD[:, :4] = torch.tensor([[4, 2, 1, 1], [1, 1, 3, 5]]).double().log()
    out = layer(x_TD, None)
    close(out.output_TD[0], 2 / 8 * (x_TD[0] + 1) / 2, "token 0")
    close(out.output_TD[1], 3 / 10 * x_TD[1], "token 1")
    close(out.balance_loss, torch.tensor(0.4125, dtype=torch.float64), "balance loss")
    assert out.wanted_E.tolist() == out.kept_E.tolist() == [1, 1, 1, 1]


# modes


def test_evaluation_is_dropless() -> None:
    config = moe_config(capacity_factor=0.2)
    layer, x_TD = make_layer(config), random(16, D, seed=1)
    dropping = layer(x_TD, None)
    assert dropping.kept_E.sum() < dropping.wanted_E.sum() == 32
    out, expected = layer.eval()(x_TD, None), Oracle(layer, config)(x_TD, None, dropless=True)
    assert torch.equal(out.kept_E, out.wanted_E) and torch.equal(out.wanted_E, dropping.wanted_E)
    close(out.output_TD, expected.output_TD, "output")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_recomputation_changes_nothing_and_routes_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"router": 0, "plan": 0, "experts": 0}

    def counted_plan(**arguments: object) -> DispatchPlan:
        calls["plan"] += 1
        return plan_dispatch(**arguments)  # type: ignore[arg-type]

    def count(name: str) -> None:
        calls[name] += 1

    config = moe_config(capacity_factor=0.5)
    layer = make_layer(config, has_residual=True, dtype=dtype)
    monkeypatch.setattr(moe_layer, "plan_dispatch", counted_plan)
    layer.router.register_forward_hook(lambda *_: count("router"))
    layer.experts.register_forward_hook(lambda *_: count("experts"))
    results, all_calls = [], []
    for recompute in (False, True):
        calls.update(router=0, plan=0, experts=0)
        x_TD = random(12, D, seed=1, dtype=dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        before_TE = random(12, 8, seed=2, dtype=wide).requires_grad_()
        out = layer(x_TD, before_TE, recompute=recompute)
        loss = out.output_TD.square().sum() + out.balance_loss + out.logits_TE.sum()
        grads = gradients(loss, {"x": x_TD, "previous": before_TE, **dict(layer.named_parameters())})
        results.append({**vars(out), **grads})
        all_calls.append(dict(calls))
    plain, recomputed = results
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name
    assert all_calls == [{"router": 1, "plan": 1, "experts": 1}, {"router": 1, "plan": 1, "experts": 2}]


def test_recomputation_is_for_training_alone() -> None:
    layer, x_TD = make_layer(moe_config()), random(6, D, seed=1)
    with torch.no_grad():
        assert torch.equal(layer(x_TD, None, recompute=True).output_TD, layer(x_TD, None).output_TD)


def test_the_input_is_left_as_it_was_and_nothing_is_stored() -> None:
    layer = make_layer(moe_config())
    x_TD, state = random(6, D, seed=1), {name: value.clone() for name, value in layer.state_dict().items()}
    kept = x_TD.clone()
    first, second = layer(x_TD, None), layer(x_TD, None)
    assert torch.equal(x_TD, kept) and torch.equal(first.output_TD, second.output_TD)
    assert list(layer.buffers()) == []
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


# what travels


@dataclass
class WatchedExchange:
    """A local exchange that writes down what it carried and when."""

    events: list[str] = field(default_factory=list)
    rows_RD: Tensor | None = None
    counts: Sequence[int] = ()

    def send(self, rows_RD: Tensor, counts: Sequence[int]) -> Parcel:
        self.events.append("send")
        self.rows_RD, self.counts = rows_RD, counts
        return WatchedParcel(LocalExchange().send(rows_RD, counts), self.events)


@dataclass
class WatchedParcel:
    parcel: Parcel
    events: list[str]

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        self.events.append("receive")
        return self.parcel.receive()

    def give_back(self, rows_QD: Tensor) -> Tensor:
        self.events.append("give back")
        return self.parcel.give_back(rows_QD)


@pytest.mark.parametrize("seating", SEATING)
def test_ffn_assignments_alone_travel_and_the_rest_is_computed_meanwhile(seating: str) -> None:
    config = moe_config(**SEATING[seating])
    layer, x_TD = make_layer(config), random(10, D, seed=1)
    assert layer.constants is not None
    layer.exchange = watched = WatchedExchange()
    layer.constants.register_forward_hook(lambda *_: watched.events.append("constants"))
    layer.experts.register_forward_hook(lambda *_: watched.events.append("experts"))
    out = layer(x_TD, None)
    assert watched.events == ["send", "constants", "receive", "experts", "give back"]
    # What was sent: for each FFN expert, in order, the tokens whose choice it kept, by token.
    routes = Oracle(layer, config)(x_TD, None).routes
    tokens = [t for expert in range(4) for t, choices in enumerate(routes) if (expert, True) in choices]
    assert watched.rows_RD is not None and torch.equal(watched.rows_RD, x_TD[tokens])
    assert list(watched.counts) == out.kept_E[:4].tolist()


# every fast path, on identical routes


def use_backend(layer: MoELayer, backend: Backend) -> None:
    """Have the layer's FFN experts use one backend, also where `auto` would pick another."""
    forward = functools.partial(layer.experts.forward, backend=backend)
    layer.experts.forward = forward  # type: ignore[method-assign]


def routes_of(routing: Routing, plan: DispatchPlan, num_tokens: int) -> list[list[tuple[int, bool]]]:
    routes: list[list[tuple[int, bool]]] = [[] for _ in range(num_tokens)]
    for token, expert, kept in zip(routing.token_N.tolist(), routing.expert_N.tolist(), plan.kept_N.tolist()):
        routes[token].append((expert, kept))
    return routes


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; 0 / 0, two gradients that are zero, agrees."""
    difference = (actual.detach().cpu().double() - expected).norm().item()
    return difference / expected.norm().item() if difference else 0.0


FAST_PATHS = [
    ("slices", torch.float32, "cpu", 1e-5),
    ("grouped_mm", torch.float32, "cpu", 1e-5),
    ("slices", torch.bfloat16, "cpu", 2e-2),
    ("grouped_mm", torch.bfloat16, "cpu", 2e-2),
    pytest.param("slices", torch.float32, "cuda", 1e-5, marks=pytest.mark.gpu),
    pytest.param("grouped_mm", torch.float32, "cuda", 1e-5, marks=pytest.mark.gpu),
    pytest.param("slices", torch.bfloat16, "cuda", 2e-2, marks=pytest.mark.gpu),
    pytest.param("grouped_mm", torch.bfloat16, "cuda", 2e-2, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("kinds", ["all kinds", "vanilla", "several of each"])
@pytest.mark.parametrize("seating", ["dropless", "probability, assignments", "position, tokens"])
@pytest.mark.parametrize(("backend", "dtype", "device", "limit"), FAST_PATHS)
def test_fast_path_is_the_oracle_on_its_routes(
    backend: Backend, dtype: torch.dtype, device: str, limit: float, seating: str, kinds: str
) -> None:
    """Weights and inputs are numbers of `dtype`; the oracle computes with the same numbers in float64."""
    config = moe_config(**KINDS[kinds], **SEATING[seating])
    layer = make_layer(config, has_residual=True, ffn_hidden_size=8, dtype=dtype, device=device)
    use_backend(layer, backend)
    oracle = Oracle(layer, config)
    x_TD = random(40, D, seed=1, dtype=dtype, device=device).requires_grad_()
    before_TE = random(40, config.num_experts, seed=2, dtype=torch.float32, device=device).requires_grad_()
    routing = layer.router(x_TD, before_TE)
    plan = plan_dispatch(
        expert_N=routing.expert_N,
        probability_N=routing.gate_N,
        num_experts=config.num_experts,
        num_ffn=config.num_ffn_experts,
        capacity_E=layer.settings.seats(40) if layer.settings.seats else None,
        drop_policy=config.drop_policy,
    )
    output_TD = layer.compute(x_TD, routing.gate_N, routing.token_N, routing.expert_N, plan)
    assert output_TD.dtype == dtype and routing.logits_TE.dtype == torch.float32

    wide_x_TD, wide_before_TE = (t.detach().cpu().double().requires_grad_() for t in (x_TD, before_TE))
    expected = oracle(wide_x_TD, wide_before_TE, routes=routes_of(routing, plan, 40))
    assert relative(output_TD, expected.output_TD) < limit
    assert relative(routing.logits_TE, expected.logits_TE) < 1e-5

    grad_TD = random(40, D, seed=3, dtype=dtype, device=device)
    loss = (output_TD * grad_TD).sum()
    actual = gradients(loss, {"x": x_TD, "previous": before_TE, **dict(layer.named_parameters())})
    loss = (expected.output_TD * grad_TD.cpu().double()).sum()
    wide = gradients(loss, {"x": wide_x_TD, "previous": wide_before_TE, **oracle.leaves})
    errors = {name: relative(actual[name], expected_grad) for name, expected_grad in wide.items()}
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compute_is_what_forward_returns(dtype: torch.dtype) -> None:
    # The comparison above hands the plan over itself; forward makes the same one.
    config = moe_config(capacity_factor=0.5)
    layer, x_TD = make_layer(config, dtype=dtype), random(20, D, seed=1, dtype=dtype)
    routing = layer.router(x_TD, None)
    capacity = expert_capacity(config, 20)
    plan = plan_dispatch(
        expert_N=routing.expert_N,
        probability_N=routing.gate_N,
        num_experts=8,
        num_ffn=4,
        capacity_E=[capacity.ffn] * 4 + [capacity.zero_computation] * 4,
    )
    out = layer(x_TD, None)
    assert torch.equal(out.kept_E, plan.kept_E) and out.kept_E.sum() < out.wanted_E.sum()
    output_TD = layer.compute(x_TD, routing.gate_N, routing.token_N, routing.expert_N, plan)
    assert torch.equal(out.output_TD, output_TD)
