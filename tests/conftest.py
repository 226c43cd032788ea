"""What tests of several files share: the environment, the real `deepspeed` launcher, a small set of shards.

Imported before any test module, hence before torch and deepspeed, which read these variables as they load.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed compiles a function of Muon at every start, which costs each rank seconds.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@dataclass(frozen=True)
class SampleShards:
    """The sample corpora in miniature, as raw files and as shards."""

    raw: Path
    """Holds redpajama/, dolma/, pile/ and tokenizer/tokenizer.model."""
    path: Path
    """The shards: what `data.path` names."""
    vocab_size: int


class LaunchDeepspeed(Protocol):
    """Type of the fixture `launch_deepspeed`."""

    def __call__(
        self,
        world: int,
        module: str,
        args: Sequence[str] = (),
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]: ...


def find_free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_group(leader: int) -> None:
    """Kill what is left of a process group, and what its living leader started: torchrun's ranks lead their own."""
    try:
        started = psutil.Process(leader).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def run_in_group(command: Sequence[str], env: Mapping[str, str], log: Path, timeout: float) -> int | None:
    """Run a command in a process group of its own and kill the whole group when it ends or its time is up.

    Returns the exit code, or None when the time was up. Output goes to a file and not through a pipe: a
    process left behind would hold the pipe open, and reading it would never end.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill_group(process.pid)
            process.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none; torch is loaded for that only when there is such a test."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def launch_deepspeed(tmp_path: Path) -> LaunchDeepspeed:
    """Run a module on `world` CPU ranks of this machine under the real `deepspeed` launcher.

    Returns the completed process with stdout and stderr of all ranks together in `stdout`; what is left of
    its process group is killed. Fails the test when the time is up.
    """

    def launch(
        world: int,
        module: str,
        args: Sequence[str] = (),
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
        command += ["--master_port", str(find_free_port()), "--module", module, *args]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        log = tmp_path / f"launch-{time.monotonic_ns()}.log"
        code = run_in_group(command, environment, log, timeout)
        output = log.read_text(errors="replace")
        if code is None:
            tail = output[-4000:]
            pytest.fail(f"{module} on {world} ranks took more than {timeout:g} s; its output ended\n{tail}")
        return subprocess.CompletedProcess(command, code, stdout=output)

    return launch


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    """Write 0.6 MB of the sample corpora and build their shards, once for the whole test run."""
    folder = tmp_path_factory.mktemp("sample")
    raw, path, vocab_size = folder / "raw", folder / "shards", 512
    _data_pipeline("sample", str(raw), "--megabytes", "0.6", "--vocab-size", str(vocab_size))
    corpora = [part for name in ("redpajama", "dolma", "pile") for part in (f"--{name}", str(raw / name))]
    tokenizer = str(raw / "tokenizer" / "tokenizer.model")
    _data_pipeline("build", str(path), "--tokenizer", tokenizer, *corpora, "--workers", "1")
    return SampleShards(raw, path, vocab_size)


def _data_pipeline(*args: str) -> None:
    command = [sys.executable, "-m", "data_pipeline", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        said = done.stdout + done.stderr
        pytest.fail(f"moepp-data {' '.join(args)} ended with code {done.returncode}\n{said}")
