"""The MoE++ transformer: embedding, blocks, head; and how its parameters start.

h = E[tokens]
for each block:   h += attention(norm(h));   h += moe(norm(h), router logits of the MoE layer before)
loss = cross-entropy(norm(h) W_head, next tokens) + beta * sum of balance losses      (MoE++, eq 9)
                                                  + zeta * sum of router z-losses

Pre-norm, RMSNorm, rotary positions, SwiGLU, head untied from the embedding. With `every: n` only each n-th block has a
MoE++ layer and the others a dense FFN of the same expert function; the router logits travel past them.

Axis letters, beside the project's: Z sequence as keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from moepp_ds.attention import CausalSelfAttention, RMSNorm, document_layout, document_mask
from moepp_ds.config import ActivationCheckpointing, ModelConfig, MoEConfig, expert_capacity
from moepp_ds.controller import RoutingInputs
from moepp_ds.cross_entropy import mean_token_loss, token_losses
from moepp_ds.experts import FFNExperts
from moepp_ds.keyed import keyed_generator
from moepp_ds.kinds import ExpertKinds
from moepp_ds.moe_layer import LayerSettings, MoELayer, MoEReport
from moepp_ds.products import product_dtype
from moepp_ds.router import RouterSettings, jitter
from moepp_ds.statistics import RoutingStatistics, stack

LayerFactory = Callable[..., MoELayer]

_aten = torch.ops.aten
_ATTENTION_KERNELS: Sequence[OpOverload] = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)
"""Their result, as wide as the model, costs as much to compute again as the sequence is long; a projection, as D."""


@dataclass(frozen=True)
class ModelOutput:
    """What one micro batch gives. L counts MoE layers.

    loss = lm_loss + balance_weight * balance_loss + z_loss_weight * z_loss; all scalars in fp32, lm_loss in nats per
    token, the other two summed over layers. statistics: of all MoE layers. layers: what each of them reports.
    Only loss and layers hold on to the graph.
    """

    loss: Tensor
    lm_loss: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    statistics: RoutingStatistics
    layers: tuple[MoEReport, ...]


class Block(nn.Module):
    """Attention and then a MoE++ layer or a dense FFN, each around its residual connection."""

    def __init__(self, config: ModelConfig, *, moe: MoELayer | None, recompute: ActivationCheckpointing) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = CausalSelfAttention(
            config.hidden_size,
            config.num_heads,
            config.rope_theta,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
        )
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.moe = moe
        self.ffn = FFNExperts(1, config.hidden_size, config.ffn_hidden_size) if moe is None else None

    def forward(
        self,
        h_BSD: Tensor,
        positions_BS: Tensor | None,
        mask_B1SZ: Tensor | None,
        logits_TE: Tensor | None,
        told: Mapping[str, Tensor | None],
    ) -> tuple[Tensor, MoEReport | None]:
        """Return the new hidden state and, of a MoE block, what its layer reports.

        logits_TE: of the MoE layer before. told: what a MoE layer is told beside its input (bias_E, share_E, noise_TD).
        """
        again = self.recompute if torch.is_grad_enabled() else "none"
        keep = _ATTENTION_KERNELS if again == "selective" else ()
        h_BSD = h_BSD + _maybe_recompute(again != "none", self._attend, h_BSD, positions_BS, mask_B1SZ, keep=keep)
        x_TD = self.ffn_norm(h_BSD).flatten(0, 1)
        if self.moe is not None:
            out = self.moe(x_TD, logits_TE, recompute=again == "full", **told)
            return h_BSD + out.output_TD.view_as(h_BSD), out.report()
        assert self.ffn is not None
        return h_BSD + _maybe_recompute(again == "full", self.ffn, x_TD, (len(x_TD),)).view_as(h_BSD), None

    def _attend(self, h_BSD: Tensor, positions_BS: Tensor | None, mask_B1SZ: Tensor | None) -> Tensor:
        return self.attention(self.attention_norm(h_BSD), positions_BS, mask_B1SZ)


def _maybe_recompute(
    wanted: bool, function: Callable[..., Tensor], *args: object, keep: Sequence[OpOverload] = ()
) -> Tensor:
    """The function's result; if `wanted`, with nothing kept but its arguments and what operators in `keep` give."""
    if not wanted:
        return function(*args)
    contexts = partial(create_selective_checkpoint_contexts, list(keep)) if keep else noop_context_fn
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class MoEPlusPlusModel(nn.Module):
    """A causal language model of MoE++ blocks.

    eos_id: the token that ends a document; needed where attention stops at document ends.
    layer_factory: makes the MoE layers; expert parallelism passes its own.
    recompute: activation checkpointing of every block, routing excepted; see `train.activation_checkpointing`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        eos_id: int,
        layer_factory: LayerFactory = MoELayer,
        recompute: ActivationCheckpointing = "none",
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

    def forward(self, tokens_BS1: Tensor, routing: RoutingInputs | None = None) -> ModelOutput:
        """Losses of rows of S+1 token ids: the first S are read, the last S predicted."""
        h_BSD, layers = self.hidden(tokens_BS1[:, :-1], routing)
        lm_loss = mean_token_loss(h_BSD.flatten(0, 1), self.head.weight, tokens_BS1[:, 1:].flatten())
        moe = self.config.moe
        balance_loss = torch.stack([layer.balance_loss for layer in layers]).sum()
        z_loss = torch.stack([layer.z_loss for layer in layers]).sum()
        loss = lm_loss + moe.balance_weight * balance_loss
        if moe.router.z_loss_weight:
            loss = loss + moe.router.z_loss_weight * z_loss
        return ModelOutput(
            loss=loss,
            lm_loss=lm_loss.detach(),
            balance_loss=balance_loss.detach(),
            z_loss=z_loss.detach(),
            statistics=stack([layer.statistics for layer in layers]),
            layers=tuple(layers),
        )

    def token_losses(self, tokens_BS1: Tensor, routing: RoutingInputs | None = None) -> Tensor:
        """Cross-entropy of every predicted token of rows of S+1 ids, [B, S] in nats: what evaluation needs."""
        h_BSD, _ = self.hidden(tokens_BS1[:, :-1], routing)
        targets_BS = tokens_BS1[:, 1:]
        return token_losses(h_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten()).view_as(targets_BS)

    def hidden(self, tokens_BS: Tensor, routing: RoutingInputs | None = None) -> tuple[Tensor, list[MoEReport]]:
        """The normalised last hidden state [B, S, D] and what every MoE layer reports."""
        routing = routing or RoutingInputs()
        positions_BS = mask_B1SZ = None
        h_BSD = self.embedding(tokens_BS)
        if self.config.document_attention:
            positions_BS, document_BS = document_layout(tokens_BS, self.eos_id)
            mask_B1SZ = document_mask(document_BS, product_dtype(h_BSD))
        layers: list[MoEReport] = []
        for block in self.blocks:
            logits_TE = layers[-1].logits_TE if layers else None
            told = {} if block.moe is None else self._tell(len(layers), routing, h_BSD)
            h_BSD, report = block(h_BSD, positions_BS, mask_B1SZ, logits_TE, told)
            layers += [] if report is None else [report]
        return self.norm(h_BSD), layers

    def _tell(self, layer: int, routing: RoutingInputs, h_BSD: Tensor) -> dict[str, Tensor | None]:
        """What MoE layer `layer` is told beside its input."""
        amount = self.config.moe.router.jitter
        noise_TD = None
        if amount and self.training:
            noise_TD = jitter(
                h_BSD.shape,
                amount,
                seed=routing.seed,
                first_row=routing.first_row,
                layer=layer,
                device=h_BSD.device,
            )
        return {
            "bias_E": None if routing.bias_LE is None else routing.bias_LE[layer],
            "share_E": None if routing.share_LE is None else routing.share_LE[layer],
            "noise_TD": noise_TD,
        }


def expert_kinds(moe: MoEConfig) -> ExpertKinds:
    """The experts that a recipe asks for."""
    return ExpertKinds(moe.num_ffn_experts, moe.num_constant, moe.num_copy, moe.num_zero)


def _moe_layer(config: ModelConfig, factory: LayerFactory, *, has_residual: bool) -> MoELayer:
    moe, kinds = config.moe, expert_kinds(config.moe)

    def seats(num_tokens: int) -> list[int]:
        capacity = expert_capacity(moe, num_tokens)
        return [capacity.ffn] * kinds.num_ffn + [capacity.zero_computation] * kinds.num_zero_computation

    settings = LayerSettings(
        router=RouterSettings(
            top_k=moe.top_k,
            threshold=moe.router.threshold,
            num_layers=moe.router.num_layers,
            logit_std=moe.router.logit_std,
            combine=moe.combine,
            combine_scale=moe.combine_scale,
            num_zero=moe.num_zero,
        ),
        tau=moe.tau,
        seats=None if moe.dropless else seats,
        drop_policy=moe.drop_policy or "probability",
        expert_input_scale=moe.expert_input_scale,
        shared_ffn_hidden_size=moe.num_shared_experts * config.expert_ffn_hidden_size,
        shared_expert_gate=moe.shared_expert_gate,
        balance=moe.balance,
        balance_counts=moe.balance_counts,
    )
    return factory(config.hidden_size, config.expert_ffn_hidden_size, kinds, settings, has_residual=has_residual)


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
    """Fill every parameter: norms 1, biases 0, all else normal(0, std).

    Each parameter, and each FFN expert of a stacked one, draws from its own generator keyed by (seed, global name,
    global expert), so the values do not depend on the layout: ranks that own other experts make other numbers, and
    replicas agree without being sent.
    """
    for name, tensor in _independent_pieces(model):
        if name.endswith(("norm.weight", ".bias")):
            tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=keyed_generator(f"{seed}/{name}")) * std)


def _independent_pieces(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    offsets = expert_offsets(model)
    for name, parameter in model.named_parameters():
        if name in offsets:
            yield from ((f"{name}/{offsets[name] + e}", piece) for e, piece in enumerate(parameter))
        else:
            yield name, parameter
