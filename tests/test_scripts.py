"""The shell scripts: they parse, refuse wrong use in words, and name no package registry."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"])


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **env}
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=merged, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_names_no_registry(script: Path) -> None:
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert "--index-url" not in text and "pypi" not in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_unless_it_is_to_be_sourced(script: Path) -> None:
    assert os.access(script, os.X_OK) == (script.name != "setup_env.sh")


def test_train_without_a_recipe_says_how_to_use_it() -> None:
    done = run("bash", "launch/train.sh", "--num_gpus", "2")
    assert done.returncode == 1
    assert "error: no recipe among the arguments '--num_gpus 2'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage: bash launch/train_multinode.sh"), (["none", "r.yaml"], "there is no hostfile none")],
)
def test_multinode_without_a_hostfile_says_how_to_use_it(arguments: list[str], message: str) -> None:
    done = run("bash", "launch/train_multinode.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_quickstart_knows_one_option() -> None:
    done = run("bash", "launch/quickstart.sh", "--shrot")
    assert (done.returncode, done.stderr) == (2, "usage: bash launch/quickstart.sh [--short]\n")


def test_setup_env_none_makes_and_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup_env.sh", tmp_path / "launch")
    source = f"unset VIRTUAL_ENV; set -eu; . {tmp_path}/launch/setup_env.sh none"
    done = run("bash", "-c", f"{source}; echo $TORCH_EXTENSIONS_DIR", TORCH_EXTENSIONS_DIR="")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/.cache/torch_extensions\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["launch"]


def test_setup_env_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup_env.sh", tmp_path / "launch")
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run("bash", "-c", f"unset VIRTUAL_ENV; . {tmp_path}/launch/setup_env.sh run", PYTHON=str(old))
    assert done.returncode == 1
    assert f"setup: {old} is older than Python 3.10" in done.stderr
    assert not (tmp_path / ".venv").exists()
