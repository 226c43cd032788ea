"""The first half of a block: RMSNorm, rotary positions and causal self-attention, as LLaMA has them.

    q, k, v = Wq x, Wk x, Wv x         plus a bias each, where the layer has them (Qwen2)
    q, k    = norm(q), norm(k)         where the layer has the norms: over all heads together (OLMoE), or within
                                       each head (Qwen3)
    y       = Wo softmax(turn(q) turn(k)^T / sqrt(A) + mask) v       one softmax for each of H heads

Queries have H heads, keys and values U, which divides H: query head h reads key head h / (H / U), rounded down.

The mask lets a token see itself and what came before it; where document ends are given, in its own document
only. Positions are then counted from each document's start, so a document gives what it would give in a row
of its own.

Axis letters: B rows, S sequence (as queries), Z sequence (as keys), D model width, H heads, U heads of keys and
values, A head width, P = A/2 planes of rotation, 1 an axis of length one.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp_ds.products import linear, product_dtype

QKNorm = Literal["none", "full", "per_head"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Computed in fp32 (float64 in float64) and rounded once, to the input's dtype.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Normalise; the axes before the last are free."""
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, self.eps)


def rotary_tables(
    positions_BS: Tensor, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x theta^(-2p/A) for plane p, each [B, 1, S, P] of `dtype`, fp32 or wider.

    positions_BS: integer. Computed at every forward, because a buffer would be cast to bf16 with the model,
    and bf16 cannot tell neighbouring positions beyond 256 apart.
    """
    plane_P = torch.arange(head_width // 2, device=positions_BS.device, dtype=dtype)
    frequency_P = theta ** (-2.0 * plane_P / head_width)
    angle_B1SP = positions_BS[:, None, :, None].to(dtype) * frequency_P
    return angle_B1SP.cos(), angle_B1SP.sin()


def apply_rotary(x_BHSA: Tensor, cos_B1SP: Tensor, sin_B1SP: Tensor) -> Tensor:
    """Turn each head's planes by their angles, in fp32 or wider; returns x's dtype.

    Plane p is the pair (p, p + A/2), LLaMA's half-split order, so weights of that family fit unpermuted.
    """
    first_BHSP, second_BHSP = x_BHSA.to(cos_B1SP.dtype).chunk(2, dim=-1)
    rotated_BHSA = torch.cat(
        (
            first_BHSP * cos_B1SP - second_BHSP * sin_B1SP,
            second_BHSP * cos_B1SP + first_BHSP * sin_B1SP,
        ),
        dim=-1,
    )
    return rotated_BHSA.to(x_BHSA.dtype)


def document_layout(tokens_BS: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Where each token stands: (positions_BS, document_BS), both int64.

    An EOS token belongs to the document it ends; the next token starts a document at position 0. A row's
    first token starts one too, even where the row was cut from the middle of a text. Documents count from 0
    in each row.
    """
    ends_BS = (tokens_BS == eos_id).long()
    document_BS = ends_BS.cumsum(1) - ends_BS
    index_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    follows_end_BS = F.pad(ends_BS[:, :-1], (1, 0))
    start_BS = (follows_end_BS * index_S).cummax(1).values
    return index_S - start_BS, document_BS


def document_mask(document_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, [B, 1, S, Z] of `dtype`: 0 for the same document and not the future, else -inf.

    One for all layers: of a mask of booleans every call of the kernel would make such a one, and keep it.
    """
    seen_B1SZ = (document_BS[:, None, :, None] == document_BS[:, None, None, :]).tril()
    return torch.zeros(seen_B1SZ.shape, dtype=dtype, device=document_BS.device).masked_fill_(~seen_B1SZ, -torch.inf)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention without dropout or cache.

    hidden_size: D. num_heads: H. rope_theta: base of the rotary frequencies.
    num_kv_heads: U, by default H. head_dim: A, even, by default D / H. qkv_bias: biases of q, k and v.
    qk_norm: RMSNorm (norm_eps) of queries and keys before rotation, `full` with a weight for each feature of all
    heads ([H A] and [U A]), `per_head` with one set of A weights that all heads share.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rope_theta: float,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: QKNorm = "none",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_width = _default_head_width(hidden_size, num_heads) if head_dim is None else head_dim
        if self.head_width % 2:
            raise ValueError(f"head_dim {head_dim} is odd; rotary positions need heads of even width")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}, so no group is whole")
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        query_width, key_width = num_heads * self.head_width, self.num_kv_heads * self.head_width
        self.q_proj = nn.Linear(hidden_size, query_width, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, key_width, bias=qkv_bias)
        self.o_proj = nn.Linear(query_width, hidden_size, bias=False)
        if qk_norm != "none":
            full = qk_norm == "full"
            self.q_norm = RMSNorm(query_width if full else self.head_width, norm_eps)
            self.k_norm = RMSNorm(key_width if full else self.head_width, norm_eps)

    def forward(
        self, x_BSD: Tensor, positions_BS: Tensor | None = None, mask_B1SZ: Tensor | None = None
    ) -> Tensor:
        """Attend; returns [B, S, D] in x's dtype.

        positions_BS: int positions for the rotation, by default 0..S-1, see `document_layout`. mask_B1SZ: see
        `document_mask`, in `product_dtype`; without it a row is one document and the fast causal kernels serve.
        """
        if positions_BS is None:
            positions_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        q_BHSA, k_BUSA, v_BUSA = self._queries_keys_values(x_BSD)
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        cos_B1SP, sin_B1SP = rotary_tables(positions_BS, self.head_width, self.rope_theta, dtype)
        fast = product_dtype(x_BSD)
        y_BHSA = F.scaled_dot_product_attention(
            apply_rotary(q_BHSA, cos_B1SP, sin_B1SP).to(fast),
            self._to_all_heads(apply_rotary(k_BUSA, cos_B1SP, sin_B1SP).to(fast)),
            self._to_all_heads(v_BUSA.to(fast)),
            attn_mask=mask_B1SZ,
            is_causal=mask_B1SZ is None,
        )
        return linear(y_BHSA.transpose(1, 2).flatten(2).to(x_BSD.dtype), self.o_proj.weight)

    def _queries_keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps before the rotation: [B, H, S, A], and twice [B, U, S, A]."""
        q_BSX, k_BSX, v_BSX = (_project(x_BSD, layer) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm == "full":
            q_BSX, k_BSX = self.q_norm(q_BSX), self.k_norm(k_BSX)
        q_BSHA, k_BSUA, v_BSUA = (y_BSX.unflatten(-1, (-1, self.head_width)) for y_BSX in (q_BSX, k_BSX, v_BSX))
        if self.qk_norm == "per_head":
            q_BSHA, k_BSUA = self.q_norm(q_BSHA), self.k_norm(k_BSUA)
        return q_BSHA.transpose(1, 2), k_BSUA.transpose(1, 2), v_BSUA.transpose(1, 2)

    def _to_all_heads(self, x_BUSA: Tensor) -> Tensor:
        """Give every query head the keys or values of its group, [B, H, S, A].

        Repeated here, not by `enable_gqa`: on a GPU the kernel that serves masks and fp32 does not know groups, and
        what would take its place there holds all scores in memory.
        """
        group = self.num_heads // self.num_kv_heads
        return x_BUSA if group == 1 else x_BUSA.repeat_interleave(group, dim=1)


def _default_head_width(hidden_size: int, num_heads: int) -> int:
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size {hidden_size} is no multiple of 2 x num_heads {num_heads} = {2 * num_heads}; "
            "rotary positions need heads of even width"
        )
    return hidden_size // num_heads


def _project(x_BSD: Tensor, layer: nn.Linear) -> Tensor:
    y_BSX = linear(x_BSD, layer.weight)
    return y_BSX if layer.bias is None else y_BSX + layer.bias
