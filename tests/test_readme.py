"""Every command in README.md is run, on small inputs in place of the large ones it names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SampleShards

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


@pytest.mark.timeout(300)
def test_every_command_runs(sample_shards: SampleShards, tmp_path: Path) -> None:
    """In README's order: what one command makes, the next one uses."""
    raw, small = sample_shards.raw, tmp_path / "shards"
    instead = {
        "TOKENIZER": str(raw / "tokenizer/tokenizer.model"),
        "--redpajama DIR": f"--redpajama {raw / 'redpajama'}",
        "--dolma DIR": f"--dolma {raw / 'dolma'}",
        "--pile DIR": f"--pile {raw / 'pile'}",
        "--workers 8": "--workers 1 --held-out 0.1",
        "--num_gpus 8 launch/recipes/moepp_0.6b.yaml": "--num_gpus 2 tests/golden/golden.yaml",
        "data/shards": str(small),
    }
    ran = 0
    for command in commands():
        if command in CHECKED_BY_CI:
            continue
        for large, little in instead.items():
            command = command.replace(large, little)
        if "train.sh" in command:
            command += f" --run-dir {tmp_path / 'run'} --set train.max_steps=2 --set train.warmup_steps=1"
        done = subprocess.run(
            command.split(),
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 5


def test_every_path_that_is_named_exists() -> None:
    """Links, and the files and folders of the tree."""
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (ROOT / link).exists(), link
    for folder in re.findall(r"^([a-z_]+/) ", text, flags=re.M):
        assert (ROOT / folder).is_dir(), folder
