"""MoE++ models for `transformers`: inference and fine-tuning of what moepp_ds trains, and of the released model.

Imports torch and transformers alone (beside the configuration), so it also runs from inside an exported folder with
`trust_remote_code=True`. Tensor names are those of the released model (arXiv 2410.07348), extended where it has none.

A block:   h = h + attention(norm(h));   h = h + moe(norm(h), router logits of the MoE layer before)
A layer:   y = sum over the chosen experts i of g_i E_i(s x) + shared(x)

    FFN E(x) = W_down (silu(W_gate x) * W_value x)      constant E(x) = a1 x + a2 v, [a1, a2] = softmax(W_c x)
    copy E(x) = x                                       zero E(x) = 0

Nothing is dropped: every token gets all experts that it chose, however many those are. Router logits travel from
layer to layer within one forward pass; the cache needs keys and values alone.

Axis letters: B rows, S tokens of a row, T tokens of all rows, D width, H heads, A head width, P = A/2 planes of
rotation, E experts of all kinds, M places in a token's list of experts, N assignments, J constant experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_moepp import MoEChoices, MoEPPConfig, ReleasedMoEPPConfig

HIDDEN_PER_EXPERT = 8  # hidden features of a two-layer router for each expert


class MoEPPRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 or wider, rounded once."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x theta^(-2p/A), each [B, 1, S, P] in fp32 or wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    plane_P = torch.arange(head_dim // 2, device=positions_BS.device, dtype=dtype)
    angle_B1SP = positions_BS[:, None, :, None].to(dtype) * theta ** (-2.0 * plane_P / head_dim)
    return angle_B1SP.cos(), angle_B1SP.sin()


def apply_rotary(x_BHSA: Tensor, cos_B1SP: Tensor, sin_B1SP: Tensor) -> Tensor:
    """Turn the pairs (p, p + A/2) of each head by their angles."""
    first, second = x_BHSA.to(cos_B1SP.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos_B1SP - second * sin_B1SP, second * cos_B1SP + first * sin_B1SP), dim=-1)
    return turned.to(x_BHSA.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for who wants its weights: ([B, S, H, A], [B, H, S, keys]). The mask is added."""
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    score = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        score = score + attention_mask
    weight = torch.softmax(score, dim=-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(query.dtype)
    return (weight @ value).transpose(1, 2).contiguous(), weight


class MoEPPAttention(nn.Module):
    """Causal self-attention with rotary positions; heads of keys and values may be shared."""

    is_causal = True

    def __init__(self, config: MoEPPConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.attention_bias
        query, shared = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(width, query, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(query, width, bias=False)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = MoEPPRMSNorm(query if full else config.head_dim, config.rms_norm_eps)
            self.k_norm = MoEPPRMSNorm(shared if full else config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to what is cached and to x itself; returns the output and, from eager attention, the weights."""
        query = apply_rotary(self._heads(self.q_proj(x_BSD), "q_norm"), *rotary)
        key = apply_rotary(self._heads(self.k_proj(x_BSD), "k_norm"), *rotary)
        value = self.v_proj(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = eager_attention_forward
        # Before a user may switch, transformers searches this file for the next but one line (5.0), or for
        # `ALL_ATTENTION_FUNCTIONS.get_interface(` (later versions, which also know the line).
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y_BSHA, weight = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(y_BSHA.flatten(2)), weight

    def _heads(self, x_BSX: Tensor, norm: str) -> Tensor:
        """Queries or keys as [B, H, S, A], normalised over all heads, within each head, or not at all."""
        qk_norm = self.config.qk_norm
        if qk_norm == "full":
            x_BSX = getattr(self, norm)(x_BSX)
        x_BSHA = x_BSX.unflatten(-1, (-1, self.head_dim))
        if qk_norm == "per_head":
            x_BSHA = getattr(self, norm)(x_BSHA)
        return x_BSHA.transpose(1, 2)


class MoEPPDenseFFN(nn.Module):
    """The FFN of a dense layer, with LLaMA's names."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEPPExpert(nn.Module):
    """An FFN expert: one projection makes gate, then value."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * value)


class MoEPPConstantExpert(nn.Module):
    """E(x) = a1 x + a2 v, [a1, a2] = softmax(W_c x); computed in fp32 or wider."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(hidden_size))
        self.wg = nn.Linear(hidden_size, 2, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        with _no_autocast(x_TD.device):
            logits_T2 = F.linear(x_TD, self.wg.weight.to(x_TD.dtype))
        keep_T1, value_T1 = torch.softmax(logits_T2, dim=-1).split(1, dim=-1)
        return keep_T1 * x_TD + value_T1 * self.constant.to(x_TD.dtype)


class MoEPPRouter(nn.Module):
    """Scores all experts for every token and chooses; in fp32 or wider, whatever the dtype of the model."""

    def __init__(self, hidden_size: int, moe: MoEChoices, *, has_residual_map: bool) -> None:
        super().__init__()
        self.moe = moe
        experts, hidden = moe.num_experts, HIDDEN_PER_EXPERT * moe.num_experts
        self.wg: nn.Module
        if moe.router_layers == 2:
            first, second = nn.Linear(hidden_size, hidden, bias=False), nn.Linear(hidden, experts, bias=False)
            self.wg = nn.Sequential(first, nn.Tanh(), second)
        else:
            self.wg = nn.Linear(hidden_size, experts, bias=False)
        self.gate_map = nn.Linear(experts, experts, bias=False) if has_residual_map else None
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32) if moe.selection_bias else None)

    def forward(self, x_TD: Tensor, before_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns logits [T, E], which travel to the next MoE layer, and assignments: token, expert and weight [N].

        before_TE: the logits of the MoE layer before. Assignments are ordered by token, best expert first.
        """
        with _no_autocast(x_TD.device):
            logits_TE = self._logits(x_TD, before_TE)
        scored_TE = logits_TE
        if self.moe.logit_std is not None:
            scored_TE = logits_TE / logits_TE.std(dim=-1, keepdim=True) * self.moe.logit_std
        probability_TE = torch.softmax(scored_TE, dim=-1)
        preference_TE = scored_TE if self.bias is None else probability_TE + self.bias
        expert_TM, taken_TM = self._choose(preference_TE.detach(), probability_TE.detach())
        weight_TM = self._weigh(scored_TE, probability_TE, expert_TM, taken_TM)
        token_N, place_N = taken_TM.nonzero(as_tuple=True)
        return logits_TE, token_N, expert_TM[token_N, place_N], weight_TM[token_N, place_N]

    def _logits(self, x_TD: Tensor, before_TE: Tensor | None) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        logits = x_TD.to(dtype)
        for layer in self.wg if isinstance(self.wg, nn.Sequential) else [self.wg]:
            logits = F.linear(logits, layer.weight.to(dtype)) if isinstance(layer, nn.Linear) else layer(logits)
        if self.gate_map is not None and before_TE is not None:
            logits = logits + F.linear(before_TE, self.gate_map.weight.to(dtype))
        return logits

    def _choose(self, preference_TE: Tensor, probability_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts best first (the lower index where two are equal), and which of them a token takes.

        top_k: the first K. A threshold t: those before whom the others hold less than t of the probability, and
        always one; t = 1 takes all.
        """
        expert_TE = torch.argsort(preference_TE, dim=-1, descending=True, stable=True)
        if self.moe.top_k is not None:
            expert_TM = expert_TE[:, : self.moe.top_k]
            return expert_TM, torch.ones_like(expert_TM, dtype=torch.bool)
        assert self.moe.threshold is not None
        if self.moe.threshold >= 1:
            return expert_TE, torch.ones_like(expert_TE, dtype=torch.bool)
        mass_before_TE = F.pad(probability_TE.gather(-1, expert_TE).cumsum(dim=-1)[:, :-1], (1, 0))
        taken_TE = mass_before_TE < self.moe.threshold
        taken_TE[:, 0] = True
        return expert_TE, taken_TE

    def _weigh(
        self, scored_TE: Tensor, probability_TE: Tensor, expert_TM: Tensor, taken_TM: Tensor
    ) -> Tensor:
        """Combine weights: the probability, or its share among the chosen, or among those of them that compute."""
        if self.moe.combine == "softmax":
            weight_TM = probability_TE.gather(-1, expert_TM)
        else:
            counts_TM = taken_TM
            if self.moe.combine == "renormalize_computing":
                counts_TM = counts_TM & (expert_TM < self.moe.num_experts - self.moe.num_zero)
            lowest = torch.finfo(scored_TE.dtype).min  # finite: where nothing counts there is no nan, and times 0
            chosen_TM = scored_TE.gather(-1, expert_TM).masked_fill(~counts_TM, lowest)
            weight_TM = torch.softmax(chosen_TM, dim=-1) * counts_TM
        return weight_TM * self.moe.combine_scale


class MoEPPExperts(nn.Module):
    """FFN and constant experts by index; copy and zero experts follow them and hold nothing."""

    def __init__(self, hidden_size: int, moe: MoEChoices) -> None:
        super().__init__()
        self.moe = moe
        ffn = [MoEPPExpert(hidden_size, moe.expert_ffn_hidden_size) for _ in range(moe.num_ffn_experts)]
        self.experts = nn.ModuleList([*ffn, *(MoEPPConstantExpert(hidden_size) for _ in range(moe.num_constant))])

    def forward(self, x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        """The weighted sum over assignments, [T, D] in the dtype of x."""
        output_TD = self._zero_computation(x_TD, token_N, expert_N, weight_N)
        order_N = torch.argsort(expert_N, stable=True)
        counts = torch.bincount(expert_N, minlength=self.moe.num_experts).tolist()[: self.moe.num_ffn_experts]
        order_R = order_N[: sum(counts)]
        token_R = token_N[order_R]
        blocks = x_TD[token_R].split(counts)
        results = [expert(block) for expert, block in zip(self.experts, blocks) if len(block)]
        if not results:
            return output_TD
        weighted_RD = weight_N[order_R].unsqueeze(-1) * torch.cat(results)
        return output_TD.index_add(0, token_R, weighted_RD.to(x_TD.dtype))

    def _zero_computation(self, x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        """What copy and constant experts give: for every token at once, weighing 0 where they were not chosen."""
        moe = self.moe
        if not moe.num_copy and not moe.num_constant:
            return torch.zeros_like(x_TD)
        weight_TE = weight_N.new_zeros(len(x_TD), moe.num_experts).index_put((token_N, expert_N), weight_N)
        first_copy = moe.num_ffn_experts + moe.num_constant
        wide_TD = x_TD.to(weight_N.dtype)
        output_TD = weight_TE[:, first_copy : first_copy + moe.num_copy].sum(dim=-1, keepdim=True) * wide_TD
        for index in range(moe.num_ffn_experts, first_copy):
            output_TD = output_TD + weight_TE[:, index, None] * self.experts[index](wide_TD)
        return output_TD.to(x_TD.dtype)


class MoEPPLayer(nn.Module):
    """Router, experts, and the shared experts that every token uses (one FFN as wide as all of them)."""

    def __init__(self, hidden_size: int, moe: MoEChoices, *, has_residual_map: bool) -> None:
        super().__init__()
        self.input_scale = moe.expert_input_scale
        self.gate = MoEPPRouter(hidden_size, moe, has_residual_map=has_residual_map)
        self.experts = MoEPPExperts(hidden_size, moe)
        inner = moe.num_shared_experts * moe.expert_ffn_hidden_size
        self.shared = MoEPPExpert(hidden_size, inner) if inner else None
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if moe.shared_expert_gate else None

    def forward(self, x_TD: Tensor, before_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output [T, D] and the router logits [T, E]."""
        logits_TE, token_N, expert_N, weight_N = self.gate(x_TD, before_TE)
        input_TD = x_TD if self.input_scale == 1 else x_TD * self.input_scale
        output_TD = self.experts(input_TD, token_N, expert_N, weight_N)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = torch.sigmoid(self.shared_gate(x_TD)) * shared_TD
            output_TD = output_TD + shared_TD
        return output_TD, logits_TE


class MoEPPSparseFFN(nn.Module):
    """Holds a MoE layer under the name that the released model gives it."""

    def __init__(self, hidden_size: int, moe: MoEChoices, *, has_residual_map: bool) -> None:
        super().__init__()
        self.moe = MoEPPLayer(hidden_size, moe, has_residual_map=has_residual_map)

    def forward(self, x_TD: Tensor, before_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.moe(x_TD, before_TE)


class MoEPPBlock(GradientCheckpointingLayer):
    """Attention and then a MoE layer or a dense FFN, each around its residual connection."""

    def __init__(self, config: MoEPPConfig, layer_idx: int) -> None:
        super().__init__()
        moe, width = config.moe_choices(), config.hidden_size
        self.input_layernorm = MoEPPRMSNorm(width, config.rms_norm_eps)
        self.self_attn = MoEPPAttention(config, layer_idx)
        self.post_attention_layernorm = MoEPPRMSNorm(width, config.rms_norm_eps)
        self.mlp: nn.Module
        if moe.is_moe(layer_idx):
            self.mlp = MoEPPSparseFFN(width, moe, has_residual_map=moe.has_residual_map(layer_idx))
        else:
            self.mlp = MoEPPDenseFFN(width, config.intermediate_size)

    def forward(
        self, h_BSD: Tensor, before_TE: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden state, router logits of the newest MoE layer up to here, and attention weights if there are any."""
        attended_BSD, weight = self.self_attn(self.input_layernorm(h_BSD), **kwargs)
        h_BSD = h_BSD + attended_BSD
        x_BSD = self.post_attention_layernorm(h_BSD)
        if isinstance(self.mlp, MoEPPDenseFFN):
            return h_BSD + self.mlp(x_BSD), before_TE, weight
        output_TD, logits_TE = self.mlp(x_BSD.flatten(0, 1), before_TE)
        return h_BSD + output_TD.view_as(h_BSD), logits_TE, weight


class MoEPPPreTrainedModel(PreTrainedModel):
    """What transformers must know of the family."""

    config_class: type[MoEPPConfig] = MoEPPConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEPPBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Biases that decide a choice lose their meaning in bf16. The router's weights may be bf16: training uses bf16
    # copies of them too, and widens them before the product, as is done here.
    _keep_in_fp32_modules_strict = ["gate.bias"]
    # Checkpoints of old versions of transformers hold these; frequencies are worked out anew here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEPPConstantExpert):
            init.normal_(module.constant, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MoEPPRouter) and module.bias is not None:
            init.zeros_(module.bias)


class MoEPPModel(MoEPPPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoEPPBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = MoEPPRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """As LlamaModel's. router_logits: one [B * S, E] for each MoE layer, if asked for."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if _wanted(output_attentions, config.output_attentions) and config._attn_implementation != "eager":
            raise ValueError('attention weights are known to attn_implementation="eager" alone; load the model with it')
        h_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and _wanted(use_cache, config.use_cache) and not self.training:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = seen + torch.arange(h_BSD.shape[1], device=h_BSD.device)[None]
        shared = {
            "attention_mask": _causal_mask(config, h_BSD, attention_mask, past_key_values, position_ids),
            "rotary": rotary_tables(position_ids, config.head_dim, config.rope_theta, h_BSD.dtype),
            "past_key_values": past_key_values,
            "position_ids": position_ids,  # where they start anew, flash attention keeps documents apart
            **kwargs,
        }
        asked = {
            "hidden_states": _wanted(output_hidden_states, config.output_hidden_states),
            "attentions": _wanted(output_attentions, config.output_attentions),
            "router_logits": _wanted(output_router_logits, config.output_router_logits),
        }
        record: dict[str, list[Any]] = {name: [] for name, wanted in asked.items() if wanted}
        output = MoeModelOutputWithPast(
            last_hidden_state=self._blocks(h_BSD, shared, record),
            past_key_values=past_key_values,
            **{name: tuple(tensors) for name, tensors in record.items()},
        )
        return output if _wanted(return_dict, config.return_dict) else output.to_tuple()

    def _blocks(self, h_BSD: Tensor, shared: dict[str, Any], record: dict[str, list[Any]]) -> Tensor:
        """All blocks and the norm; what `record` has a list for is added to it."""
        before_TE = None
        for layer in self.layers:
            if "hidden_states" in record:
                record["hidden_states"].append(h_BSD)
            # Positional, so that reentrant gradient checkpointing sees that both need gradients.
            h_BSD, logits_TE, weight = layer(h_BSD, before_TE, **shared)
            if "attentions" in record:
                record["attentions"].append(weight)
            if "router_logits" in record and logits_TE is not before_TE:
                record["router_logits"].append(logits_TE)
            before_TE = logits_TE
        h_BSD = self.norm(h_BSD)
        if "hidden_states" in record:
            record["hidden_states"].append(h_BSD)
        return h_BSD


class MoEPPForCausalLM(MoEPPPreTrainedModel, GenerationMixin):
    """The language model: `generate` with a cache, and a loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # where the configuration ties them

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__(config)
        self.model = MoEPPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """As LlamaForCausalLM's. labels: [B, S] ids, shifted here; -100 is not scored. The loss is the language
        model's alone: balance losses belong to training from scratch.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        h_BSD = outputs.last_hidden_state
        logits_BSV = self.lm_head(h_BSD if isinstance(kept, int) else h_BSD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, self.vocab_size, **kwargs)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        return output if _wanted(return_dict, self.config.return_dict) else output.to_tuple()


class ReleasedMoEPPModel(MoEPPModel):
    """The same, for the keys of the released model."""

    config_class = ReleasedMoEPPConfig


class ReleasedMoEPPForCausalLM(MoEPPForCausalLM):
    """The same, for the keys of the released model."""

    config_class = ReleasedMoEPPConfig


def _causal_mask(
    config: PreTrainedConfig, h_BSD: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor
) -> Any:
    """The mask in the form that the attention in use wants. Versions of transformers name the arguments differently."""
    seen = 0 if cache is None else cache.get_seq_length()
    offered = {
        "config": config,
        "inputs_embeds": h_BSD,
        "input_embeds": h_BSD,
        "attention_mask": attention_mask,
        "cache_position": seen + torch.arange(h_BSD.shape[1], device=h_BSD.device),
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    make_mask: Callable[..., Any] = create_causal_mask
    known = inspect.signature(make_mask).parameters
    return make_mask(**{name: value for name, value in offered.items() if name in known})


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For products that are wide on purpose: autocast, as in mixed-precision fine-tuning, would round them."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _wanted(asked: bool | None, default: bool | None) -> bool:
    return bool(default if asked is None else asked)


__all__ = [
    "MoEPPForCausalLM",
    "MoEPPModel",
    "MoEPPPreTrainedModel",
    "ReleasedMoEPPForCausalLM",
    "ReleasedMoEPPModel",
]
