"""`train.compile` where nothing can be compiled; what it changes is for tests/programs/determinism_checks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from moepp_ds.compilation import check_compiler
from moepp_ds.config import RecipeError


def test_a_switch_in_the_environment_that_turns_it_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(RecipeError, match="TORCHDYNAMO_DISABLE=1 in the environment.*unset the one, or set the other"):
        check_compiler(torch.device("cpu"))


def test_a_machine_without_a_compiler_is_told_before_training(tmp_path: Path) -> None:
    check = "import torch; from moepp_ds.compilation import check_compiler; check_compiler(torch.device('cpu'))"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RecipeError: train.compile true, but torch.compile does not work for cpu here" in done.stderr
    assert "or set train.compile=false" in done.stderr
