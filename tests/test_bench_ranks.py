"""Measurements on real ranks: bytes that travel are those of the routing, reports are whole. No time is judged."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_in_group
from run_folders import drawn, sets
from typer.testing import CliRunner

from moepp_ds.__main__ import app
from moepp_ds.bench.step import OWN, VANILLA, load_cases

QUICKSTART = "launch/recipes/quickstart.yaml"


def _bench(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What `moepp bench` says on two ranks: its JSON, its words."""
    file = tmp_path / "found.json"
    said = _moepp(tmp_path, "bench", *arguments, "--ranks", "2", "--json", str(file))
    return json.loads(file.read_text()), said


def _moepp(tmp_path: Path, *arguments: str) -> str:
    """What the command says, its lines joined."""
    log = tmp_path / "out.log"
    command = [sys.executable, "-m", "moepp_ds", *arguments]
    code = run_in_group(command, {**os.environ, "DS_ACCELERATOR": "cpu"}, log, 180.0)
    assert code == 0, log.read_text()[-3000:]
    said = " ".join(log.read_text().split())
    assert "FutureWarning" not in said
    return said


@pytest.mark.dist
def test_an_update_sends_what_its_routing_says(tmp_path: Path) -> None:
    """T 80 a rank, K 2, tau 0.75: 6 / 10 of the assignments are for the 8 FFN experts, 12 each, half of them leave."""
    fp32 = ("deepspeed=ds_configs/zero2_fp32.json", "train.precision=fp32", "parallel.expert_parallel=2")
    sizes = ("model.num_layers=2", "data.seq_len=20", "train.micro_batch_size=4", "train.batch_tokens=80")
    full = "train.activation_checkpointing=full"
    arguments = [QUICKSTART, *sets(*fp32, *sizes), "--beside", full, "--repeats", "2", "--micro-batches", "3"]
    found, said = _bench(tmp_path, "step", *arguments, "--plot", str(tmp_path / "found.svg"))
    assert {"recipe", "vanilla twin", "seconds"} <= drawn(tmp_path / "found.svg")
    width = 128
    ranks, passes, layers, journeys = 2, 3, 2, 4
    leaving = 2 * 80 * 6 // 10 // 2
    expected = ranks * passes * layers * journeys * leaving * width * 4
    own, twin = found["traffic"]["recipe"], found["traffic"]["vanilla twin"]
    assert own == {"sent": expected, "expected": expected, "journeys": journeys, "share": 0.6}
    assert twin["sent"] == twin["expected"] == expected * 10 // 6
    again = found["traffic"][full]
    assert again["sent"] == again["expected"] == expected * 6 // 4 and again["journeys"] == 6
    assert found["world"] == 2 and found["tokens"] == 2 * 3 * 80
    assert 1 < found["ideal"] < 1 / 0.6 and found["measured"] > 0
    assert {name: len(times) for name, times in found["seconds"].items()} == {"recipe": 2, "vanilla twin": 2, full: 2}
    assert found["flops"]["recipe"] < found["flops"][full] < 4 / 3 * found["flops"]["recipe"]
    assert f"{expected:,} all-to-all bytes to other ranks, {expected:,} expected, 0.6000 of the twin's" in said
    assert f"with {full} 0." in said or f"with {full} 1." in said


@pytest.mark.parametrize("name", ["adamoe_8+8", "longcat_budget", "moepp_0.6b", "moepp_7b", "released_7b"])
def test_recipes_have_a_vanilla_twin(name: str) -> None:
    """Whatever balances them: FLOPs in which twin and recipe differ are those of their FFN experts."""
    cases = load_cases(ROOT / f"launch/recipes/{name}.yaml", [], ["train.compile=true"], world=8, micro_batches=2)
    own, twin = cases[OWN], cases[VANILLA]
    assert list(cases) == [OWN, VANILLA, "train.compile=true"] and cases["train.compile=true"].train.compile
    assert twin.model.moe.mean_ffn_experts == own.model.moe.top_k and twin.model.moe.num_zero_computation == 0
    layers, expert = own.model.num_moe_layers, 6 * own.model.hidden_size * own.model.expert_ffn_hidden_size
    fewer = 3 * layers * expert * (own.model.moe.top_k - own.model.moe.mean_ffn_experts) * own.train.batch_tokens
    assert twin.flops_per_update - own.flops_per_update == pytest.approx(fewer, rel=0.01)


@pytest.mark.dist
def test_every_journey_is_as_long_as_the_routing_says(tmp_path: Path) -> None:
    options = ["--tokens", "80", "--tau", "0.75", "--dtype", "bf16", "--repeats", "1"]
    found, said = _bench(tmp_path, "all2all", *options, "--plot", str(tmp_path / "found.png"))
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    expected = 2 * (2 * 80 * 6 // 10 // 2) * 768 * 2
    assert found["expected"] == expected and found["ffn_share"] == 0.6
    assert list(found["sent"].values()) == [expected] * 4
    assert sorted(found["seconds"]["forward"]) == ["at home", "layer", "plain", "rows", "waiting"]
    assert sorted(found["seconds"]["forward_backward"]) == ["at home", "layer", "waiting"]
    assert f"results back: {expected:,} bytes to other ranks, of {expected:,} expected" in said


@pytest.mark.dist
def test_saving_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    settings = sets("deepspeed=ds_configs/zero2_fp32.json", "train.precision=fp32", "model.num_layers=1")
    folder = tmp_path / "not/yet/there"
    found, said = _bench(tmp_path, "save", QUICKSTART, "--folder", str(folder), "--repeats", "2", *settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "out.log"]
    assert found["ranks"] == len(found["fragment_bytes"]) == 2 and min(found["fragment_bytes"]) > 2**20
    kinds = ["background", "foreground", "plain"]
    assert sorted(found["seconds"]) == kinds and {len(times) for times in found["seconds"].values()} == {2}
    assert sorted(found["of_plain"]) == kinds[:2]
    assert sorted(found["memory_bytes"]) == ["background", "foreground", "load"]
    assert "2 ranks, up to " in said and " of the plain write" in said


@pytest.mark.dist
def test_a_trace_names_what_runs(tmp_path: Path) -> None:
    """On the two ranks that the recipe's experts are spread over."""
    out = tmp_path / "new/traces"
    said = _moepp(tmp_path, "profile", QUICKSTART, "--out", str(out), *sets("model.num_layers=2", "data.seq_len=16"))
    assert f"traces of 2 ranks are in {out}" in said
    for rank in range(2):
        events = json.loads(gzip.decompress((out / f"rank{rank}.json.gz").read_bytes()))["traceEvents"]
        names = {event["name"] for event in events}
        modules = {"model", "embedding", "blocks.0.attention", "blocks.1.moe", "blocks.1.moe.router"}
        operators = {"_Take", "_AllToAllRows", "_SwiGLUByExpertBackward", "_ScaleAndConstants", "_MeanTokenLoss"}
        assert modules | operators | {"backward", "optimizer step"} <= names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["save", QUICKSTART, "--folder", ".", "--repeats", "0"], "should be greater than or equal to 1"),
        (["all2all", "--ranks", "1"], "1 ranks cannot share 8 FFN experts between them; use 2, 4, 8"),
        (["all2all", "--tau", "2"], "tau 2.0 is not in (0, 1]"),
        (["all2all", "--json", "no/folder.json"], "--json no/folder.json cannot be written"),
        (["step", "launch/recipes/xmoe_64x384.yaml"], "top_k None"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "moepp_ds", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and words in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_memory_of_layers(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ["--tokens", "60", "--device", "cpu", "--json", str(file), "--plot", str(tmp_path / "found.svg")]
    done = CliRunner().invoke(app, ["bench", "memory", *options])
    assert done.exit_code == 0, done.output
    assert {"MB", "MoE++", "forward + backward"} <= drawn(tmp_path / "found.svg")
    peaks = json.loads(file.read_text())["peak_bytes"]
    assert set(peaks) == {"forward", "forward_backward"} and "MoE++" in peaks["forward"]
    # gradients of 8 experts' weights are the least there is
    assert min(peaks["forward_backward"].values()) > 3 * 768 * 2048 * 4 and "of MoE++" in done.output


def test_growth_of_a_layer(tmp_path: Path) -> None:
    options = ["--tokens", "16", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    done = CliRunner().invoke(app, ["bench", "growth", *options, "--plot", str(tmp_path / "found.svg")])
    assert done.exit_code == 0, done.output
    assert {"more tokens", "more experts", "128", "64"} <= drawn(tmp_path / "found.svg")
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["growing"], row["tokens"], row["num_ffn"]) for row in rows] == [
        *(("tokens", tokens, 8) for tokens in (16, 32, 64, 128)),
        *(("experts", 128, experts) for experts in (8, 16, 32, 64)),
    ]
    assert [rows[at][name] for at in (0, 4) for name in ("forward", "forward_backward")] == [1.0] * 4
