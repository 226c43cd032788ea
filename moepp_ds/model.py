"""The MoE++ transformer: embedding, blocks, head; and how its parameters start.

h = E[tokens]
for each block:   h += attention(norm(h));   h += moe(norm(h), router logits of the MoE layer before)
losses = cross-entropy(norm(h) W_head, next tokens) + beta * sum of balance losses      (MoE++, eq 9)

Pre-norm, RMSNorm, rotary positions, SwiGLU, head untied from the embedding. With `every: n` only each n-th block has a
MoE++ layer and the others a dense FFN of the same expert function; the router logits travel past them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp_ds.attention import CausalSelfAttention, RMSNorm, document_layout
from moepp_ds.config import ModelConfig, MoEConfig, expert_capacity
from moepp_ds.experts import FFNExperts
from moepp_ds.kinds import ExpertKinds
from moepp_ds.losses import token_losses
from moepp_ds.moe_layer import LayerSettings, MoELayer, MoEOutput

LayerFactory = Callable[..., MoELayer]


@dataclass(frozen=True)
class ModelOutput:
    """What one micro batch gives. L counts MoE layers.

    loss = lm_loss + balance_weight * balance_loss; all scalars in fp32, lm_loss in nats per token.
    wanted_LE, kept_LE: int64, assignments per MoE layer and expert before and after seats.
    """

    loss: Tensor
    lm_loss: Tensor
    balance_loss: Tensor
    wanted_LE: Tensor
    kept_LE: Tensor


class Block(nn.Module):
    """Attention and then a MoE++ layer or a dense FFN, each around its residual connection."""

    def __init__(self, config: ModelConfig, *, moe: MoELayer | None, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = CausalSelfAttention(config.hidden_size, config.num_heads, config.rope_theta)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.moe = moe
        self.ffn = FFNExperts(1, config.hidden_size, config.ffn_hidden_size) if moe is None else None

    def forward(
        self, h_BSD: Tensor, positions_BS: Tensor | None, document_BS: Tensor | None, logits_TE: Tensor | None
    ) -> tuple[Tensor, MoEOutput | None]:
        """Return the new hidden state and, of a MoE block, what its layer returned beside it."""
        h_BSD = h_BSD + self._maybe_recompute(self._attend, h_BSD, positions_BS, document_BS)
        x_TD = self.ffn_norm(h_BSD).flatten(0, 1)
        if self.moe is not None:
            out = self.moe(x_TD, logits_TE, recompute=self.recompute)
            return h_BSD + out.output_TD.view_as(h_BSD), out
        assert self.ffn is not None
        return h_BSD + self._maybe_recompute(self.ffn, x_TD, (len(x_TD),)).view_as(h_BSD), None

    def _attend(self, h_BSD: Tensor, positions_BS: Tensor | None, document_BS: Tensor | None) -> Tensor:
        return self.attention(self.attention_norm(h_BSD), positions_BS, document_BS)

    def _maybe_recompute(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


class MoEPlusPlusModel(nn.Module):
    """A causal language model of MoE++ blocks.

    eos_id: the token that ends a document; needed where attention stops at document ends.
    layer_factory: makes the MoE layers; expert parallelism passes its own.
    recompute: activation checkpointing of every block, routing excepted.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        eos_id: int,
        layer_factory: LayerFactory = MoELayer,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.eos_id = eos_id
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList()
        has_residual = False  # the first MoE layer has no logits before it
        for i in range(config.num_layers):
            moe = None
            if config.is_moe(i):
                moe = _moe_layer(config, layer_factory, has_residual=has_residual)
                has_residual = config.moe.gating_residual
            self.blocks.append(Block(config, moe=moe, recompute=recompute))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BS1: Tensor) -> ModelOutput:
        """Losses of rows of S+1 token ids: the first S are read, the last S predicted."""
        h_BSD, layers = self.hidden(tokens_BS1[:, :-1])
        losses_T = token_losses(h_BSD.flatten(0, 1), self.head.weight, tokens_BS1[:, 1:].flatten())
        lm_loss = losses_T.mean()
        balance_loss = torch.stack([layer.balance_loss for layer in layers]).sum()
        return ModelOutput(
            loss=lm_loss + self.config.moe.balance_weight * balance_loss,
            lm_loss=lm_loss.detach(),
            balance_loss=balance_loss.detach(),
            wanted_LE=torch.stack([layer.wanted_E for layer in layers]),
            kept_LE=torch.stack([layer.kept_E for layer in layers]),
        )

    def token_losses(self, tokens_BS1: Tensor) -> Tensor:
        """Cross-entropy of every predicted token of rows of S+1 ids, [B, S] in nats: what evaluation needs."""
        h_BSD, _ = self.hidden(tokens_BS1[:, :-1])
        targets_BS = tokens_BS1[:, 1:]
        return token_losses(h_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten()).view_as(targets_BS)

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, list[MoEOutput]]:
        """The normalised last hidden state [B, S, D] and what every MoE layer returned."""
        positions_BS = document_BS = None
        if self.config.document_attention:
            positions_BS, document_BS = document_layout(tokens_BS, self.eos_id)
        h_BSD = self.embedding(tokens_BS)
        layers: list[MoEOutput] = []
        for block in self.blocks:
            logits_TE = layers[-1].logits_TE if layers else None
            h_BSD, out = block(h_BSD, positions_BS, document_BS, logits_TE)
            layers += [] if out is None else [out]
        return self.norm(h_BSD), layers


def expert_kinds(moe: MoEConfig) -> ExpertKinds:
    """The experts that a recipe asks for."""
    return ExpertKinds(moe.num_ffn_experts, moe.num_constant, moe.num_copy, moe.num_zero)


def _moe_layer(config: ModelConfig, factory: LayerFactory, *, has_residual: bool) -> MoELayer:
    moe, kinds = config.moe, expert_kinds(config.moe)

    def seats(num_tokens: int) -> list[int]:
        capacity = expert_capacity(moe, num_tokens)
        return [capacity.ffn] * kinds.num_ffn + [capacity.zero_computation] * kinds.num_zero_computation

    settings = LayerSettings(
        top_k=moe.top_k, tau=moe.tau, seats=None if moe.dropless else seats, drop_policy=moe.drop_policy
    )
    return factory(config.hidden_size, config.ffn_hidden_size, kinds, settings, has_residual=has_residual)


def expert_offsets(model: nn.Module) -> dict[str, int]:
    """Names of the parameters that are stacked by local FFN expert, with the global index of their first expert."""
    return {
        f"{module_name}.experts.{name}": module.first_local_expert
        for module_name, module in model.named_modules()
        if isinstance(module, MoELayer)
        for name, _ in module.experts.named_parameters()
    }


@torch.no_grad()
def initialize(model: nn.Module, *, seed: int, std: float) -> None:
    """Fill every parameter: norms 1, all else normal(0, std).

    Each parameter, and each FFN expert of a stacked one, draws from its own generator keyed by (seed, global name,
    global expert), so the values do not depend on the layout: ranks that own other experts make other numbers, and
    replicas agree without being sent.
    """
    for name, tensor in _independent_pieces(model):
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
            continue
        key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def _independent_pieces(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    offsets = expert_offsets(model)
    for name, parameter in model.named_parameters():
        if name in offsets:
            yield from ((f"{name}/{offsets[name] + e}", piece) for e, piece in enumerate(parameter))
        else:
            yield name, parameter
