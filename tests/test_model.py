"""The model: how it starts, what it returns, that every parameter learns and nothing sees the future."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor

from moepp_ds.config import ModelConfig, count_parameters, expert_capacity
from moepp_ds.model import MoEPlusPlusModel, expert_kinds, expert_offsets, initialize
from moepp_ds.moe_layer import MoELayer

EOS = 0
VOCABULARY = 24


def config(*, moe: dict[str, object] | None = None, **changes: object) -> ModelConfig:
    """2 layers of width 8 with 4 FFN + 1 constant + 1 copy + 1 zero experts, dropless, unless changed."""
    experts = {"num_ffn_experts": 4, "num_constant": 1, "dropless": True, **(moe or {})}
    sizes = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 12}
    return ModelConfig.model_validate({"vocab_size": VOCABULARY, **sizes, **changes, "moe": experts})


VANILLA: dict[str, object] = {"num_zero": 0, "num_copy": 0, "num_constant": 0}
CONFIGS = {
    "moepp": config(),
    "vanilla": config(moe=VANILLA),
    "every second layer": config(num_layers=4, moe={"every": 2}),
    "every third of five": config(num_layers=5, moe={"every": 3, **VANILLA}),
    "no gating residual": config(num_layers=3, moe={"gating_residual": False}),
    "three constants": config(num_layers=3, moe={"num_constant": 3, "num_copy": 2, "num_zero": 0}),
    "capacity": config(moe={"dropless": False, "capacity_factor": 0.6}),
}


def make_model(
    recipe: ModelConfig,
    *,
    seed: int = 0,
    std: float = 0.3,
    recompute: bool = False,
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
def test_loss_is_cross_entropy_plus_the_weighted_sum_of_balance_losses(name: str) -> None:
    model, tokens_BS1 = make_model(CONFIGS[name]), random_rows()
    out = model(tokens_BS1)
    hidden_BSD, layers = model.hidden(tokens_BS1[:, :-1])
    assert len(layers) == CONFIGS[name].num_moe_layers
    logits_BSV = hidden_BSD @ model.head.weight.t()
    share_BSV = logits_BSV.exp() / logits_BSV.exp().sum(dim=-1, keepdim=True)
    losses = [-share_BSV[b, s, tokens_BS1[b, s + 1]].log() for b in range(2) for s in range(8)]
    lm_loss = torch.stack(losses).mean()
    balance_loss = sum(layer.balance_loss for layer in layers)
    for actual, expected in (
        (out.lm_loss, lm_loss),
        (out.balance_loss, balance_loss),
        (out.loss, lm_loss + 0.01 * balance_loss),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-12)
    assert out.loss.requires_grad and not out.lm_loss.requires_grad and not out.balance_loss.requires_grad
    assert out.wanted_LE.tolist() == [layer.wanted_E.tolist() for layer in layers]
    assert out.kept_LE.tolist() == [layer.kept_E.tolist() for layer in layers]
    assert out.wanted_LE.sum(dim=1).tolist() == [2 * 16] * len(layers)  # K choices of 2 x 8 tokens a layer


def test_balance_weight_is_the_recipes() -> None:
    for weight in (0.0, 0.5):
        out = make_model(config(moe={"balance_weight": weight}))(random_rows())
        expected = out.lm_loss + weight * out.balance_loss
        torch.testing.assert_close(out.loss.detach(), expected, rtol=0, atol=1e-14)


def test_seats_are_the_recipes_in_training_and_unlimited_in_evaluation() -> None:
    # 2 rows of 8 tokens make a micro batch of 16: 0.6 * 2 * 16 / (0.75 * 4 + 3) = 3.2 seats in a
    # zero-computation expert, and three quarters of that, 2.4, in an FFN expert; rounded up 4 and 3.
    recipe = CONFIGS["capacity"]
    capacity = expert_capacity(recipe.moe, 16)
    assert (capacity.ffn, capacity.zero_computation) == (3, 4)
    model = make_model(recipe)
    out = model(random_rows())
    seats_E = torch.tensor([3, 3, 3, 3, 4, 4, 4])
    assert torch.equal(out.kept_LE, torch.minimum(out.wanted_LE, seats_E))
    assert out.kept_LE.sum() < out.wanted_LE.sum()
    out = model.eval()(random_rows())
    assert torch.equal(out.kept_LE, out.wanted_LE)


@pytest.mark.parametrize("name", CONFIGS)
def test_token_losses_average_to_the_lm_loss_of_evaluation(name: str) -> None:
    model, tokens_BS1 = make_model(CONFIGS[name]).eval(), random_rows(3, 6)
    losses_BS = model.token_losses(tokens_BS1)
    assert losses_BS.shape == (3, 5)
    torch.testing.assert_close(losses_BS.mean(), model(tokens_BS1).lm_loss, rtol=0, atol=1e-13)
    # A row's losses do not depend on the rows beside it.
    for b in range(3):
        alone_1S = model.token_losses(tokens_BS1[b : b + 1])
        torch.testing.assert_close(alone_1S[0], losses_BS[b], rtol=0, atol=1e-12)


# gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_receives_a_gradient(name: str, recompute: bool) -> None:
    model = make_model(CONFIGS[name], recompute=recompute)
    model(random_rows(1, 2)).loss.backward()  # one token: few experts are chosen, and all are in the graph
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model(random_rows(8, 33)).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_changes_nothing(name: str, dtype: torch.dtype) -> None:
    results = []
    for recompute in (False, True):
        model = make_model(CONFIGS[name], recompute=recompute, dtype=dtype)
        out = model(random_rows())
        out.loss.backward()
        results.append(vars(out) | {name: parameter.grad for name, parameter in model.named_parameters()})
    plain, recomputed = results
    for key, value in plain.items():
        assert torch.equal(value, recomputed[key]), key


def test_recomputation_runs_everything_twice_but_the_routers() -> None:
    # Two dense and two MoE layers. Entries are counted, not ends: recomputation stops at the last tensor it
    # needs.
    model = make_model(CONFIGS["every second layer"], recompute=True)
    calls: Counter[str] = Counter()
    for module in model.modules():
        module.register_forward_pre_hook(lambda called, _: calls.update([type(called).__name__]))
    model(random_rows()).loss.backward()
    kinds = ("Router", "FFNExperts", "ConstantExperts", "CausalSelfAttention")
    assert [calls[kind] for kind in kinds] == [2, 2 * 4, 2 * 2, 2 * 4]


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


@pytest.mark.parametrize("name", ["moepp", "vanilla", "capacity"])
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
    model = make_model(config(document_attention=True), recompute=True)
    model(DOCUMENTS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
