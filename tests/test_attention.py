"""RMSNorm, rotary positions and attention, against typed-out numbers, a float64 oracle of loops, and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from moepp_ds.attention import (
    CausalSelfAttention,
    RMSNorm,
    apply_rotary,
    document_layout,
    document_mask,
    rotary_tables,
)

THETA = 100.0
EOS = 9


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(hidden_size: int = 8, num_heads: int = 2, **choices: Any) -> CausalSelfAttention:
    layer = CausalSelfAttention(hidden_size, num_heads, THETA, **choices).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=100 + seed) / hidden_size**0.5
    return layer


# RMSNorm


def test_rms_norm_by_hand() -> None:
    # Mean of squares of [3, 4, 0, 0] is 25/4; with eps 0 the root is 2.5.
    norm = RMSNorm(4, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert norm(torch.tensor([3.0, 4.0, 0.0, 0.0])).tolist() == pytest.approx([1.2, 3.2, 0.0, 0.0])
    # eps counts under the root: mean of squares 1, eps 3, root 2.
    assert RMSNorm(2, eps=3.0)(torch.tensor([1.0, -1.0])).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rms_norm_rounds_once_and_returns_the_input_dtype(dtype: torch.dtype) -> None:
    norm = RMSNorm(64, eps=1e-6).to(dtype)
    norm.weight.data = (1 + 0.1 * random(64, seed=1)).to(dtype)
    x = random(5, 64, dtype=dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    # One rounding is at most eps / 2, relative; fp32 and fp64 add a few inside, too small for bf16 and fp16.
    slack = 0.51 if dtype in (torch.bfloat16, torch.float16) else 4
    assert ((out.double() - exact).abs() <= slack * torch.finfo(dtype).eps * exact.abs()).all()


def test_rms_norm_statistics_do_not_overflow_in_fp16() -> None:
    # 300^2 = 90,000 is beyond fp16; the norm of a constant vector is one.
    assert RMSNorm(4, eps=1e-6).half()(torch.full((4,), 300.0, dtype=torch.float16)).tolist() == [1.0] * 4


def test_rms_norm_gradients() -> None:
    norm = RMSNorm(4, eps=1e-3).double()
    assert torch.autograd.gradcheck(norm, (random(3, 4).requires_grad_(),))
    assert list(norm.state_dict()) == ["weight"]


# Rotary positions


def test_rotary_by_hand() -> None:
    # A = 4, theta = 100: frequencies 100^0 = 1 and 100^(-2/4) = 0.1. Planes are (0, 2) and (1, 3).
    cos, sin = rotary_tables(torch.tensor([[0, 3]]), 4, THETA, torch.float64)
    assert cos.shape == (1, 1, 2, 2)
    x_BHSA = torch.tensor([[[[1.0, 0, 0, 5], [1, 0, 0, 5]]]], dtype=torch.float64)
    y_BHSA = apply_rotary(x_BHSA, cos, sin)
    expected = [
        [1, 0, 0, 5],  # position 0: nothing turns
        # plane (0, 2): (1, 0) turned by 3; plane (1, 3): (0, 5) turned by 0.3
        [math.cos(3), -5 * math.sin(0.3), math.sin(3), 5 * math.cos(0.3)],
    ]
    torch.testing.assert_close(y_BHSA[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    q_BHSA, k_BHSA = random(1, 1, 1, 8, seed=1), random(1, 1, 1, 8, seed=2)

    def score(query_at: int, key_at: int) -> float:
        q = apply_rotary(q_BHSA, *rotary_tables(torch.tensor([[query_at]]), 8, 1e4, torch.float64))
        k = apply_rotary(k_BHSA, *rotary_tables(torch.tensor([[key_at]]), 8, 1e4, torch.float64))
        return float((q * k).sum())

    for distance in (0, 1, 7, 100):
        scores = [score(key_at + distance, key_at) for key_at in (0, 1, 50, 1900)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-11)
    assert abs(score(3, 0) - score(4, 0)) > 1e-3


def test_rotation_of_bf16_heads_is_rounded_once() -> None:
    cos, sin = rotary_tables(torch.tensor([[2046, 2047]]), 8, 1e4, torch.float32)
    x_BHSA = random(1, 3, 2, 8, dtype=torch.bfloat16)
    y_BHSA = apply_rotary(x_BHSA, cos, sin)
    assert y_BHSA.dtype == torch.bfloat16
    exact = apply_rotary(x_BHSA.double(), *rotary_tables(torch.tensor([[2046, 2047]]), 8, 1e4, torch.float64))
    assert ((y_BHSA.double() - exact).abs() <= 0.5 * 2**-7 * exact.abs() + 1e-3).all()


# Document layout


def test_document_layout_by_hand() -> None:
    tokens_BS = torch.tensor(
        [
            [5, 6, EOS, 7, EOS, EOS, 8],  # two documents, an empty one, and the start of a fourth
            [1, 2, 3, 4, 5, 6, 7],  # no end at all
            [EOS, 1, 2, 3, 4, 5, EOS],  # starts with the end of a document cut before, ends with an end
        ]
    )
    positions_BS, document_BS = document_layout(tokens_BS, EOS)
    assert positions_BS.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5]]
    assert document_BS.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7, [0, 1, 1, 1, 1, 1, 1]]
    assert positions_BS.dtype == document_BS.dtype == torch.int64


def test_document_layout_for_every_short_row() -> None:
    # All 2^6 patterns of ends, against counting one token at a time.
    for pattern in range(64):
        row = [EOS if pattern >> i & 1 else 1 for i in range(6)]
        positions, documents, position, document = [], [], 0, 0
        for token in row:
            positions.append(position)
            documents.append(document)
            position, document = (0, document + 1) if token == EOS else (position + 1, document)
        positions_BS, document_BS = document_layout(torch.tensor([row]), EOS)
        assert (positions_BS.tolist(), document_BS.tolist()) == ([positions], [documents])


def test_document_mask_by_hand() -> None:
    no, mask_B1SZ = -float("inf"), document_mask(torch.tensor([[0, 0, 1, 1]]), torch.bfloat16)
    assert mask_B1SZ.dtype == torch.bfloat16
    assert mask_B1SZ.tolist() == [[[[0, no, no, no], [0, 0, no, no], [no, no, 0, no], [no, no, 0, 0]]]]


# Attention


def oracle(
    layer: CausalSelfAttention, x_BSD: Tensor, positions: list[list[int]], documents: list[list[int]]
) -> Tensor:
    """Query by query, head by head; rotation as multiplication of complex numbers."""
    group = layer.num_heads // layer.num_kv_heads
    rows = []
    for b, x_SD in enumerate(x_BSD):
        outputs = []
        for s in range(len(x_SD)):
            seen = [z for z in range(s + 1) if documents[b][z] == documents[b][s]]
            heads = []
            for h in range(layer.num_heads):
                q = turn(one_head(layer, "q", x_SD[s], h), positions[b][s])
                keys = [turn(one_head(layer, "k", x_SD[z], h // group), positions[b][z]) for z in seen]
                weights = torch.stack([q @ k for k in keys]).div(math.sqrt(len(q))).exp()
                values = torch.stack([one_head(layer, "v", x_SD[z], h // group) for z in seen])
                heads.append(weights / weights.sum() @ values)
            outputs.append(layer.o_proj.weight @ torch.cat(heads))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def one_head(layer: CausalSelfAttention, kind: str, x_D: Tensor, head: int) -> Tensor:
    """Features of one head of queries, keys or values, before rotation."""
    project = getattr(layer, f"{kind}_proj")
    features = project.weight @ x_D
    if project.bias is not None:
        features = features + project.bias
    own = slice(head * layer.head_width, (head + 1) * layer.head_width)
    if kind == "v" or layer.qk_norm == "none":
        return features[own]
    norm = getattr(layer, f"{kind}_norm")
    together, weight = (features, norm.weight[own]) if layer.qk_norm == "full" else (features[own], norm.weight)
    return features[own] / (together.square().mean() + norm.eps).sqrt() * weight


def turn(x_A: Tensor, position: int) -> Tensor:
    half = len(x_A) // 2
    turned = []
    for r in range(half):
        angle = position * THETA ** (-r / half)
        turned.append(torch.complex(x_A[r], x_A[r + half]) * complex(math.cos(angle), math.sin(angle)))
    return torch.stack([z.real for z in turned] + [z.imag for z in turned])


TOKENS_BS = torch.tensor([[1, 2, EOS, 3, 4, 5], [1, EOS, EOS, 2, 3, EOS]])

CHOICES: dict[str, dict[str, Any]] = {
    "llama": {},
    "groups of 2": {"num_heads": 4, "num_kv_heads": 2},
    "one key head": {"num_heads": 4, "num_kv_heads": 1},
    "wide heads": {"head_dim": 6},
    "narrow heads": {"num_heads": 3, "head_dim": 2},  # 3 does not divide 8
    "biases": {"qkv_bias": True},
    "full norms": {"qk_norm": "full", "norm_eps": 0.1},
    "head norms": {"qk_norm": "per_head", "norm_eps": 0.1},
    "all of it": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "qkv_bias": True, "qk_norm": "full"},
    "all, by head": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "qkv_bias": True, "qk_norm": "per_head"},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("with_documents", [False, True])
def test_values_and_gradients_equal_the_oracle(with_documents: bool, choices: dict[str, Any]) -> None:
    layer, x_BSD = attention(**choices), random(2, 6, 8).requires_grad_()
    positions_BS, document_BS = torch.arange(6).expand(2, 6), torch.zeros(2, 6, dtype=torch.int64)
    if with_documents:
        positions_BS, document_BS = document_layout(TOKENS_BS, EOS)
    expected = oracle(layer, x_BSD, positions_BS.tolist(), document_BS.tolist())
    mask_B1SZ = document_mask(document_BS, x_BSD.dtype)
    actual = layer(x_BSD, positions_BS, mask_B1SZ) if with_documents else layer(x_BSD)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)

    inputs = (x_BSD, *layer.parameters())
    pull = random(2, 6, 8, seed=5)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, pull), torch.autograd.grad(expected, inputs, pull), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_no_token_sees_the_future() -> None:
    layer, x_BSD = attention(), random(1, 6, 8)
    for mask_B1SZ in (None, document_mask(torch.zeros(1, 6, dtype=torch.int64), x_BSD.dtype)):
        before = layer(x_BSD, None, mask_B1SZ)
        for s in range(6):
            changed_BSD = x_BSD.clone()
            changed_BSD[:, s] += 1
            after = layer(changed_BSD, None, mask_B1SZ)
            assert torch.equal(after[:, :s], before[:, :s])
            assert ((after[:, s:] - before[:, s:]).abs().amax(-1) > 1e-6).all()


def test_documents_are_isolated_and_equal_themselves_alone() -> None:
    layer, x_BSD = attention(), random(1, 6, 8)
    positions_BS, document_BS = document_layout(torch.tensor([[1, 2, EOS, 3, 4, 5]]), EOS)
    mask_B1SZ = document_mask(document_BS, x_BSD.dtype)
    whole = layer(x_BSD, positions_BS, mask_B1SZ)
    torch.testing.assert_close(whole[:, :3], layer(x_BSD[:, :3]), rtol=0, atol=1e-14)
    torch.testing.assert_close(whole[:, 3:], layer(x_BSD[:, 3:]), rtol=0, atol=1e-14)
    changed_BSD = x_BSD.clone()
    changed_BSD[:, :3] = 1e3 * random(1, 3, 8, seed=7)
    assert torch.equal(layer(changed_BSD, positions_BS, mask_B1SZ)[:, 3:], whole[:, 3:])
    # Without document ends the second document does see the first.
    assert not torch.allclose(layer(x_BSD)[:, 3:], whole[:, 3:])


def test_one_document_with_a_mask_equals_the_causal_kernel() -> None:
    layer, x_BSD = attention(), random(2, 6, 8)
    masked = layer(x_BSD, None, document_mask(torch.zeros(2, 6, dtype=torch.int64), x_BSD.dtype))
    torch.testing.assert_close(masked, layer(x_BSD), rtol=0, atol=1e-14)


def test_bf16_stays_near_float64_and_keeps_its_dtype() -> None:
    layer = attention(64, 4)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16().double()
    x_BSD = random(2, 32, 64, dtype=torch.bfloat16)
    exact = layer(x_BSD.double())
    out = layer.bfloat16()(x_BSD)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 2e-2 * exact.norm()


def test_the_state_holds_the_projections_and_what_was_asked_for() -> None:
    weights = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    assert list(attention().state_dict()) == weights
    assert not list(attention().buffers())
    state = attention(12, 6, num_kv_heads=2, head_dim=4, qkv_bias=True, qk_norm="full").state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        "q_proj.weight": [24, 12],
        "q_proj.bias": [24],
        "k_proj.weight": [8, 12],
        "k_proj.bias": [8],
        "v_proj.weight": [8, 12],
        "v_proj.bias": [8],
        "o_proj.weight": [12, 24],
        "q_norm.weight": [24],
        "k_norm.weight": [8],
    }
    state = attention(12, 6, num_kv_heads=2, head_dim=4, qk_norm="per_head").state_dict()
    assert [list(state[f"{kind}_norm.weight"].shape) for kind in "qk"] == [[4], [4]]


def test_head_shapes_that_cannot_be_are_refused() -> None:
    message = "hidden_size 12 is no multiple of 2 x num_heads 4 = 8; rotary positions need heads of even"
    with pytest.raises(ValueError, match=message):
        CausalSelfAttention(12, 4, THETA)
    with pytest.raises(ValueError, match="head_dim 3 is odd; rotary positions need heads of even width"):
        CausalSelfAttention(12, 4, THETA, head_dim=3)
    with pytest.raises(ValueError, match="num_kv_heads 3 does not divide num_heads 4, so no group is whole"):
        CausalSelfAttention(16, 4, THETA, num_kv_heads=3)


# The attention of published models: the same function under the same parameter names

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "rms_norm_eps": 1e-3,
}
PUBLISHED: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "llama": (llama, "Llama", {"num_key_value_heads": 4}, {}),
    "llama, grouped": (llama, "Llama", {"num_key_value_heads": 2}, {"num_kv_heads": 2}),
    "llama, wide heads": (
        llama,
        "Llama",
        {"num_key_value_heads": 1, "head_dim": 12},
        {"num_kv_heads": 1, "head_dim": 12},
    ),
    "qwen2": (qwen2, "Qwen2", {"num_key_value_heads": 2}, {"num_kv_heads": 2, "qkv_bias": True}),
    "qwen3": (
        qwen3,
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 16},
        {"num_kv_heads": 2, "head_dim": 16, "qk_norm": "per_head"},
    ),
    "olmoe": (olmoe, "Olmoe", {"num_key_value_heads": 4}, {"qk_norm": "full"}),
    "olmoe, grouped": (olmoe, "Olmoe", {"num_key_value_heads": 2}, {"num_kv_heads": 2, "qk_norm": "full"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_attention_is_one_of_the_choices(name: str) -> None:
    module, family, theirs_only, ours_only = PUBLISHED[name]
    config = getattr(module, f"{family}Config")(**SIZES, **theirs_only, attn_implementation="eager")
    theirs: nn.Module = getattr(module, f"{family}Attention")(config, layer_idx=0)
    ours = CausalSelfAttention(32, 4, THETA, norm_eps=1e-3, **ours_only)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = random(*parameter.shape, seed=seed, dtype=torch.float32) / 6
    ours.load_state_dict(theirs.state_dict())  # strict: the names and shapes are theirs

    x_BSD = random(2, 10, 32, dtype=torch.float32)
    turns = getattr(module, f"{family}RotaryEmbedding")(config)(x_BSD, torch.arange(10)[None])
    future_SZ = torch.full((10, 10), float("-inf")).triu(1)
    expected, _ = theirs(x_BSD, position_embeddings=turns, attention_mask=future_SZ[None, None])
    torch.testing.assert_close(ours(x_BSD), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1
