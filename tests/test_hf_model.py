"""The classes for transformers beside what exported folders show: fine-tuning, options of generate, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import same_bits, start, stored
from loaded_models import GOLDEN_SHARDS
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moepp_ds.hf import MoEPPConfig, MoEPPForCausalLM, ReleasedMoEPPConfig, ReleasedMoEPPForCausalLM
from moepp_ds.hf_export import export_checkpoint
from moepp_ds.hf_import import import_folder

IDS_BS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def section(**changes: Any) -> dict[str, Any]:
    """A `moe` section with these keys changed; `router` adds to the router's."""
    moe = copy.deepcopy(MoEPPConfig().moe)
    moe["router"].update(changes.pop("router", {}))
    return {**moe, **changes}


def make(**changes: Any) -> MoEPPForCausalLM:
    """A small model with dense layers in between, shared experts and selection biases."""
    torch.manual_seed(0)
    moe = section(every=2, num_shared_experts=1, shared_expert_gate=True, controller={"rule": "sign"})
    model = MoEPPForCausalLM(MoEPPConfig(**{**SIZES, "moe": moe, "qk_norm": "per_head", **changes}))
    for name, bias_E in model.named_buffers():
        assert name.endswith("gate.bias")
        bias_E.copy_(torch.randn(bias_E.shape) / 10)
    return model.eval()


def test_labels_give_the_mean_loss_of_what_is_scored() -> None:
    model = make()
    labels = IDS_BS.clone()
    labels[0, :5] = -100
    out = model(IDS_BS, labels=labels)
    predicted, targets = out.logits[:, :-1].flatten(0, 1), IDS_BS[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(predicted, targets, reduction="none")
    assert out.loss.item() == pytest.approx(losses[4:].mean().item(), rel=1e-5)
    assert torch.equal(model(IDS_BS, return_dict=False)[0], out.logits)


def test_every_weight_that_was_used_has_a_gradient() -> None:
    model = make(moe=section(router={"threshold": 1.0}, top_k=None, num_shared_experts=1, shared_expert_gate=True))
    model.train()
    model(IDS_BS, labels=IDS_BS).loss.backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert lacking == []


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # the new name is not in 5.0
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_no_gradient(reentrant: bool) -> None:
    model = make().train()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(IDS_BS, labels=IDS_BS).loss.backward()
        return [weight.grad for weight in model.parameters()]

    kept = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for one, other in zip(kept, gradients()):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_router_logits_hidden_states_and_attention_weights() -> None:
    model = make()
    out = model(IDS_BS, output_router_logits=True, output_hidden_states=True)
    assert [tuple(logits_TE.shape) for logits_TE in out.router_logits] == [(18, 12)] * 2
    assert len(out.hidden_states) == 5
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(IDS_BS, output_attentions=True)
    model.set_attn_implementation("eager")
    eager = model(IDS_BS, output_attentions=True)
    assert torch.allclose(eager.logits, out.logits, atol=1e-5)
    assert torch.allclose(eager.attentions[0].sum(-1), torch.ones(2, 4, 9))


def test_rows_that_pack_documents() -> None:
    model = make()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    packed = model(IDS_BS, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(IDS_BS[:, :4]).logits, model(IDS_BS[:, 4:]).logits], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)


def test_attention_is_told_the_positions() -> None:
    """Flash attention keeps packed documents apart by them."""
    told: list[Tensor] = []

    def witness(*args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        told.append(position_ids)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    AttentionInterface.register("witness", witness)
    model = make()
    model.set_attn_implementation("witness")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model(IDS_BS[:1], position_ids=positions)
    assert len(told) == 4 and all(torch.equal(one, positions) for one in told)


def test_the_last_logits_alone() -> None:
    model = make()
    assert torch.allclose(model(IDS_BS, logits_to_keep=2).logits, model(IDS_BS).logits[:, -2:], atol=1e-6)


@pytest.mark.parametrize("top_k", [{"top_k": 3}, {"top_k": None, "router": {"threshold": 0.5}}])
def test_sampling_beams_and_caches(top_k: dict[str, Any]) -> None:
    model = make(moe=section(num_zero=2, **top_k))
    greedy = model.generate(IDS_BS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS_BS, max_new_tokens=6, do_sample=False, use_cache=False), greedy)
    assert torch.equal(model.generate(IDS_BS, max_new_tokens=6, do_sample=True, top_k=1), greedy)
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(IDS_BS, **beams), model.generate(IDS_BS, use_cache=False, **beams))
    torch.manual_seed(1)
    drawn = model.generate(IDS_BS, max_new_tokens=6, do_sample=True, temperature=2.0)
    torch.manual_seed(1)
    assert torch.equal(model.generate(IDS_BS, max_new_tokens=6, do_sample=True, temperature=2.0), drawn)


def test_biases_stay_fp32_when_weights_do_not(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    for name, bias_E in half.named_buffers():
        assert torch.equal(bias_E, model.get_buffer(name))
    logits_BSV = half(IDS_BS, output_router_logits=True)
    assert logits_BSV.logits.dtype == torch.bfloat16
    assert logits_BSV.router_logits[0].dtype == torch.float32


def test_what_routes_is_exact_under_autocast() -> None:
    model = make()
    layer, x_TD = model.model.layers[1].mlp.moe, torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    constant = layer.experts.experts[8]
    routed, value_TD = layer.gate(x_TD, None), constant(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(layer.gate(x_TD, None), routed))
        assert torch.equal(constant(x_TD), value_TD)
        out = model(IDS_BS, labels=IDS_BS, output_router_logits=True)
    assert [logits_TE.dtype for logits_TE in out.router_logits] == [torch.float32] * 2
    out.loss.backward()
    assert model.model.layers[3].mlp.moe.gate.gate_map.weight.grad.any()


def test_auto_classes_know_both_model_types(tmp_path: Path) -> None:
    released = AutoModelForCausalLM.from_config(ReleasedMoEPPConfig(num_experts=[7], **SIZES))
    assert isinstance(released, ReleasedMoEPPForCausalLM)
    assert released.model.layers[0].mlp.moe.gate.gate_map.weight.shape == (7, 7)
    released.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "MoE++" and "moe" not in saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(dict(again.state_dict()), dict(released.state_dict()))
    base = AutoModel.from_pretrained(tmp_path)
    last = base(IDS_BS).last_hidden_state
    assert torch.allclose(released.lm_head(last), released.eval()(IDS_BS).logits, atol=1e-6)


def test_what_a_user_saves_comes_back_into_a_run(tmp_path: Path) -> None:
    loaded = start(tmp_path / "run", "shared")
    export_checkpoint(tmp_path / "run", tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")  # of this package: nothing of the folder runs
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "tuned")
    recipe = tmp_path / "continued.yaml"
    recipe.write_text(
        f"deepspeed: ds_configs/zero2_fp32.json\ndata: {{path: {GOLDEN_SHARDS}, seq_len: 64}}\n"
        "train: {max_steps: 4, batch_tokens: 1024, micro_batch_size: 4, warmup_steps: 1}\n"
    )
    done = import_folder(tmp_path / "tuned", tmp_path / "back", recipe)
    assert done.recipe.model == loaded.recipe.model
    old, new = stored(tmp_path / "run"), stored(tmp_path / "back")
    assert torch.equal(new.pop("head.weight"), 2 * old.pop("head.weight"))
    assert same_bits(new, old)


def test_gradients_are_ours(tmp_path: Path) -> None:
    loaded = start(tmp_path / "run", "paper")
    export_checkpoint(tmp_path / "run", tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    loaded.model.requires_grad_(True)
    ids_BS = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(3))
    model(ids_BS, labels=ids_BS).loss.backward()
    loaded.model.token_losses(ids_BS).mean().backward()
    ours, theirs = loaded.model.blocks[1].moe, model.model.layers[1].mlp.moe
    pairs = [
        (ours.router.residual_EE.grad, theirs.gate.gate_map.weight.grad),
        (ours.router.weight_ED.grad, theirs.gate.wg.weight.grad),
        (ours.experts.gate_up_EDG.grad[2], theirs.experts.experts[2].up_proj.weight.grad.t()),
        (ours.constants.value_JD.grad, torch.stack([theirs.experts.experts[e].constant.grad for e in (4, 5)])),
    ]
    for one, other in pairs:
        assert one.any() and torch.allclose(one, other, atol=1e-5)


# What must be refused


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        (section(num_magic=1), "moe has keys that this version does not know: num_magic"),
        (section(router={"magic": 1}), "moe.router has keys that this version does not know: magic"),
        ({key: value for key, value in section().items() if key != "combine"}, "moe lacks combine"),
        (section(router={"threshold": 0.5}), "top_k 2, threshold 0.5: give exactly one"),
        (section(top_k=13), "top_k 13 of 12 experts"),
        (section(combine="sum"), "combine 'sum' is none of softmax"),
        (section(router={"num_layers": 3}), "1 or 2 layers"),
    ],
)
def test_sections_that_are_not_understood(moe: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MoEPPConfig(**SIZES, moe=moe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"qk_norm": "both"}, "qk_norm 'both' is none of none, full, per_head"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "scaled rotary positions"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "of a part of the features"),
    ],
)
def test_keys_of_llama_that_are_not_done(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MoEPPConfig(**{**SIZES, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": [8, 16]}, "equally many experts"),
        ({"num_experts": [4]}, "num_ffn_experts 0"),
        ({"moe_expert_interval": 2}, "knows 1 alone"),
        ({"attention_bias": True}, "without biases"),
        ({"moe": section()}, "has no `moe` section"),
    ],
)
def test_released_keys_that_are_not_done(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReleasedMoEPPConfig(**{**SIZES, **change})


def test_positions_may_be_said_in_the_new_keys() -> None:
    config = MoEPPConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert config.rope_theta == 7.0
    assert AutoConfig.for_model("MoE++", **SIZES, num_experts=9).moe_choices().num_ffn_experts == 5
