"""The loss of the output head, by hand, and its mean against automatic differentiation, in one block and in several."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from moepp_ds import cross_entropy
from moepp_ds.cross_entropy import mean_token_loss, token_losses


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_token_losses_by_hand() -> None:
    # Hidden [1, 0] has the logits log 2, 0, log 3: shares 2/6, 1/6, 3/6. Hidden [0, 1] has 0, log 6, 0: 1/8,
    # 6/8, 1/8.
    head_VD = tensor([[log(2), 0], [0, log(6)], [log(3), 0]])
    hidden_TD = tensor([[1, 0], [1, 0], [0, 1]])
    losses_T = token_losses(hidden_TD, head_VD, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(losses_T, tensor([log(3), log(6), log(8 / 6)]), rtol=0, atol=1e-14)


def test_gradient_of_a_token_loss() -> None:
    # Softmax minus the target's one-hot: target 1 of [2, 1, 3] / 6 gives [1/3, -5/6, 1/2], times hidden [1,
    # 0].
    head_VD = tensor([[log(2), 0], [0, log(6)], [log(3), 0]]).requires_grad_()
    token_losses(tensor([[1, 0]]), head_VD, torch.tensor([1])).sum().backward()
    assert head_VD.grad is not None
    expected_VD = tensor([[1 / 3, 0], [-5 / 6, 0], [1 / 2, 0]])
    torch.testing.assert_close(head_VD.grad, expected_VD, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_losses_are_minus_the_log_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(7, 16, generator=generator, dtype=torch.float64).to(dtype)
    head_VD = torch.randn(11, 16, generator=generator, dtype=torch.float64).to(dtype)
    target_T = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    losses_T = token_losses(hidden_TD, head_VD, target_T)
    assert losses_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Of a bf16 model only the logits are rounded to bf16; the softmax over the vocabulary is in fp32.
    logits_TV = (hidden_TD.double() @ head_VD.double().t()).to(dtype).double()
    expected_T = -torch.log(torch.softmax(logits_TV, dim=-1)[torch.arange(7), target_T])
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses_T.double(), expected_T, rtol=0, atol=limit)


@pytest.fixture(params=[2**24, 30, 1])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """All tokens in one block, two of them in each, one."""
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", {"cpu": request.param, "cuda": request.param})
    return request.param


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_mean_and_its_gradients(at_once: int, dtype: torch.dtype, limit: float, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 16, generator=generator, dtype=torch.float64).to(device, dtype) for n in (7, 11)]
    hidden_TD, head_VD = (leaf.requires_grad_() for leaf in leaves)
    target_T = torch.tensor([0, 10, 3, 3, 7, 1, 5], device=device)
    loss = mean_token_loss(hidden_TD, head_VD, target_T)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = torch.autograd.grad(3 * loss, [hidden_TD, head_VD])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), target_T)
    torch.testing.assert_close(loss.double(), expected, rtol=limit, atol=limit)
    torch.testing.assert_close(token_losses(hidden_TD, head_VD, target_T).mean(), loss, rtol=1e-6, atol=0)
    for mine, theirs in zip(found, torch.autograd.grad(3 * expected, wide)):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=limit)


def test_what_needs_no_gradient_gets_none() -> None:
    hidden_TD, head_VD = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    mean_token_loss(hidden_TD, head_VD, torch.tensor([0, 1, 4])).backward()
    assert hidden_TD.grad is not None and head_VD.grad is None
    assert not mean_token_loss(hidden_TD.detach(), head_VD, torch.tensor([0, 1, 4])).requires_grad
    with torch.no_grad():
        assert not mean_token_loss(hidden_TD, head_VD, torch.tensor([0, 1, 4])).requires_grad


def test_large_logits_are_finite() -> None:
    hidden_TD = torch.tensor([[300.0]], requires_grad=True)
    loss = mean_token_loss(hidden_TD, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 600 and hidden_TD.grad is not None and hidden_TD.grad.item() == 2


def test_a_sum_beyond_fp16_before_the_loss_scale_is_no_overflow() -> None:
    """3,000 tokens of one word: its gradient, before it is divided by their number, is -75,000 in one place."""
    hidden_TD = torch.full((3000, 2), 25.0, dtype=torch.float16, requires_grad=True)
    head_VD = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    loss = mean_token_loss(hidden_TD, head_VD, torch.ones(3000, dtype=torch.int64))
    (found_VD,) = torch.autograd.grad(loss, [head_VD])
    expected_V = torch.tensor([0.25, -0.75, 0.25, 0.25]) * 25
    torch.testing.assert_close(found_VD.float(), expected_V.unsqueeze(-1).expand(4, 2), rtol=2e-3, atol=0)
