"""Checkpoints that DeepSpeed's own saver wrote, from real engines, become runs of ours; others are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, LaunchDeepspeed, find_free_port, run_in_group
from hf_models import logits
from loaded_models import moepp, start_run
from programs.native_model import RECIPE, RUNS, TOKENS, recipe, settings
from run_folders import metrics, train
from safetensors.torch import load_file
from torch import Tensor

from moepp_ds.checkpoint import CheckpointError
from moepp_ds.checkpoint.files import read_index
from moepp_ds.config import RecipeError
from moepp_ds.ds_native import import_deepspeed
from moepp_ds.ds_native.checkpoint import NativeCheckpoint
from moepp_ds.ds_native.names import find_sources
from moepp_ds.ds_native.partitions import cut
from moepp_ds.load import load_model
from moepp_ds.start import Started

BY_NAME = {run.name: run for run in RUNS}
WITH_MOMENTS = [run.name for run in RUNS if run.stage and not run.special]
KINDS = ("weight", "exp_avg", "exp_avg_sq")

NAMES = r"""
wte\.(.*): model.embed_tokens.\1
h\.(\d+)\.(input_layernorm|self_attn|post_attention_layernorm)\.(.*): model.layers.\1.\2.\3
h\.(\d+)\.mlp\.moe.*experts\.(\d+)\.w1\.weight: model.layers.\1.mlp.moe.experts.experts.\2.gate_proj.weight
h\.(\d+)\.mlp\.moe.*experts\.(\d+)\.w3\.weight: model.layers.\1.mlp.moe.experts.experts.\2.up_proj.weight
h\.(\d+)\.mlp\.moe.*experts\.(\d+)\.w2\.weight: blocks.\1.moe.experts.experts.\2.down_proj.weight
h\.(\d+)\.mlp\.moe\.deepspeed_moe\.gate\.(.*): blocks.\1.moe.gate.\2
ln_f\.weight: norm.weight
out\.weight: head.weight
"""
"""Of the style `named`; to names of the released model, and of ours."""


@pytest.fixture(scope="session")
def natives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `native_model.RUNS`; all of a world are made when the first of them is asked for."""
    folder, made = tmp_path_factory.mktemp("native"), set[int]()

    def get(name: str) -> Path:
        world = BY_NAME[name].world
        if world not in made:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
            command += ["--master_port", str(find_free_port()), "--module", "tests.programs.native_runs", str(folder)]
            log = folder / f"world-{world}.log"
            env = {**os.environ, "DS_ACCELERATOR": "cpu"}
            code = run_in_group(command, env, log, 150.0)
            assert code == 0, log.read_text(errors="replace")[-4000:]
            made.add(world)
        return folder / name

    return get


def names_file(folder: Path, text: str = NAMES) -> Path:
    file = folder / "names.yaml"
    file.write_text(text)
    return file


def imported(
    native: Path, run_dir: Path, name: str, *more: str, tag: str | None = "global_step2", **options: Any
) -> Started:
    """The run folder of that run of `native_model.RUNS`."""
    run = BY_NAME[name]
    if run.style == "named" and "names" not in options:
        options["names"] = names_file(run_dir.parent)
    return import_deepspeed(native / "saved", run_dir, RECIPE, [*settings(run), *more], tag=tag, **options)


def truth(native: Path) -> dict[str, dict[int, Tensor]]:
    """`kind|name` -> range by its first element, of all ranks; a range that two ranks own is an error."""
    found: dict[str, dict[int, Tensor]] = {}
    for file in native.glob("truth-*.safetensors"):
        for key, values in load_file(file).items():
            kind, name, start = key.split("|")
            assert int(start) not in found.setdefault(f"{kind}|{name}", {})
            found[f"{kind}|{name}"][int(start)] = values
    return found


def fragments(checkpoint: Path) -> dict[str, Tensor]:
    """`kind|name` -> all elements that one of our checkpoints holds."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for file in checkpoint.glob("part-*.safetensors"):
        for key, values in load_file(file).items():
            kind, name, start = key.split("|")
            pieces.setdefault(f"{kind}|{name}", []).append((int(start), values))
    in_order = {key: sorted(found, key=lambda piece: piece[0]) for key, found in pieces.items()}
    return {key: torch.cat([values for _, values in found]) for key, found in in_order.items()}


# -- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize("name", [run.name for run in RUNS if run.stage])
def test_weights_and_moments_are_those_of_the_live_engine(natives: Callable[[str], Path], name: str) -> None:
    """Bit for bit, under the numbers that experts have among all; every element of every rank is asked for."""
    native = natives(name)
    checkpoint, counted = NativeCheckpoint(native / "saved", "global_step2"), 0
    for key, ranges in truth(native).items():
        kind, parameter = key.split("|")
        values = checkpoint.read(parameter, kind)
        assert values.dtype == torch.float32 and tuple(values.shape) == checkpoint.shapes[parameter]
        for start, meant in ranges.items():
            assert torch.equal(values.flatten()[start : start + len(meant)], meant), key
        assert sum(map(len, ranges.values())) == values.numel()
        counted += kind == "weight"
    frozen, tied = BY_NAME[name].special == "frozen", BY_NAME[name].special == "tied"
    assert counted == len(checkpoint.shapes) - frozen - tied
    assert (checkpoint.step, checkpoint.updates) == (2, 2)


@pytest.mark.dist
@pytest.mark.parametrize("name", list(BY_NAME))
def test_our_model_gives_its_logits(natives: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    native, run = natives(name), BY_NAME[name]
    done = imported(native, tmp_path / "run", name)
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    loaded = load_model(tmp_path / "run", device="cpu", dtype=dtype)
    expected = load_file(native / "logits.safetensors")["logits"]
    error = (logits(loaded, TOKENS).float() - expected).abs().max() / expected.abs().max()
    assert error < (2e-2 if run.precision == "bf16" else 1e-5)
    assert done.folder.name == "step-00000002" and loaded.index["tokens"] == 2 * 1024
    assert loaded.index["origin"]["from"][0] == {
        "folder": str(native / "saved" / "global_step2"),
        "deepspeed": loaded.index["origin"]["from"][0]["deepspeed"],
        "step": 2,
    }


@pytest.mark.dist
@pytest.mark.parametrize("name", WITH_MOMENTS)
def test_moments_go_where_their_weights_go(natives: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Put back into the tensors of DeepSpeed's names, what our checkpoint holds is what the engine had."""
    native, run = natives(name), BY_NAME[name]
    done = imported(native, tmp_path / "run", name)
    index = read_index(done.folder)
    assert tuple(index["kinds"]) == KINDS and index["updates"] == 2 and index["loss_scaler"] == {"dynamic": False}
    held, meant = fragments(done.folder), truth(native)
    rules = None if run.style != "named" else dict(line.split(": ") for line in NAMES.strip().splitlines())
    sources = find_sources(recipe(run).model, NativeCheckpoint(native / "saved", "global_step2").shapes, rules)
    for kind in KINDS:
        for part in sources.parts:
            mine = held[f"{kind}|{part.parameter}"][part.start : part.stop]
            for called, tensor in part.to_hf(mine).items():
                for start, values in meant[f"{kind}|{sources.native[called]}"].items():
                    assert torch.equal(tensor.flatten()[start : start + len(values)], values), (kind, called)


@pytest.mark.dist
def test_the_run_goes_on_at_its_step_on_another_layout(
    natives: Callable[[str], Path], launch_deepspeed: LaunchDeepspeed, tmp_path: Path
) -> None:
    """Two ranks that share the experts, and one rank: the same losses, from the same rows, at the same rates."""
    common = [*settings(BY_NAME["ours-1"]), "train.max_steps=5", "checkpoint.every=2", "evaluation.rows=1"]
    records = {}
    for world in (1, 2):
        run_dir = tmp_path / f"run-{world}"
        imported(natives("ours-1"), run_dir, "ours-1", "train.max_steps=5", "checkpoint.every=2")
        printed = train(launch_deepspeed, run_dir, *common, world=world, ep=world, resume="auto")
        assert f"resumed from {run_dir}/checkpoints/step-00000002 after update 2" in printed
        records[world] = metrics(run_dir)
        assert [record["step"] for record in records[world]] == [3, 4, 5]
    for one, two in zip(records[1], records[2]):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert (one["lr"], one["sampled_share"]) == (two["lr"], two["sampled_share"])


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("nothing\\.like\\.it: head.weight\n", "fits no name of the checkpoint; one of them is out.weight"),
        ("wte\\.(.*: head.weight\n", r"missing \), unterminated subpattern.*write REGEX: NAME, or REGEX: null"),
        ("wte\\.weight: blocks.\\1.norm\n", "invalid group reference 1.*is what the first"),
        ("wte\\.weight: out.weight\n", "wte.weight and out.weight would both be out.weight; change the file of names"),
        ("wte\\.weight: [1]\n", "write REGEX: NAME, or REGEX: null"),
        ("wte\\.weight: null\n", "missing: model.embed_tokens.weight"),
        ("wte\\.weight: head.weight\n", r"extra: h.0.self_attn.q_proj.weight \[16, 16\]"),
        ("- a\n", "is no file of names; write lines such as"),
        ("a: b\na: c\n", "cannot be read as a file of names: key 'a' is given a second time"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read as a file of names: could not determine"),
    ],
)
@pytest.mark.dist
def test_files_of_names_that_say_nothing_useful(
    natives: Callable[[str], Path], tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        imported(natives("named-1"), tmp_path / "run", "named-1", names=names_file(tmp_path, text))
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
@pytest.mark.parametrize(
    "setting, said",
    [
        ("model.hidden_size=32", r"shape: model.embed_tokens.weight is \[512, 16\], the model's is \[512, 32\]"),
        ("model.num_layers=1", "extra: model.layers.1.input_layernorm.weight"),
        ("model.num_layers=3", "missing: model.layers.2.input_layernorm.weight"),
        ("model.moe.num_constant=1", r"of another shape: model.layers.0.mlp.moe.deepspeed_moe.gate.wg.weight \(as "),
        ("model.moe.num_ffn_experts=3", r"extra: .*\.deepspeed_experts\.3\.up_proj\.weight"),
        ("train.max_steps=1", "has done 2 updates, and the recipe ends after 1; raise train.max_steps"),
    ],
)
def test_another_model_is_refused(natives: Callable[[str], Path], tmp_path: Path, setting: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        imported(natives("hf-1"), tmp_path / "run", "hf-1", setting)
    assert not (tmp_path / "run").exists()


def test_ranges_by_hand() -> None:
    """7 elements of a and 5 of b, 1 of padding between them, in partitions of 5 on the ranks 1 and 3 and 5."""
    found = cut({"a": (7,), "b": (5,)}, [1, 0], group=4, size=5, ranks=[1, 3, 5])
    places = {name: [(r.group, r.rank, r.start, r.length) for r in ranges] for name, ranges in found.items()}
    assert places == {"a": [(4, 1, 0, 5), (4, 3, 0, 2)], "b": [(4, 3, 3, 2), (4, 5, 0, 3)]}
    with pytest.raises(ValueError, match="2 partitions of 5 elements end before b does"):
        cut({"a": (7,), "b": (5,)}, [1, 0], group=4, size=5, ranks=[1, 3])


# -- notices -----------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize(
    "name, said",
    [
        ("zero0-1", "the optimizer starts anew: under ZeRO 0 DeepSpeed saves them without the names"),
        ("tied-1", r"the optimizer starts anew: parameters that are one there train apart here \(lm_head.weight\)"),
        ("frozen-bf16-1", r"the optimizer starts anew: parameters that were frozen have none \(model.norm.weight\)"),
    ],
)
def test_weights_alone_where_moments_are_not_clean(
    natives: Callable[[str], Path], tmp_path: Path, name: str, said: str
) -> None:
    done = imported(natives(name), tmp_path / "run", name)
    assert re.match(said, done.notices[0])
    index = read_index(done.folder)
    assert index["kinds"] == ["weight"] and index["updates"] == 0


@pytest.mark.dist
def test_moments_of_unknown_age_stay_behind(natives: Callable[[str], Path], tmp_path: Path) -> None:
    """AdamW would divide them by what those of its first update are divided by."""
    shutil.copytree(natives("hf-1") / "saved", tmp_path / "saved")

    def forget(content: Any) -> None:
        for moments in content[STATE]["base_optimizer_state"]["state"].values():
            del moments["step"]

    rewrite(tmp_path / "saved" / "global_step2" / RANK.format(0), forget)
    done = imported(tmp_path, tmp_path / "run", "hf-1")
    assert done.notices[0] == "the optimizer starts anew: how many updates they are of is not said"
    assert read_index(done.folder)["kinds"] == ["weight"]


@pytest.mark.dist
def test_what_differs_is_told(natives: Callable[[str], Path], tmp_path: Path) -> None:
    more = ["train.adam_betas=[0.9, 0.999]", "model.moe.controller={}"]
    notices = imported(natives("ours-1"), tmp_path / "run", "ours-1", *more).notices
    assert notices == [
        "train.adam_betas: (0.9, 0.95) in the checkpoint, (0.9, 0.999) in the recipe",
        "the checkpoint has no biases for the controller of the recipe; they start at 0",
        "the run goes on after update 2 of the recipe's schedule and data: row 32 is its first; what was read "
        "before it is not known here",
    ]


@pytest.mark.dist
def test_the_newest_save_is_the_default_and_a_tag_may_be_given_by_its_folder(
    natives: Callable[[str], Path], tmp_path: Path
) -> None:
    native = natives("hf-1")
    assert imported(native, tmp_path / "latest", "hf-1", tag=None).folder.name == "step-00000003"
    done = import_deepspeed(native / "saved" / "global_step2", tmp_path / "run", RECIPE, settings(BY_NAME["hf-1"]))
    assert done.folder.name == "step-00000002"


@pytest.mark.dist
def test_the_command(
    natives: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for setting in settings(BY_NAME["hf-1"]) for word in ("--set", setting)]
    common = [str(natives("hf-1") / "saved"), str(tmp_path / "run"), "--recipe", str(RECIPE), *sets]
    assert moepp(monkeypatch, "import-deepspeed", *common, "--tag", "nothing") == 1
    assert "holds no tag nothing; it holds global_step2, global_step3" in capsys.readouterr().err
    assert moepp(monkeypatch, "import-deepspeed", *common) == 0
    assert "step-00000003 holds the weights; go on with" in capsys.readouterr().out
    assert moepp(monkeypatch, "import-deepspeed", *common) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_deepspeed_is_not_loaded() -> None:
    """Its classes are not needed to read what it wrote, and so none of their code can run."""
    code = "import sys, moepp_ds.ds_native; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- what is refused ---------------------------------------------------------------------------------------------

MODEL, RANK = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
EXPERT = "layer_{}_expert_{}_mp_rank_00_model_states.pt"


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file of ours holds; only here, where we know who wrote it, with the ordinary unpickler."""
    content = torch.load(file, weights_only=False)
    torch.save(change(content) or content, file)


def _swap_experts(tag: Path) -> None:
    """Two experts change their places, in names and all; the optimizer's are where they were."""
    one, other = (torch.load(tag / EXPERT.format(0, e), weights_only=True) for e in (1, 2))
    for e, content in ((1, other), (2, one)):
        named = {re.sub(r"deepspeed_experts\.\d", f"deepspeed_experts.{e}", name): t for name, t in content.items()}
        torch.save(named, tag / EXPERT.format(0, e))


def _copy(one: str, other: str) -> Callable[[Path], Any]:
    return lambda tag: shutil.copy(tag / one, tag / other)


def _exchange_ranks(tag: Path) -> None:
    (tag / RANK.format(0)).rename(tag / "0")
    (tag / RANK.format(1)).rename(tag / RANK.format(0))
    (tag / "0").rename(tag / RANK.format(1))


def _turn_a_bit(tag: Path) -> None:
    """In the last tensor of a rank's file: a moment, which no other file holds too."""
    file = tag / RANK.format(0)
    with zipfile.ZipFile(file) as archive:
        last = max((one for one in archive.infolist() if "/data/" in one.filename), key=lambda one: one.header_offset)
    content = bytearray(file.read_bytes())
    content[content.index(b"PK", last.header_offset + 4) - last.file_size // 2] ^= 1
    file.write_bytes(content)


def _with_buffer(content: Any) -> None:
    content["module"]["e"] = torch.ones(2)
    content["buffer_names"].append("e")


def _set(*keys: Any, to: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


def _add_to(*keys: Any, amount: float) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys:
            content = content[key]
        content.data[0] += amount

    return change


STATE = "optimizer_state_dict"
FIRST_MOMENT = (STATE, "base_optimizer_state", "state", 0, "exp_avg")
DAMAGE: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "no model": (lambda tag: (tag / MODEL).unlink(), f"is no checkpoint of DeepSpeed: it holds no {MODEL}"),
    "a rank missing": (lambda tag: (tag / RANK.format(1)).unlink(), r"lacks the files of rank 1 \(1 of 2\); copy them"),
    "an expert missing": (
        lambda tag: (tag / EXPERT.format(0, 2)).unlink(),
        r"lacks the files of layer/expert 0/2 \(1 of 4\)",
    ),
    "a rank too many": (_copy(RANK.format(1), RANK.format(2)), "two saves are mixed"),
    "an expert too many": (_copy(EXPERT.format(0, 3), EXPERT.format(0, 4)), "two saves"),
    "ranks of two precisions": (
        _copy(RANK.format(1), f"bf16_{RANK.format(1)}"),
        "holds zero_pp_rank_1.* and bf16_zero_pp_rank_1.*: two saves are mixed",
    ),
    "a rank of the next save": (
        _copy(f"../global_step3/{RANK.format(1)}", RANK.format(1)),
        "AdamW has counted .*: files of two saves are mixed",
    ),
    "a model of the next save": (
        _copy(f"../global_step3/{MODEL}", MODEL),
        "the fp32 weights of .* are not those of the model's own file, rounded to float32: files of two saves",
    ),
    "ranks exchanged": (
        _exchange_ranks,
        "ranks noted other places of",
    ),
    "experts exchanged": (_swap_experts, r"the fp32 weights of .*deepspeed_experts\.[12]\..* are not those"),
    "an expert renamed": (
        _copy(EXPERT.format(0, 1), EXPERT.format(0, 2)),
        "holds .*deepspeed_experts.1.*, which is not of its expert: it was renamed",
    ),
    "an expert that is none": (
        lambda tag: torch.save({"a": 3}, tag / EXPERT.format(0, 1)),
        "tensors.a: Input should be an instance of Tensor",
    ),
    "one weight changed": (
        lambda tag: rewrite(tag / RANK.format(1), _add_to(STATE, "single_partition_of_fp32_groups", 2, amount=1.0)),
        "the fp32 weights of .* are not those",
    ),
    "a file cut short": (lambda tag: os.truncate(tag / MODEL, 5000), f"{MODEL} is damaged"),
    "one bit of a moment": (_turn_a_bit, "is damaged.*the checksum of .*data/.* is another"),
    "an empty file": (lambda tag: (tag / RANK.format(0)).write_bytes(b""), "optim_states.pt is damaged"),
    "a partition too short": (
        lambda tag: rewrite(tag / RANK.format(0), _set(STATE, "single_partition_of_fp32_groups", 0, to=torch.zeros(8))),
        "group 0.*files of two saves are mixed, or damaged",
    ),
    "ZeRO 3 by its number": (
        lambda tag: rewrite(tag / RANK.format(0), _set(STATE, "zero_stage", to=3)),
        "zero_stage: Input should be less than or equal to 2",
    ),
    "ZeRO 3 by its files": (
        lambda tag: (tag / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch(),
        "ZeRO stage 3 cuts parameters up, which is not read; load it with DeepSpeed and save it from ZeRO 1 or 2",
    ),
    "tensor parallelism": (lambda tag: (tag / "mp_rank_01_model_states.pt").touch(), "spread by tensor parallelism"),
    "pipelines": (lambda tag: (tag / "layer_01-model_00-model_states.pt").touch(), "spread by pipeline parallelism"),
    "old experts": (lambda tag: (tag / "expert_0_mp_rank_00_model_states.pt").touch(), "of an old DeepSpeed"),
    "universal": (lambda tag: (tag / "zero").mkdir(), "a universal checkpoint, which is not read"),
    "AutoEP": (lambda tag: rewrite(tag / MODEL, _set("ds_autoep_layers", to=[{}])), "is of AutoEP, whose layout"),
    "another program's": (lambda tag: torch.save({"a": 1}, tag / MODEL), "is not what DeepSpeed.*: Field required"),
    "tensors of no numbers": (
        lambda tag: rewrite(tag / MODEL, _set("module", "norm.weight", to=torch.ones(2, device="meta"))),
        "module.norm.weight: it is no plain tensor",
    ),
    "a moment of two axes": (
        lambda tag: rewrite(tag / RANK.format(1), _set(*FIRST_MOMENT, to=torch.ones(2, 2))),
        "exp_avg: it has 2 axes of torch.float32 and not one of floating point numbers",
    ),
    "groups of one rank": (
        lambda tag: rewrite(tag / RANK.format(1), _set(STATE, "group_paddings", to=[0])),
        "its lists have entries for different numbers of groups",
    ),
    "an alias of nothing": (
        lambda tag: rewrite(tag / MODEL, _set("shared_params", to={"lm_head.weight": "nothing"})),
        "name nothing for lm_head.weight, which is not there",
    ),
    "a buffer of its own": (
        lambda tag: rewrite(tag / MODEL, _with_buffer),
        r"extra: e \[2\]",
    ),
    "NaN": (
        lambda tag: rewrite(tag / RANK.format(1), _set(*FIRST_MOMENT, to=torch.full((99999,), torch.nan))),
        "exp_avg of .* has values that are not finite numbers",
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("what", list(DAMAGE))
def test_what_is_not_whole_or_not_of_one_save_is_refused(
    natives: Callable[[str], Path], tmp_path: Path, what: str
) -> None:
    shutil.copytree(natives("hf-2-ep2") / "saved", tmp_path / "saved")
    change, said = DAMAGE[what]
    change(tmp_path / "saved" / "global_step2")
    with pytest.raises((CheckpointError, RecipeError), match=said):
        imported(tmp_path, tmp_path / "run", "hf-2-ep2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "latest, said",
    [
        (None, "is no checkpoint of DeepSpeed: it holds no file `latest`"),
        ("../elsewhere", "'../elsewhere' is no tag: it must be the plain name of a folder"),
        ("..", "'..' is no tag"),
        ("", "'' is no tag"),
        ("\0" * 300, "is no tag"),
        ("global_step9", "holds no tag global_step9; it holds global_step4, global_step5"),
    ],
)
def test_tags_that_are_none(tmp_path: Path, latest: str | None, said: str) -> None:
    for tag in ("global_step4", "global_step5"):
        (tmp_path / "saved" / tag).mkdir(parents=True)
        (tmp_path / "saved" / tag / MODEL).touch()
    if latest is not None:
        (tmp_path / "saved" / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        imported(tmp_path, tmp_path / "run", "hf-1", tag=None)
    with pytest.raises(CheckpointError, match="is no folder; name the one that was given to engine.save_checkpoint"):
        imported(tmp_path / "nowhere", tmp_path / "run", "hf-1")


def test_checkpoints_of_our_own_need_no_import(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start_run(run)
    for folder in (run, run / "checkpoints", run / "checkpoints/step-00000000"):
        with pytest.raises(CheckpointError, match="step-00000000 is a checkpoint of moepp_ds itself, and needs no"):
            import_deepspeed(folder, tmp_path / "new", RECIPE)
    assert not (tmp_path / "new").exists()


@pytest.mark.dist
def test_fp16_scales_go_on(natives: Callable[[str], Path], tmp_path: Path) -> None:
    """DeepSpeed's own scaler, put where fp16 has it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    shutil.copytree(natives("ours-1") / "saved", tmp_path / "saved")
    file = tmp_path / "saved" / "global_step2" / RANK.format(0)
    scaler = DynamicLossScaler(2.0**12, scale_window=7, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    rewrite(file, lambda content: content[STATE].update(loss_scaler=scaler, dynamic_loss_scale=True))
    done = imported(tmp_path, tmp_path / "run", "ours-1")
    facts = {"dynamic": True, "cur_scale": 4096.0, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": 2}
    assert json.loads((done.folder / "index.json").read_text())["loss_scaler"] == facts
