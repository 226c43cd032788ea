"""Every command in README.md is run, on small inputs in place of the large ones it names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SampleShards
from run_folders import GOLDEN_RECIPE, sets
from transformers import MixtralConfig, MixtralForCausalLM

from tests.programs.native_model import RUNS, settings

CHECKED_BY_CI = {"bash launch/quickstart.sh", "bash tests/run.sh"}
"""Commands that .ci/run starts itself; running them from inside of the second would never end."""


def commands() -> list[str]:
    """The command lines of README's fenced blocks."""
    blocks = re.findall(r"^( *)```(?:bash)?\n(.*?)^\1```$", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    lines = [line.strip() for _, block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("bash ", "moepp ", "moepp-data "))]


def test_ci_runs_what_is_left_to_it() -> None:
    said = (ROOT / ".ci/run").read_text()
    assert all(command in said for command in CHECKED_BY_CI)


def without_model(recipe: Path) -> Path:
    """The golden recipe as one writes it for weights that bring their own model section."""
    content = yaml.safe_load((ROOT / GOLDEN_RECIPE).read_text())
    del content["model"]
    recipe.write_text(yaml.safe_dump({**content, "deepspeed": str(ROOT / content["deepspeed"])}))
    return recipe


def published_checkpoint(folder: Path) -> Path:
    """A small Mixtral of the golden shards' vocabulary, as its authors would publish it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def native_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """What DeepSpeed's own saver wrote, and the settings that make the golden recipe one of its model."""
    command = [sys.executable, "-m", "tests.programs.native_runs", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, timeout=200)
    (run,) = (run for run in RUNS if run.name == "hf-1")
    return folder / run.name / "saved", sets(*settings(run))


def bad_run(folder: Path) -> tuple[Path, str]:
    """A run that a spike stopped, and the number of that update: any loss that rises is one."""
    command = [sys.executable, "-m", "moepp_ds.train", GOLDEN_RECIPE, "--run-dir", str(folder)]
    command += sets("safety.spike_above=1e-9", "safety.spike_window=8", "train.max_lr=0.05", "train.final_lr=0.05")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, timeout=200)
    assert done.returncode == 78  # nothing is to start it again
    (rows,) = (folder / "replay").iterdir()
    return folder, str(int(rows.name.removeprefix("step-")))


@pytest.mark.timeout(600)
def test_every_command_runs(sample_shards: SampleShards, tmp_path: Path) -> None:
    """In README's order: what one command makes, the next one uses."""
    raw, small = sample_shards.raw, tmp_path / "shards"
    native, of_native = native_checkpoint(tmp_path / "native")
    bad, bad_step = bad_run(tmp_path / "bad")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    instead = {
        "TOKENIZER": str(raw / "tokenizer/tokenizer.model"),
        "--redpajama DIR": f"--redpajama {raw / 'redpajama'}",
        "--dolma DIR": f"--dolma {raw / 'dolma'}",
        "--pile DIR": f"--pile {raw / 'pile'}",
        "--workers 8": "--workers 1 --held-out 0.1",
        "--num_gpus 8 launch/recipes/moepp_0.6b.yaml": f"--num_gpus 2 {GOLDEN_RECIPE}",
        "HOSTFILE": str(tmp_path / "hosts"),
        "--max_restarts 5 RECIPE": f"--max_restarts 5 {GOLDEN_RECIPE}",
        "replay runs/NAME --step N": f"replay {bad} --step {bad_step}",
        "FOLDER runs/imported --recipe RECIPE": f"{native} {tmp_path / 'imported'} --recipe {GOLDEN_RECIPE}",
        "bench memory --preset 0.6b": "bench memory --tokens 16",
        "--preset 0.6b": "--preset 0.6b --tokens 16 --repeats 1",
        "bench trained runs/NAME": f"bench trained {tmp_path / 'run'} --rows 2 --repeats 1",
        "bench step RECIPE": f"bench step {GOLDEN_RECIPE} --repeats 1",
        "bench all2all": "bench all2all --tokens 16 --repeats 1",
        "profile RECIPE --out traces": f"profile {GOLDEN_RECIPE} --out {tmp_path / 'traces'}",
        "bench save RECIPE --folder DIR": f"bench save {GOLDEN_RECIPE} --folder {tmp_path} --repeats 1",
        "data/shards": str(small),
        "runs/NAME": str(tmp_path / "run"),
        "runs/": f"{tmp_path}/",
        " exported": f" {tmp_path / 'exported'}",
        "RECIPE": str(without_model(tmp_path / "recipe.yaml")),
        "CHECKPOINT": str(published_checkpoint(tmp_path / "published")),
    }
    shorter = ["train.max_steps=2", "train.warmup_steps=1"]
    any_threshold = ["model.moe.router={threshold: 1.0}", "model.moe.dropless=true"]
    ran = 0
    for line in commands():
        if line in CHECKED_BY_CI:
            continue
        for large, little in instead.items():
            line = line.replace(large, little)
        command = shlex.split(line)
        if "launch/train.sh" in command:
            command += ["--run-dir", str(tmp_path / ("run-of-hosts" if "--hostfile" in command else "run"))]
            command += [word for setting in [*shorter, *any_threshold] for word in ("--set", setting)]
        if "import-deepspeed" in command:
            command += of_native
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        differ = command[:3] == ["moepp", "checkpoint", "diff"]  # as `cmp` says it
        assert done.returncode == int(differ), f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 33


def test_every_path_that_is_named_exists() -> None:
    """Links to files and to headings, and the files and folders of the tree."""
    text = (ROOT / "README.md").read_text()
    titles = re.findall("^#+ (.*)", text, flags=re.M)
    headings = {"#" + re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert link in headings if link.startswith("#") else (ROOT / link).exists(), link
    for folder in re.findall(r"^([a-z_]+/) ", text, flags=re.M):
        assert (ROOT / folder).is_dir(), folder
