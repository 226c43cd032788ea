"""The model: how it starts, what it returns, that every parameter learns and nothing sees the future."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor

from moepp_ds.config import (
    ActivationCheckpointing,
    ModelConfig,
    count_parameters,
    expert_capacity,
    recomputed_flops_per_token,
)
from moepp_ds.controller import RoutingInputs
from moepp_ds.model import ModelOutput, MoEPlusPlusModel, expert_kinds, expert_offsets, initialize
from moepp_ds.moe_layer import MoELayer
from moepp_ds.router import jitter
from moepp_ds.statistics import RoutingStatistics
from moepp_ds.sweep import flop_counter

EOS = 0
VOCABULARY = 24
CHECKPOINTING: list[ActivationCheckpointing] = ["none", "selective", "full"]


def config(*, moe: dict[str, object] | None = None, **changes: object) -> ModelConfig:
    """2 layers of width 8 with 4 FFN + 1 constant + 1 copy + 1 zero experts, dropless, unless changed."""
    experts = {"num_ffn_experts": 4, "num_constant": 1, "dropless": True, **(moe or {})}
    sizes = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 12}
    return ModelConfig.model_validate({"vocab_size": VOCABULARY, **sizes, **changes, "moe": experts})


def gradients_of(model: MoEPlusPlusModel) -> dict[str, Tensor]:
    """Every parameter's gradient; all must have one."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


VANILLA: dict[str, object] = {"num_zero": 0, "num_copy": 0, "num_constant": 0}
CONFIGS = {
    "moepp": config(),
    "vanilla": config(moe=VANILLA),
    "every second layer": config(num_layers=4, moe={"every": 2}),
    "every third of five": config(num_layers=5, moe={"every": 3, **VANILLA}),
    "no gating residual": config(num_layers=3, moe={"gating_residual": False}),
    "three constants": config(num_layers=3, moe={"num_constant": 3, "num_copy": 2, "num_zero": 0}),
    "capacity": config(moe={"dropless": False, "capacity_factor": 0.6}),
    "threshold": config(moe={"dropless": False, "capacity_factor": 1.5, "router": {"threshold": 0.6}}),
    "released": config(moe={"variant": "released", "router": {"logit_std": 1.5}}),
    "jitter and z-loss": config(moe={"router": {"jitter": 0.3, "z_loss_weight": 0.02}}),
    "shared, fine-grained, every second": config(
        num_layers=4,
        moe={"every": 2, "num_shared_experts": 2, "shared_expert_gate": True, "expert_ffn_hidden_size": 6},
    ),
    "controller, load of the update before": config(
        moe={"controller": {"target_ffn_experts": 1.0}, "balance": "null_averaged", "balance_scope": "global_batch"},
    ),
    "budget": config(
        moe={"combine": "renormalize_selected", "combine_scale": 2.5, "balance": "none", "expert_input_scale": 2.0},
    ),
}


def routing_inputs(recipe: ModelConfig, *, first_row: int = 0) -> RoutingInputs:
    """What a run in its middle tells the model: where the recipe asks for it, biases and the load before."""
    moe, shape = recipe.moe, (recipe.num_moe_layers, recipe.moe.num_experts)
    generator = torch.Generator().manual_seed(5)
    bias_LE, share_LE = 0.3 * torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    bias_LE[:, moe.num_ffn_experts :] = 0
    return RoutingInputs(
        bias_LE=bias_LE if moe.controller else None,
        share_LE=share_LE if moe.balance_scope == "global_batch" else None,
        seed=11,
        first_row=first_row,
    )


def tensors_of(out: ModelOutput) -> dict[str, Tensor]:
    """Every tensor that a pass returns, by place."""
    records = {"": out, "statistics.": out.statistics}
    for number, layer in enumerate(out.layers):
        records |= {f"{number}.": layer, f"{number}.routing.": layer.routing, f"{number}.plan.": layer.plan}
        records[f"{number}.statistics."] = layer.statistics
    return {
        place + name: value
        for place, record in records.items()
        for name, value in vars(record).items()
        if isinstance(value, Tensor)
    }


def make_model(
    recipe: ModelConfig,
    *,
    seed: int = 0,
    std: float = 0.3,
    recompute: ActivationCheckpointing = "none",
    dtype: torch.dtype = torch.float64,
) -> MoEPlusPlusModel:
    """A float64 model in training mode; a large std, so that routing and attention are lively."""
    model = MoEPlusPlusModel(recipe, eos_id=EOS, recompute=recompute).to(dtype)
    initialize(model, seed=seed, std=std)
    return model


def random_rows(rows: int = 2, length: int = 9, *, seed: int = 0) -> Tensor:
    """Rows of S+1 ids without a document end."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# how it starts


def test_ranks_that_hold_other_experts_make_the_experts_of_the_whole_model() -> None:
    recipe = config(num_layers=3)
    whole = dict(make_model(recipe).named_parameters())
    for first in (0, 2):
        factory = partial(MoELayer, num_local_experts=2, first_local_expert=first)
        part = MoEPlusPlusModel(recipe, eos_id=EOS, layer_factory=factory).double()
        initialize(part, seed=0, std=0.3)
        offsets = expert_offsets(part)
        assert len(offsets) == 2 * 3 and set(offsets.values()) == {first}
        for name, parameter in part.named_parameters():
            expected = whole[name][first : first + 2] if name in offsets else whole[name]
            assert torch.equal(parameter, expected), name


def test_no_two_pieces_start_alike_and_norms_start_at_one() -> None:
    model = make_model(config(num_layers=3), std=1.0)
    pieces: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            pieces += list(parameter) if name in expert_offsets(model) else [parameter]
    # Six numbers tell pieces apart: parameters, layers and experts of one parameter draw from different
    # generators.
    beginnings = {tuple(piece.flatten()[:6].tolist()) for piece in pieces}
    assert len(beginnings) == len(pieces)
    values = torch.cat([piece.flatten() for piece in pieces])
    # 4,900 draws and more of normal(0, 1): five standard errors are 5 / 70 of the mean and 5 / 99 of the
    # deviation.
    assert len(values) > 4900
    assert abs(values.mean()) < 5 / 70 and abs(values.std() - 1) < 5 / 99


def test_start_depends_on_the_seed_alone() -> None:
    recipe = CONFIGS["moepp"]
    first, again, other = (dict(make_model(recipe, seed=seed).named_parameters()) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        assert name.endswith("norm.weight") or not torch.equal(parameter, other[name]), name
    torch.manual_seed(123)  # the process-wide generator plays no part
    assert torch.equal(make_model(recipe, seed=1).embedding.weight, first["embedding.weight"])


def test_start_scales_with_std_rounds_to_the_dtype_and_leaves_nothing_out() -> None:
    recipe = CONFIGS["moepp"]
    wide = dict(make_model(recipe, std=1.0, dtype=torch.float32).named_parameters())
    model = MoEPlusPlusModel(recipe, eos_id=EOS).bfloat16()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    initialize(model, seed=0, std=0.5)
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.endswith("norm.weight") else 0.5
        assert torch.equal(parameter, (factor * wide[name]).bfloat16()), name


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_parameters_is_the_recipes(name: str) -> None:
    model = MoEPlusPlusModel(CONFIGS[name], eos_id=EOS)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(CONFIGS[name]).total


def residual_layers(model: MoEPlusPlusModel) -> list[int]:
    return [i for i in range(len(model.blocks)) if f"blocks.{i}.moe.router.residual_EE" in model.state_dict()]


def test_all_moe_layers_but_the_first_have_a_gating_residual() -> None:
    assert residual_layers(make_model(config(num_layers=4))) == [1, 2, 3]
    # MoE layers are 1, 3 and 5 of six: the first of them has no logits before it.
    assert residual_layers(make_model(config(num_layers=6, moe={"every": 2}))) == [3, 5]
    assert residual_layers(make_model(config(num_layers=4, moe={"gating_residual": False}))) == []


def test_kinds_follow_the_recipe() -> None:
    kinds = expert_kinds(config(moe={"num_constant": 3, "num_copy": 2, "num_zero": 5}).moe)
    assert (kinds.num_ffn, kinds.num_constant, kinds.num_copy, kinds.num_zero) == (4, 3, 2, 5)


# what it returns


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_cross_entropy_plus_the_weighted_sums_of_the_layers_losses(name: str) -> None:
    model, tokens_BS1, routing = make_model(CONFIGS[name]), random_rows(), routing_inputs(CONFIGS[name])
    out = model(tokens_BS1, routing)
    hidden_BSD, layers = model.hidden(tokens_BS1[:, :-1], routing)
    assert len(layers) == len(out.layers) == CONFIGS[name].num_moe_layers
    logits_BSV = hidden_BSD @ model.head.weight.t()
    share_BSV = logits_BSV.exp() / logits_BSV.exp().sum(dim=-1, keepdim=True)
    losses = [-share_BSV[b, s, tokens_BS1[b, s + 1]].log() for b in range(2) for s in range(8)]
    lm_loss = torch.stack(losses).mean()
    balance_loss = torch.stack([layer.balance_loss for layer in layers]).sum()
    z_loss = torch.stack([layer.z_loss for layer in layers]).sum()
    balance_weight = 0.0 if name == "budget" else 0.01
    z_weight = 0.02 if name == "jitter and z-loss" else 0.0
    for actual, expected in (
        (out.lm_loss, lm_loss),
        (out.balance_loss, balance_loss),
        (out.z_loss, z_loss),
        (out.loss, lm_loss + balance_weight * balance_loss + z_weight * z_loss),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-12)
    parts = (out.lm_loss, out.balance_loss, out.z_loss)
    assert out.loss.requires_grad and not any(part.requires_grad for part in parts)
    assert (name == "budget") == (out.balance_loss == 0)


@pytest.mark.parametrize("recompute", CHECKPOINTING)
def test_no_layers_output_outlives_the_sum_it_is_part_of(recompute: ActivationCheckpointing) -> None:
    """An activation as wide as the model, in every layer, that no backward pass needs."""
    model, alive = make_model(config(), recompute=recompute), []
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(lambda _, __, out: alive.append(weakref.ref(out.output_TD)))
    out = model(random_rows())
    assert [output() for output in alive] == [None, None] and len(out.layers) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_those_of_every_moe_layer(name: str) -> None:
    model, routing = make_model(CONFIGS[name]), routing_inputs(CONFIGS[name])
    out = model(random_rows(), routing)
    for field in fields(RoutingStatistics):
        layers = [getattr(layer.statistics, field.name).tolist() for layer in out.layers]
        assert getattr(out.statistics, field.name).tolist() == layers, field.name
    statistics, tokens = out.statistics, 2 * 8
    assert statistics.first_E.sum(dim=1).tolist() == [tokens] * len(out.layers)
    assert statistics.histogram_H.sum(dim=1).tolist() == [tokens] * len(out.layers)
    if name != "threshold":  # K choices of 2 x 8 tokens a layer
        assert statistics.wanted_E.sum(dim=1).tolist() == [2 * tokens] * len(out.layers)
    ffn = torch.arange(statistics.histogram_H.shape[1])
    assert torch.equal((statistics.histogram_H * ffn).sum(dim=1), statistics.kept_E[:, :4].sum(dim=1))


def test_balance_weight_is_the_recipes() -> None:
    for weight in (0.0, 0.5):
        out = make_model(config(moe={"balance_weight": weight, "router": {"z_loss_weight": weight / 5}}))(random_rows())
        expected = out.lm_loss + weight * out.balance_loss + weight / 5 * out.z_loss
        torch.testing.assert_close(out.loss.detach(), expected, rtol=0, atol=1e-14)


def test_seats_are_the_recipes_in_training_and_unlimited_in_evaluation() -> None:
    # 2 rows of 8 tokens make a micro batch of 16: 0.6 * 2 * 16 / (0.75 * 4 + 3) = 3.2 seats in a
    # zero-computation expert, and three quarters of that, 2.4, in an FFN expert; rounded up 4 and 3.
    recipe = CONFIGS["capacity"]
    capacity = expert_capacity(recipe.moe, 16)
    assert (capacity.ffn, capacity.zero_computation) == (3, 4)
    model = make_model(recipe)
    counts = model(random_rows()).statistics
    seats_E = torch.tensor([3, 3, 3, 3, 4, 4, 4])
    assert torch.equal(counts.kept_E, torch.minimum(counts.wanted_E, seats_E))
    assert counts.kept_E.sum() < counts.wanted_E.sum()
    counts = model.eval()(random_rows()).statistics
    assert torch.equal(counts.kept_E, counts.wanted_E)


@pytest.mark.parametrize("name", CONFIGS)
def test_token_losses_average_to_the_lm_loss_of_evaluation(name: str) -> None:
    model, tokens_BS1 = make_model(CONFIGS[name]).eval(), random_rows(3, 6)
    routing = RoutingInputs(bias_LE=routing_inputs(CONFIGS[name]).bias_LE)
    losses_BS = model.token_losses(tokens_BS1, routing)
    assert losses_BS.shape == (3, 5)
    torch.testing.assert_close(losses_BS.mean(), model(tokens_BS1, routing).lm_loss, rtol=0, atol=1e-13)
    # A row's losses do not depend on the rows beside it.
    for b in range(3):
        alone_1S = model.token_losses(tokens_BS1[b : b + 1], routing)
        torch.testing.assert_close(alone_1S[0], losses_BS[b], rtol=0, atol=1e-12)


# gradients


@pytest.mark.parametrize("recompute", CHECKPOINTING)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_receives_a_gradient(name: str, recompute: ActivationCheckpointing) -> None:
    model = make_model(CONFIGS[name], recompute=recompute)
    model(random_rows(1, 2)).loss.backward()  # one token: few experts are chosen, and all are in the graph
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model(random_rows(8, 33)).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Losses, routing, statistics and gradients, bit for bit."""
    results = []
    for recompute in CHECKPOINTING:
        model = make_model(CONFIGS[name], recompute=recompute, dtype=dtype)
        out = model(random_rows(), routing_inputs(CONFIGS[name]))
        out.loss.backward()
        results.append(tensors_of(out) | gradients_of(model))
    plain, selective, full = results
    assert "statistics.histogram_H" in plain and "0.routing.expert_N" in plain
    for key, value in plain.items():
        assert torch.equal(value, selective[key]) and torch.equal(value, full[key]), key


@pytest.mark.parametrize("name", ["moepp", "threshold", "shared, fine-grained, every second"])
def test_recomputation_does_not_route_anew(name: str) -> None:
    """The routers' weights move between the passes, so that a router asked again would send tokens elsewhere."""
    results = []
    for recompute in CHECKPOINTING:
        model = make_model(CONFIGS[name], recompute=recompute)
        out = model(random_rows())
        for key, parameter in model.named_parameters():
            if key.endswith("router.weight_ED"):
                parameter.data.neg_()
        out.loss.backward()
        results.append(gradients_of(model))
    plain, selective, full = results
    for key, value in plain.items():
        assert torch.equal(value, selective[key]) and torch.equal(value, full[key]), key


@pytest.mark.parametrize(("recompute", "experts"), [("none", 1), ("selective", 1), ("full", 2)])
def test_recomputation_runs_what_it_says_twice(recompute: ActivationCheckpointing, experts: int) -> None:
    # Two dense and two MoE layers. Entries are counted, not ends: recomputation stops at the last tensor it
    # needs.
    model = make_model(CONFIGS["every second layer"], recompute=recompute)
    calls: Counter[str] = Counter()
    for module in model.modules():
        module.register_forward_pre_hook(lambda called, _: calls.update([type(called).__name__]))
    model(random_rows()).loss.backward()
    kinds = ("Router", "FFNExperts", "ConstantExperts", "CausalSelfAttention")
    attention = 1 if recompute == "none" else 2
    assert [calls[kind] for kind in kinds] == [2, experts * 4, experts * 2, attention * 4]


@pytest.mark.parametrize("recompute", CHECKPOINTING)
def test_recomputation_does_the_products_that_the_recipe_counts(recompute: ActivationCheckpointing) -> None:
    """Beyond those of a model that keeps everything; a square of positions is counted whole, a causal one by half."""
    counted: dict[str, int] = {}
    tokens, positions = 2 * 8, 8
    for how in ("none", recompute):
        model = make_model(CONFIGS["vanilla"], recompute=how, dtype=torch.float32)
        with flop_counter() as counter:
            model(random_rows()).loss.backward()
        counted[how] = counter.get_total_flops()
    expected = tokens * recomputed_flops_per_token(model.config, positions, recompute)
    if recompute == "full":
        heads = model.config.num_heads * model.config.head_dim
        expected += tokens * model.config.num_layers * 2 * heads * (positions - 1)
    assert counted[recompute] - counted["none"] == expected


@pytest.mark.parametrize(("num_layers", "every"), [(3, 1), (6, 2)])
def test_router_logits_travel_from_one_moe_layer_to_the_next(num_layers: int, every: int) -> None:
    # Dense layers stand between the MoE layers of the second case, and the logits pass them.
    model = make_model(config(num_layers=num_layers, moe={"every": every}))
    routers = [f"blocks.{i}.moe.router" for i in range(every - 1, num_layers, every)]
    seen: list[tuple[Tensor, Tensor | None]] = []
    for name in routers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    _, layers = model.hidden(random_rows()[:, :-1])
    assert seen[0][1] is None and seen[1][1] is layers[0].logits_TE and seen[2][1] is layers[1].logits_TE
    for n in (1, 2):
        weight_ED = model.get_parameter(f"{routers[n]}.weight_ED")
        residual_EE = model.get_parameter(f"{routers[n]}.residual_EE")
        expected_TE = seen[n][0] @ weight_ED.t() + layers[n - 1].logits_TE @ residual_EE.t()
        torch.testing.assert_close(layers[n].logits_TE, expected_TE, rtol=0, atol=1e-13)


# what it is told


@pytest.mark.parametrize(("num_layers", "every"), [(2, 1), (6, 2)])
def test_every_moe_layer_is_told_its_own_bias_load_and_noise(num_layers: int, every: int) -> None:
    # Rows of bias_LE and share_LE, and the layer that noise is drawn for, count MoE layers and no dense ones.
    recipe = config(num_layers=num_layers, moe={"every": every, "router": {"jitter": 0.25}})
    model, count = make_model(recipe), num_layers // every
    routing = RoutingInputs(
        bias_LE=torch.arange(count * 7.0).view(count, 7),
        share_LE=torch.arange(count * 7.0).view(count, 7) + 100,
        seed=3,
        first_row=40,
    )
    seen: list[dict[str, Tensor]] = []
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(lambda _, __, told: seen.append(told), with_kwargs=True)
    model(random_rows(), routing)
    assert len(seen) == count and routing.bias_LE is not None and routing.share_LE is not None
    for layer, told in enumerate(seen):
        assert torch.equal(told["bias_E"], routing.bias_LE[layer])
        assert torch.equal(told["share_E"], routing.share_LE[layer])
        noise_TD = jitter((2, 8, 8), 0.25, seed=3, first_row=40, layer=layer, device=torch.device("cpu"))
        assert torch.equal(told["noise_TD"], noise_TD)
    seen.clear()
    model(random_rows())  # told nothing
    assert [(told["bias_E"], told["share_E"]) for told in seen] == [(None, None)] * count


def test_biases_send_tokens_elsewhere_and_the_load_given_is_the_balance_losss() -> None:
    model, tokens_BS1 = make_model(config()), random_rows()
    plain = model(tokens_BS1)
    bias_LE = torch.zeros(2, 7)
    bias_LE[:, 1] = 2.0  # above any score: expert 1 is every token's first choice
    out = model(tokens_BS1, RoutingInputs(bias_LE=bias_LE))
    assert out.statistics.first_E.tolist() == [[0, 16, 0, 0, 0, 0, 0]] * 2
    assert plain.statistics.first_E[:, 1].max() < 16
    # A load of 1 for every expert makes L_b = sum eta_i P_i, a mean over tokens of P_FFN + tau (1 - P_FFN).
    out = model(tokens_BS1, RoutingInputs(share_LE=torch.ones(2, 7)))
    ffn = torch.stack([layer.routing.probability_TE[:, :4].sum(dim=1).mean() for layer in out.layers])
    torch.testing.assert_close(out.balance_loss, (ffn + 0.75 * (1 - ffn)).sum().detach(), rtol=0, atol=1e-12)
    assert torch.equal(out.lm_loss, plain.lm_loss)


def test_jitter_of_a_row_is_the_same_whatever_micro_batch_it_sits_in() -> None:
    recipe = config(moe={"router": {"jitter": 0.5}})
    model, tokens_BS = make_model(recipe), random_rows(4, 6)
    together_BSD, layers = model.hidden(tokens_BS, RoutingInputs(seed=1, first_row=8))
    for row in range(4):
        alone_1SD, alone = model.hidden(tokens_BS[row : row + 1], RoutingInputs(seed=1, first_row=8 + row))
        torch.testing.assert_close(alone_1SD[0], together_BSD[row], rtol=0, atol=1e-12)
        own = slice(6 * row, 6 * row + 6)
        torch.testing.assert_close(alone[1].logits_TE, layers[1].logits_TE[own], rtol=0, atol=1e-12)
    # Another row of the stream, or another seed, has other noise.
    for routing in (RoutingInputs(seed=1, first_row=9), RoutingInputs(seed=2, first_row=8)):
        other_BSD, _ = model.hidden(tokens_BS, routing)
        assert (other_BSD - together_BSD).abs().amax(dim=(1, 2)).min() > 1e-6


def test_jitter_is_for_training_alone() -> None:
    recipe = config(moe={"router": {"jitter": 0.5}})
    noisy, quiet, tokens_BS = make_model(recipe), make_model(config()), random_rows(2, 6)
    routing = RoutingInputs(seed=1)
    assert (noisy.hidden(tokens_BS, routing)[0] - quiet.hidden(tokens_BS)[0]).abs().max() > 1e-6
    assert torch.equal(noisy.eval().hidden(tokens_BS, routing)[0], quiet.eval().hidden(tokens_BS)[0])


@pytest.mark.parametrize("name", ["moepp", "vanilla", "capacity", "threshold", "released"])
def test_it_learns_a_tiny_batch(name: str) -> None:
    recipe = CONFIGS[name].model_copy(update={"hidden_size": 16})
    model = make_model(recipe, std=0.1, dtype=torch.float32)
    tokens_BS1 = random_rows(2, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = model(tokens_BS1)
        out.loss.backward()
        optimizer.step()
        losses.append(out.lm_loss.item())
    # It begins near log 24 = 3.2, the loss of knowing nothing.
    assert losses[0] > 2.9 and losses[-1] < 0.5 * losses[0]


# who sees whom


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_is_causal(name: str) -> None:
    # Loss s is of token s+1 read from tokens 0..s, so changing token p touches losses p-1 (as target) and
    # later ones.
    model, tokens_BS1 = make_model(CONFIGS[name]).eval(), random_rows(1, 8)
    losses_S = model.token_losses(tokens_BS1)[0]
    for p in range(1, 8):
        changed_BS1 = tokens_BS1.clone()
        changed_BS1[0, p] = changed_BS1[0, p] % (VOCABULARY - 1) + 1
        moved_S = (model.token_losses(changed_BS1)[0] - losses_S).abs()
        assert (moved_S[: p - 1] < 1e-12).all()
        assert (moved_S[p - 1 :] > 1e-9).all()


DOCUMENTS = torch.tensor([[5, 6, EOS, 7, 8, 9, EOS, 4, 3, 2]])


def test_document_attention_isolates_documents() -> None:
    # The second document alone, read as 7 8 9 and predicting 8 9 EOS, has losses 3, 4, 5 of the long row; the
    # third, 4 3 predicting 3 2, has losses 7 and 8. Losses 2 and 6 predict a document's first token from the
    # one before.
    isolated = make_model(config(document_attention=True)).eval()
    losses_S = isolated.token_losses(DOCUMENTS)[0]
    for start, end in ((0, 2), (3, 6), (7, 9)):
        alone_S = isolated.token_losses(DOCUMENTS[:, start : end + 1])[0]
        torch.testing.assert_close(losses_S[start:end], alone_S, rtol=0, atol=1e-12)
    # Without it the first document is read on, and positions too go on.
    joined = make_model(config()).eval()
    difference = joined.token_losses(DOCUMENTS)[0, 3:6] - joined.token_losses(DOCUMENTS[:, 3:7])[0]
    assert (difference.abs() > 1e-6).all()
    # In a row of one document it is plain attention.
    one = random_rows(2, 7)
    torch.testing.assert_close(isolated.token_losses(one), joined.token_losses(one), rtol=0, atol=1e-12)


def test_document_attention_trains_like_any_other() -> None:
    model = make_model(config(document_attention=True), recompute="full")
    model(DOCUMENTS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
