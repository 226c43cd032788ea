"""The first half of a block: RMSNorm, rotary positions and causal self-attention, as LLaMA has them.

    y = Wo softmax(turn(Wq x) turn(Wk x)^T / sqrt(A) + mask) Wv x        one softmax for each of H heads

The mask lets a token see itself and what came before it; where document ends are given, in its own document
only. Positions are then counted from each document's start, so a document gives what it would give in a row
of its own.

Axis letters: B rows, S sequence (as queries), Z sequence (as keys), D model width, H heads, A head width,
P = A/2 planes of rotation, 1 an axis of length one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp_ds.products import linear, product_dtype


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


def document_mask(document_BS: Tensor) -> Tensor:
    """Who sees whom, bool [B, 1, S, Z]: the same document, and not the future."""
    same_B1SZ = document_BS[:, None, :, None] == document_BS[:, None, None, :]
    return same_B1SZ.tril()


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention without biases, dropout or cache.

    hidden_size: D. num_heads: H, dividing D into heads of even width. rope_theta: base of the rotary
    frequencies.
    """

    def __init__(self, hidden_size: int, num_heads: int, rope_theta: float) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size {hidden_size} is no multiple of 2 x num_heads {num_heads} = {2 * num_heads}; "
                "rotary positions need heads of even width"
            )
        self.num_heads = num_heads
        self.head_width = hidden_size // num_heads
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, x_BSD: Tensor, positions_BS: Tensor | None = None, document_BS: Tensor | None = None
    ) -> Tensor:
        """Attend; returns [B, S, D] in x's dtype.

        positions_BS: int positions for the rotation, by default 0..S-1. document_BS: int document of each
        token; without it a row is one document and the fast causal kernels serve. Both come from
        `document_layout`.
        """
        if positions_BS is None:
            positions_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        q_BHSA, k_BHSA, v_BHSA = (
            linear(x_BSD, project.weight).unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        cos_B1SP, sin_B1SP = rotary_tables(positions_BS, self.head_width, self.rope_theta, dtype)
        fast = product_dtype(x_BSD)
        y_BHSA = F.scaled_dot_product_attention(
            apply_rotary(q_BHSA, cos_B1SP, sin_B1SP).to(fast),
            apply_rotary(k_BHSA, cos_B1SP, sin_B1SP).to(fast),
            v_BHSA.to(fast),
            attn_mask=None if document_BS is None else document_mask(document_BS),
            is_causal=document_BS is None,
        )
        return linear(y_BHSA.transpose(1, 2).flatten(2).to(x_BSD.dtype), self.o_proj.weight)
