"""Upcycling: what the original computes is kept where it can be, and what cannot be taken is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, LaunchDeepspeed, SampleShards
from run_folders import metrics, status
from safetensors.torch import load_file, save_file
from shard_sets import write_set
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moepp_ds.__main__ import main
from moepp_ds.checkpoint.weights import WeightReader
from moepp_ds.config import RecipeError
from moepp_ds.hf_folder import FolderError
from moepp_ds.model import MoEPlusPlusModel, initialize
from moepp_ds.start import Started
from moepp_ds.upcycle import upcycle

V, D = 64, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2, "rope_theta": 1e6},
    "olmoe": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "head_dim": 6,
        "mlp_only_layers": [0],
    },
}
DENSE = {
    "llama": {"intermediate_size": 24, "tie_word_embeddings": True},
    "mistral": {"intermediate_size": 24, "head_dim": 6, "sliding_window": 4096},
    "qwen2": {"intermediate_size": 24, "num_key_value_heads": 1, "rope_theta": 5e5},
    "qwen3": {"intermediate_size": 24, "head_dim": 6},
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
NONE = {"num_zero": 0, "num_copy": 0, "num_constant": 0}
TOKENS_BS = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(0))


def published(folder: Path, model_type: str, *, seed: int = 0, original: bool = True, **changes: Any) -> nn.Module:
    """A random model of transformers, saved in `folder`; biases and norms are random too."""
    settings = {**SIZES, **(MOE | DENSE)[model_type], **changes}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    model.save_pretrained(folder, save_original_format=original)
    return model


def write_recipe(path: Path, moe: dict[str, Any], *, data: str = "none", **model: Any) -> Path:
    content = {
        "deepspeed": str(ROOT / "ds_configs/zero2_fp32.json"),
        "model": {**model, "moe": {"dropless": True, **moe}},
        "data": {"path": data, "seq_len": 64},
        "train": {"max_steps": 1, "batch_tokens": 512, "micro_batch_size": 2, "precision": "fp32", "seed": 7},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def made(
    tmp_path: Path, folders: Sequence[Path], moe: dict[str, Any], *sets: str, data: str = "none", **options: Any
) -> tuple[MoEPlusPlusModel, Started]:
    """Upcycle into tmp_path/run, and the model that a run would start from."""
    recipe = write_recipe(tmp_path / "recipe.yaml", moe, data=data)
    done = upcycle(tmp_path / "run", recipe, folders, overrides=sets, **options)
    return model_of(done), done


def model_of(done: Started) -> MoEPlusPlusModel:
    reader = WeightReader(done.folder)
    model = MoEPlusPlusModel(done.recipe.model, eos_id=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name).view(parameter.shape))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    if isinstance(model, MoEPlusPlusModel):
        return nn.functional.linear(model.hidden(TOKENS_BS)[0], model.head.weight)
    return model(TOKENS_BS).logits


def assert_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    found, meant = logits(ours), logits(theirs)
    assert meant.std() > 0.5  # and not two models that say nothing
    assert (found - meant).abs().max() < 1e-5 * meant.abs().max()


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Change, add or (None) take away tensors; in names, __ stands for a dot."""
    file = folder / "model.safetensors"
    content: dict[str, Tensor | None] = dict(load_file(file))
    content |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file, {"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


# A published MoE


@pytest.mark.parametrize("original", [True, False], ids=["published", "stacked"])
@pytest.mark.parametrize("model_type", MOE)
def test_a_moe_without_additions_computes_what_it_did(tmp_path: Path, model_type: str, original: bool) -> None:
    theirs = published(tmp_path / "hf", model_type, original=original)
    ours, done = made(tmp_path, [tmp_path / "hf"], NONE)
    assert_same_function(ours, theirs)
    assert done.recipe.model.moe.top_k == MOE[model_type]["num_experts_per_tok"]


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"tie_word_embeddings": True}, {"qkv_bias": False}])
def test_a_moe_is_taken_with_other_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = published(tmp_path / "hf", "qwen2_moe", **changes)
    ours, _ = made(tmp_path, [tmp_path / "hf"], NONE)
    assert_same_function(ours, theirs)


def test_a_moe_keeps_every_weight_and_gains_experts(tmp_path: Path) -> None:
    published(tmp_path / "hf", "mixtral")
    stored = load_file(tmp_path / "hf/model.safetensors")
    ours, done = made(tmp_path, [tmp_path / "hf"], {"num_zero": 1, "num_copy": 1, "num_constant": 2})
    made_fresh = MoEPlusPlusModel(done.recipe.model, eos_id=0)
    initialize(made_fresh, seed=7, std=0.02)
    fresh, found = dict(made_fresh.named_parameters()), dict(ours.named_parameters())
    for i in range(2):
        moe, theirs = f"blocks.{i}.moe", f"model.layers.{i}.block_sparse_moe"
        for e in range(5):
            gate_up_DG, down_FD = found[f"{moe}.experts.gate_up_EDG"][e], found[f"{moe}.experts.down_EFD"][e]
            assert torch.equal(gate_up_DG[:, :24], stored[f"{theirs}.experts.{e}.w1.weight"].T)
            assert torch.equal(gate_up_DG[:, 24:], stored[f"{theirs}.experts.{e}.w3.weight"].T)
            assert torch.equal(down_FD, stored[f"{theirs}.experts.{e}.w2.weight"].T)
        row_ED = found[f"{moe}.router.weight_ED"]
        assert torch.equal(row_ED[:5], stored[f"{theirs}.gate.weight"])
        mean_D, spread = row_ED[:5].mean(0), row_ED[:5].std(0, correction=0).square().mean().sqrt()
        assert 0 < (row_ED[5:] - mean_D).abs().max() < 0.05 * spread
        for name in ("selector_J2D", "value_JD"):
            assert torch.equal(found[f"{moe}.constants.{name}"], fresh[f"{moe}.constants.{name}"])
    assert "blocks.0.moe.router.residual_EE" not in found
    assert not found["blocks.1.moe.router.residual_EE"].any()
    assert torch.equal(ours.head.weight, stored["lm_head.weight"])


def test_a_moe_with_additions_begins_close_to_what_it_was(tmp_path: Path) -> None:
    theirs = published(tmp_path / "hf", "olmoe", num_experts=16, num_experts_per_tok=2)
    # A router as a z-loss leaves it: all of a token's logits are far below 0.
    mean_D = {f"model__layers__{i}__mlp__gate__weight": None for i in range(2)}
    with torch.no_grad():
        direction_D = theirs.model.embed_tokens.weight.mean(0)
        for i, name in enumerate(mean_D):
            gate = theirs.model.layers[i].mlp.gate.weight
            mean_D[name] = gate.copy_(gate - 3 * direction_D / direction_D.norm())
    rewrite(tmp_path / "hf", **mean_D)
    ours, _ = made(tmp_path, [tmp_path / "hf"], {"num_zero": 1, "num_copy": 1, "num_constant": 2})
    kept = [layer.routing for layer in ours.hidden(TOKENS_BS)[1]]
    for routing in kept:
        assert int(routing.expert_N[routing.rank_N == 0].max()) < 16  # never a first choice
        assert (routing.expert_N >= 16).float().mean() < 0.02
        assert routing.probability_TE[:, 16:].sum(1).max() <= 4 / 20 * 1.05
    near = (logits(ours) - logits(theirs)).abs().mean()
    with torch.no_grad():
        for block in ours.blocks:
            block.moe.router.weight_ED[16:] = 0.02 * torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    assert near < 0.5 * (logits(ours) - logits(theirs)).abs().mean()


# Dense checkpoints


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("model_type", DENSE)
def test_copies_of_a_dense_model_compute_what_it_did(tmp_path: Path, model_type: str, every: int) -> None:
    theirs = published(tmp_path / "hf", model_type)
    ours, done = made(tmp_path, [tmp_path / "hf"], {"num_ffn_experts": 4, "every": every, **NONE})
    assert_same_function(ours, theirs)
    assert done.recipe.model.moe.combine == "renormalize_selected"
    assert ours.blocks[1].moe.router.weight_ED.std() > 0.01  # copies are told apart by their router


@pytest.mark.parametrize("moe", [{}, {"num_shared_experts": 2}, {"router": {"threshold": 1.0, "num_layers": 2}}])
def test_a_split_dense_model_computes_what_it_did_when_all_parts_are_taken(tmp_path: Path, moe: dict[str, Any]) -> None:
    theirs = published(tmp_path / "hf", "llama")
    moe = {"num_ffn_experts": 6, "router": {"threshold": 1.0}, **NONE, **moe}
    ours, done = made(tmp_path, [tmp_path / "hf"], moe, experts="split")
    assert done.recipe.model.expert_ffn_hidden_size == 24 // (6 + moe.get("num_shared_experts", 0))
    assert done.recipe.model.moe.combine_scale == 6.0
    assert_same_function(ours, theirs)


def test_parts_may_be_had_more_than_once(tmp_path: Path) -> None:
    theirs = published(tmp_path / "hf", "llama")
    moe = {"num_ffn_experts": 6, "router": {"threshold": 1.0}, "expert_ffn_hidden_size": 8, **NONE}
    ours, done = made(tmp_path, [tmp_path / "hf"], moe, experts="split")
    assert done.recipe.model.moe.combine_scale == 3.0
    weight_EDG = ours.blocks[0].moe.experts.gate_up_EDG
    assert torch.equal(weight_EDG[:3], weight_EDG[3:])
    assert_same_function(ours, theirs)


def test_parts_of_several_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    stored = []
    for seed, folder in enumerate(folders):
        published(folder, "llama", seed=seed)
        stored.append(load_file(folder / "model.safetensors"))
    ours, _ = made(tmp_path, folders, {"num_ffn_experts": 4, **NONE}, experts="split")
    experts = ours.blocks[1].moe.experts
    for e, (folder, start) in enumerate([(0, 0), (0, 12), (1, 0), (1, 12)]):
        theirs = {kind: stored[folder][f"model.layers.1.mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        part = slice(start, start + 12)
        assert torch.equal(experts.gate_up_EDG[e], torch.cat((theirs["gate"][part], theirs["up"][part])).T)
        assert torch.equal(experts.down_EFD[e], theirs["down"][:, part].T)


def test_several_folders_are_copied_in_turn_and_averaged_beside(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    a, b = (published(folder, "qwen2", seed=seed) for seed, folder in enumerate(folders))
    ours, done = made(tmp_path, folders, {"num_ffn_experts": 3, "every": 2, **NONE})
    down_EFD = ours.blocks[1].moe.experts.down_EFD
    for e, model in enumerate((a, b, a)):
        assert torch.equal(down_EFD[e], model.model.layers[1].mlp.down_proj.weight.T)
    pairs = [
        (ours.embedding.weight, lambda model: model.model.embed_tokens.weight),
        (ours.head.weight, lambda model: model.lm_head.weight),
        (ours.blocks[0].attention.q_proj.bias, lambda model: model.model.layers[0].self_attn.q_proj.bias),
        (ours.blocks[1].ffn_norm.weight, lambda model: model.model.layers[1].post_attention_layernorm.weight),
        (ours.blocks[0].ffn.down_EFD[0], lambda model: model.model.layers[0].mlp.down_proj.weight.T),
    ]
    for found, theirs in pairs:
        assert torch.equal(found, (theirs(a) + theirs(b)) / 2)
    origin = WeightReader(done.folder).index["origin"]
    assert [entry["folder"] for entry in origin["from"]] == [str(folder) for folder in folders]
    assert (origin["program"], origin["experts"], origin["attention"]) == ("upcycle", "copy", "average")
    first = upcycle(tmp_path / "first", tmp_path / "recipe.yaml", folders, attention="first")
    assert torch.equal(model_of(first).embedding.weight, a.model.embed_tokens.weight)


def test_noise_is_relative_and_of_the_seed(tmp_path: Path) -> None:
    theirs = published(tmp_path / "hf", "llama", intermediate_size=256)
    made_before: list[Tensor] = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        folder = tmp_path / name
        folder.mkdir()
        moe = {"num_ffn_experts": 2, **NONE}
        options = {"experts": "noise", "noise": 0.1}
        ours, done = made(folder, [tmp_path / "hf"], moe, f"train.seed={seed}", **options)
        down_EFD = ours.blocks[0].moe.experts.down_EFD.detach()
        meant_FD = theirs.model.layers[0].mlp.down_proj.weight.T
        for noise_FD in down_EFD - meant_FD:
            assert noise_FD.std().item() == pytest.approx(0.1 * meant_FD.std().item(), rel=0.05)
        assert not torch.equal(down_EFD[0], down_EFD[1])
        made_before.append(down_EFD)
        assert WeightReader(done.folder).index["origin"]["noise"] == 0.1
    assert torch.equal(made_before[0], made_before[1])
    assert not torch.equal(made_before[0], made_before[2])


def test_a_bin_folder_in_bf16_is_taken(tmp_path: Path) -> None:
    published(tmp_path / "hf", "llama", tie_word_embeddings=False)
    file = tmp_path / "hf/model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # a buffer, as old files have it
    file.unlink()
    torch.save(tensors, tmp_path / "hf/pytorch_model.bin")
    ours, _ = made(tmp_path, [tmp_path / "hf"], {"num_ffn_experts": 2})
    assert torch.equal(ours.head.weight, tensors["lm_head.weight"].float())


# What is refused


def test_every_wrong_tensor_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    published(tmp_path / "hf", "mixtral")
    rewrite(
        tmp_path / "hf",
        model__norm__weight=None,
        model__layers__0__block_sparse_moe__gate__weight=torch.zeros(4, D),
        model__layers__1__block_sparse_moe__experts__4__w2__weight=torch.zeros(D, 24, dtype=torch.int8),
        model__layers__2__extra=torch.zeros(1),
    )
    with pytest.raises(FolderError) as error:
        made(tmp_path, [tmp_path / "hf"], NONE)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0] == f"{tmp_path}/hf does not hold the tensors that its config.json asks for:"
    assert set(lines[1:]) == {
        "missing: model.norm.weight [16]",
        "of another shape: model.layers.0.block_sparse_moe.gate.weight is [4, 16], the model's is [5, 16]",
        "of another kind: model.layers.1.block_sparse_moe.experts.4.w2.weight is int8, and weights must be plain "
        "floating point numbers",
        "extra: model.layers.2.extra [1]",
    }
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_not_finite_leaves_no_run(tmp_path: Path) -> None:
    published(tmp_path / "hf", "llama")
    rewrite(tmp_path / "hf", model__norm__weight=torch.full((D,), torch.nan))
    with pytest.raises(ValueError, match="norm.weight"):
        made(tmp_path, [tmp_path / "hf"], {"num_ffn_experts": 2})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model_type, changes, said",
    [
        ("gpt2", {}, "model_type 'gpt2' cannot be upcycled; these can: llama, mistral"),
        ("MoE++", {}, "use moepp import for MoE"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu: experts here are SwiGLU"),
        ("llama", {"attention_bias": True}, "attention_bias true: it puts a bias on o_proj"),
        ("llama", {"mlp_bias": True}, "mlp_bias true"),
        ("llama", {"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, "rope_scaling linear"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling dynamic"),
        ("llama", {"rope_parameters": {"rope_theta": "long"}}, "rope_theta 'long': it must be a number"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: its weights are quantized"),
        ("llama", {"hidden_size": None}, "hidden_size is None; these must be whole numbers from 1 to 64"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("mixtral", {"num_local_experts": 10**12}, "num_experts is 1000000000000; .* to 64, the longest"),
        ("llama", {"model_type": []}, r"model_type \[\] cannot be upcycled"),
        ("llama", {"rms_norm_eps": "small"}, "is not a config of llama.*rms_norm_eps"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmoe", {"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]: here layer i .from 0. is MoE when"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 20}, "a multiple of moe_intermediate_size 12"),
        ("mistral", {"sliding_window": 32}, "its attention sees 32 tokens .sliding_window.*data.seq_len 64 are longer"),
    ],
)
def test_what_this_model_cannot_do_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], said: str
) -> None:
    saved = model_type if model_type in MOE | DENSE else "llama"
    published(tmp_path / "hf", saved)
    reconfigure(tmp_path / "hf", **{"model_type": model_type, **changes})
    with pytest.raises(FolderError, match=said):
        made(tmp_path, [tmp_path / "hf"], NONE if saved in MOE else {"num_ffn_experts": 4, **NONE})
    assert not (tmp_path / "run").exists()


def test_everything_unsupported_is_listed_at_once(tmp_path: Path) -> None:
    published(tmp_path / "hf", "llama")
    reconfigure(tmp_path / "hf", hidden_act="gelu", attention_bias=True, mlp_bias=True)
    with pytest.raises(FolderError, match="(?s)hidden_act gelu.*attention_bias true.*mlp_bias true"):
        made(tmp_path, [tmp_path / "hf"], {"num_ffn_experts": 4})


@pytest.mark.parametrize(
    "model_type, moe, options, said",
    [
        ("mixtral", {"num_ffn_experts": 8}, {}, "num_ffn_experts is 8 in the recipe, and 5 in the checkpoint"),
        ("mixtral", {"num_shared_experts": 1}, {}, "num_shared_experts is 1 in the recipe, and 0"),
        ("mixtral", {"router": {"num_layers": 2}}, {}, "router.num_layers is 2 in the recipe, and 1"),
        ("mixtral", {"expert_ffn_hidden_size": 12}, {}, "expert_ffn_hidden_size is 12 in the recipe, and 24"),
        ("mixtral", {}, {"experts": "copy"}, "--experts, --attention and --noise are for dense checkpoints"),
        ("llama", {}, {}, "num_ffn_experts: is required"),
        ("llama", {"num_ffn_experts": 4}, {"noise": 0.1}, "--noise 0.1 has no effect without --experts noise"),
        ("llama", {"num_ffn_experts": 4}, {"noise": -1.0, "experts": "noise"}, "--noise -1 must be above 0"),
        ("llama", {"num_ffn_experts": 4, "num_shared_experts": 1}, {}, "--experts copy has no FFN for them"),
        ("llama", {"num_ffn_experts": 4, "expert_ffn_hidden_size": 12}, {}, "or use --experts split"),
        ("llama", {"num_ffn_experts": 7}, {"experts": "split"}, "cannot be cut into model.moe.num_ffn_experts 7"),
        (
            "llama",
            {"num_ffn_experts": 4, "expert_ffn_hidden_size": 8},
            {"experts": "split"},
            "num_ffn_experts 4 must be a multiple of 3, the parts of width 8 in an FFN of width 24",
        ),
        (
            "llama",
            {"num_ffn_experts": 4, "expert_ffn_hidden_size": 7},
            {"experts": "split"},
            "expert_ffn_hidden_size 7 must divide the checkpoint's width 24",
        ),
        (
            "llama",
            {"num_ffn_experts": 4, "expert_ffn_hidden_size": 24, "num_shared_experts": 1},
            {"experts": "split"},
            "into more parts than num_shared_experts 1",
        ),
        (
            "llama",
            {"num_ffn_experts": 4, "num_shared_experts": 2, "shared_expert_gate": True},
            {"experts": "split"},
            "shared_expert_gate is True in the recipe, and False",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, model_type: str, moe: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    published(tmp_path / "hf", model_type)
    with pytest.raises(RecipeError, match=said):
        made(tmp_path, [tmp_path / "hf"], moe, **options)
    assert not (tmp_path / "run").exists()


def test_sizes_that_the_recipe_gives_otherwise_are_all_listed(tmp_path: Path) -> None:
    published(tmp_path / "hf", "llama")
    recipe = write_recipe(tmp_path / "recipe.yaml", {"num_ffn_experts": 4}, num_layers=3, qkv_bias=True, rope_theta=5e5)
    with pytest.raises(FolderError, match="(?s)leave these keys out.*num_layers is 3.*qkv_bias is True") as error:
        upcycle(tmp_path / "run", recipe, [tmp_path / "hf"])
    assert "rope_theta" not in str(error.value)  # a number that may be changed, as for longer texts
    write_recipe(recipe, {"num_ffn_experts": 4}, rope_theta=5e5, norm_eps=1e-5)
    done = upcycle(tmp_path / "run", recipe, [tmp_path / "hf"])
    assert done.notices[0] == "model.rope_theta is 500000.0 in the recipe, and 10000.0 in the checkpoint"
    assert not any("norm_eps" in notice for notice in done.notices)  # it says what the checkpoint does


def test_folders_of_several_kinds_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "a", "llama")
    published(tmp_path / "b", "qwen3", num_hidden_layers=1)
    published(tmp_path / "c", "mixtral")
    with pytest.raises(FolderError, match="(?s)different sizes or kinds.*num_layers: 2 in .*a, 1 in .*qk_norm: none"):
        made(tmp_path, [tmp_path / "a", tmp_path / "b"], {"num_ffn_experts": 4})
    with pytest.raises(FolderError, match="c: a MoE is upcycled alone"):
        made(tmp_path, [tmp_path / "a", tmp_path / "c"], {"num_ffn_experts": 4})
    with pytest.raises(FolderError, match="num_ffn_experts 1 leaves some of 2 folders unused"):
        made(tmp_path, [tmp_path / "a", tmp_path / "a"], {"num_ffn_experts": 1, "top_k": 2})
    with pytest.raises(FolderError, match="num_shared_experts 1 would come from one of 2 folders"):
        moe = {"num_ffn_experts": 4, "num_shared_experts": 1}
        made(tmp_path, [tmp_path / "a", tmp_path / "a"], moe, experts="split")


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    published(tmp_path / "hf", "llama")
    made(tmp_path, [tmp_path / "hf"], {"num_ffn_experts": 2})
    with pytest.raises(RecipeError, match="already holds a run"):
        made(tmp_path, [tmp_path / "hf"], {"num_ffn_experts": 2})


# The data beside it


def test_shards_are_looked_at(tmp_path: Path) -> None:
    published(tmp_path / "hf", "llama", max_position_embeddings=32)
    moe = {"num_ffn_experts": 2, **NONE}
    recipe = write_recipe(tmp_path / "recipe.yaml", moe, data=str(tmp_path / "none"))
    done = upcycle(tmp_path / "a", recipe, [tmp_path / "hf"])
    assert "texts of 32 tokens (max_position_embeddings), data.seq_len is 64" in done.notices[0]
    assert "make them with the checkpoint's tokenizer" in done.notices[1]
    reconfigure(tmp_path / "hf", max_position_embeddings=64)
    for vocab_size in (V, V - 1, V + 1):
        write_set(tmp_path / "shards", {"pile": {"x": [[2, 3, 4]]}}, vocab_size=vocab_size)
        recipe = write_recipe(tmp_path / "recipe.yaml", moe, data=str(tmp_path / "shards"))
        if vocab_size > V:
            with pytest.raises(FolderError, match="have 65 ids, the checkpoint 64: they were made with another"):
                upcycle(tmp_path / "b", recipe, [tmp_path / "hf"])
            continue
        done = upcycle(tmp_path / str(vocab_size), recipe, [tmp_path / "hf"])
        padded = "the shards have 63 ids, the checkpoint's embedding 64 rows"
        assert [notice.split(";")[0] for notice in done.notices] == ([] if vocab_size == V else [padded])
    (tmp_path / "shards/tokenizer").mkdir()
    (tmp_path / "shards/tokenizer/none").write_text("theirs")
    (tmp_path / "hf/tokenizer.json").write_text("ours")
    write_set(tmp_path / "shards", {"pile": {"x": [[2, 3, 4]]}}, vocab_size=V)
    recipe = write_recipe(tmp_path / "recipe.yaml", moe, data=str(tmp_path / "shards"))
    done = upcycle(tmp_path / "c", recipe, [tmp_path / "hf"])
    assert "is not tokenizer.json of" in done.notices[0]


def moepp(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command's exit code, run in this process: starting another takes as long as all of a test here."""
    monkeypatch.setattr(sys, "argv", ["moepp", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_zero_computation_experts_come_with_advice(tmp_path: Path) -> None:
    published(tmp_path / "hf", "mixtral")
    moe = {"num_zero": 1, "num_copy": 0, "num_constant": 0}
    _, done = made(tmp_path, [tmp_path / "hf"], moe)
    # Two of 5 FFN experts and one other at tau 0.75: 2 x 3.75 / 4.75.
    assert "the 1 zero-computation experts begin almost unused" in done.notices[-1]
    assert "--set model.moe.controller={} steers to 1.58 FFN experts per token" in done.notices[-1]
    recipe = tmp_path / "recipe.yaml"
    done = upcycle(tmp_path / "steered", recipe, [tmp_path / "hf"], overrides=["model.moe.controller={}"])
    assert done.recipe.model.moe.controller is not None
    assert not any("unused" in notice for notice in done.notices)


@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_a_folder_in_shards_is_taken(tmp_path: Path, model_type: str) -> None:
    theirs = published(tmp_path / "one", model_type)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    ours, _ = made(tmp_path, [tmp_path / "hf"], NONE if model_type in MOE else {"num_ffn_experts": 2, **NONE})
    assert_same_function(ours, theirs)


@pytest.mark.dist
def test_the_command_starts_a_run_that_trains(
    tmp_path: Path,
    sample_shards: SampleShards,
    launch_deepspeed: LaunchDeepspeed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published(tmp_path / "hf", "qwen2_moe", vocab_size=sample_shards.vocab_size)
    moe = {"num_zero": 1, "num_copy": 1, "num_constant": 1}
    recipe, run = write_recipe(tmp_path / "recipe.yaml", moe, data=str(sample_shards.path)), tmp_path / "run"
    command = ["upcycle", str(run), "--recipe", str(recipe), "--from", str(tmp_path / "hf")]
    command += ["--set", "parallel.expert_parallel=2", "--set", "evaluation.rows=1"]
    assert moepp(monkeypatch, *command) == 0
    assert f"{run}/recipe.yaml --run-dir {run} --resume auto" in capsys.readouterr().out
    arguments = [str(run / "recipe.yaml"), "--run-dir", str(run), "--resume", "auto"]
    trained = launch_deepspeed(2, "moepp_ds.train", arguments)
    assert trained.returncode == 0, trained.stdout[-3000:]
    assert status(run)["state"] == "completed"
    (record,) = metrics(run)
    assert 0 < record["lm_loss"] < 20
    assert moepp(monkeypatch, *command) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "already holds a run" in said
