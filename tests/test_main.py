"""The `moepp` command as a user calls it: what it prints, and how it ends. Its report is in test_report.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import GOLDEN_RECIPE

from moepp_ds.config import load_recipe


def moepp(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moepp_ds", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_recipe_prints_what_loads_back_and_its_arithmetic(tmp_path: Path) -> None:
    overrides = ["train.max_steps=7", "parallel.expert_parallel=2"]
    done = moepp("recipe", GOLDEN_RECIPE, "--world", "4", "--set", overrides[0], "--set", overrides[1])
    assert (done.returncode, done.stderr) == (0, "")
    asked = load_recipe(ROOT / GOLDEN_RECIPE, overrides)
    assert asked.total_steps == 7
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert load_recipe(tmp_path / "again.yaml") == asked
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert comments == [f"# {line}" for line in asked.arithmetic(4)]
    assert "# 4 rows x 64 tokens x 1 steps x 4 ranks = 1,024 tokens per update" in comments
    assert done.stdout.splitlines()[-len(comments) :] == comments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe", "nosuch.yaml"], "error: nosuch.yaml: there is no such recipe"),
        (["recipe", "tests/golden/goldne.yaml"], "did you mean tests/golden/golden.yaml?"),
        (["recipe", GOLDEN_RECIPE, "--set", "train.max_stepz=1"], "did you mean train.max_steps?"),
        (["recipe", GOLDEN_RECIPE, "--world", "3"], "error: "),
        (["generate", "x" * 300, "--prompt", "x"], "File name too long"),
        (["report", "tests"], "error: tests/metrics.jsonl does not exist; name the folder of a run"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str) -> None:
    """Exit code 1, one sentence or list of problems, and nothing of Python's."""
    done = moepp(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("error: ") == 1 and done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr


def test_help_names_the_commands() -> None:
    for arguments in ([], ["--help"]):
        done = moepp(*arguments)
        assert "recipe" in done.stdout + done.stderr and "report" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_the_command_answers_without_loading_torch() -> None:
    look = "import sys, moepp_ds.__main__; print(*sorted({'torch', 'deepspeed', 'tensorboard'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
