"""The balance loss's pull at each router, against gradients worked out one loss at a time."""

from __future__ import annotations

import pytest
import torch

from moepp_ds.config import ModelConfig
from moepp_ds.gradient_ratio import watch_routers
from moepp_ds.model import MoEPlusPlusModel, initialize

WEIGHT = 0.5


def make_model(**moe: object) -> MoEPlusPlusModel:
    """Two MoE layers whose routers pull hard enough to see."""
    sizes = {"vocab_size": 32, "num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 12}
    config = {**sizes, "moe": {"num_ffn_experts": 3, "balance_weight": WEIGHT, **moe}}
    model = MoEPlusPlusModel(ModelConfig.model_validate(config), eos_id=0).double()
    initialize(model, seed=0, std=0.3)
    return model


@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_squares_are_those_of_the_two_gradients_whatever_the_loss_is_scaled_by(scale: float) -> None:
    model = make_model()
    tokens_BS1 = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))

    output = model(tokens_BS1)
    expected = []
    for layer in output.layers:
        (pull_TE,) = torch.autograd.grad(WEIGHT * layer.balance_loss, layer.logits_TE, retain_graph=True)
        (all_TE,) = torch.autograd.grad(output.loss, layer.logits_TE, retain_graph=True)
        expected.append([float(pull_TE.square().sum()), float((all_TE - pull_TE).square().sum())])
    assert min(min(pair) for pair in expected) > 0

    again = model(tokens_BS1)
    squares_L2 = watch_routers(again, WEIGHT)
    assert squares_L2.count_nonzero() == 0  # nothing is known before the backward pass
    (scale * again.loss).backward()
    torch.testing.assert_close(squares_L2.double(), torch.tensor(expected).double(), rtol=1e-5, atol=0.0)


def test_the_gradients_of_the_weights_are_not_touched() -> None:
    tokens_BS1 = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(2))
    found = []
    for watched in (False, True):
        model = make_model()
        output = model(tokens_BS1)
        if watched:
            watch_routers(output, WEIGHT)
        output.loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, seen) for plain, seen in zip(*found))


def test_no_balance_loss_pulls_nowhere() -> None:
    model = make_model(balance="none", balance_weight=0.0)
    output = model(torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(3)))
    squares_L2 = watch_routers(output, 0.0)
    output.loss.backward()
    assert squares_L2[:, 0].tolist() == [0.0, 0.0]
    assert all(rest > 0 for rest in squares_L2[:, 1].tolist())
