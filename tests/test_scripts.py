"""The shell scripts: they parse, refuse wrong use in words, and name no package registry."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moepp_ds.supervisor.hosts import read_hostfile

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]


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


def test_the_example_of_a_hostfile_is_one() -> None:
    hosts = read_hostfile(ROOT / "launch" / "hostfile.example")
    assert [(host.name, host.slots) for host in hosts] == [(f"node-0{number}", 8) for number in (1, 2, 3, 4)]


# What SLURM's commands do as far as the script sees: srun runs its command on every node, and ends with the highest of
# their codes.
SLURM = {
    "scontrol": """
case "$1 $2" in
    "show hostnames") printf 'node-%s\\n' 1 2 ;;
    requeue*) echo "requeued $2" ;;
esac
""",
    "srun": """
cat .hostfile-7
while [ "$1" != bash ]; do shift; done
highest=0
for code in $CODES; do
    NODE_CODE=$code "$@" || [ $? -le $highest ] || highest=$code
done
exit $highest
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A project folder and a path on which SLURM's commands are."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.sh").write_text('echo "train.sh $*"\nkill -USR1 $PPID\nexit $NODE_CODE\n')
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]"}
    return {**job, "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("codes", "code"),
    [("0 0", 0), ("1 1", 1), ("75 75", 75), ("75 137", 75), ("137 75", 75), ("0 137", 0), ("1 137", 137)],
)
def test_slurm_starts_a_supervisor_a_node_and_requeues_what_was_stopped(
    slurm: dict[str, str], codes: str, code: int
) -> None:
    """Signalled itself, too, and beside nodes that died."""
    done = run("bash", "launch/slurm.sbatch", "r.yaml", "--set", "a=b c", **slurm, CODES=codes, MIN_NODES="1")
    assert done.returncode == code
    lines = done.stdout.splitlines()
    assert lines[:2] == ["node-1 slots=4", "node-2 slots=4"]
    assert len([line for line in lines if line.startswith("train.sh --hostfile ")]) == 2
    assert lines[2].endswith(
        "--no_ssh --node_rank auto --max_restarts 5 --stop_grace 840 --min_nodes 1 r.yaml --set a=b c --resume auto"
    )
    assert ("requeued 7" in lines) == (code == 75)
    folder = Path(slurm["SLURM_SUBMIT_DIR"])
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("given", "count", "resumed"),
    [
        ([], "0", "r.yaml --resume auto"),
        (["--resume", "runs/a"], "0", "r.yaml --resume runs/a"),
        (["--resume=runs/a"], "0", "r.yaml --resume=runs/a"),
        (["--resume", "runs/a"], "1", "r.yaml --resume runs/a --resume auto"),  # the last one counts
    ],
)
def test_slurm_goes_back_to_a_checkpoint_once(
    slurm: dict[str, str], given: list[str], count: str, resumed: str
) -> None:
    done = run(
        "bash", "launch/slurm.sbatch", "r.yaml", *given, **slurm, CODES="0", SLURM_RESTART_COUNT=count, MIN_NODES="1"
    )
    assert done.stdout.splitlines()[2].endswith(resumed)


def test_slurm_says_how_to_submit(slurm: dict[str, str]) -> None:
    assert "usage: sbatch" in run("bash", "launch/slurm.sbatch", **slurm).stderr
    done = run("bash", "launch/slurm.sbatch", "r.yaml", **{**slurm, "SLURM_SUBMIT_DIR": "/"})
    assert (done.returncode, "error: / is not the project's folder" in done.stderr) == (2, True)
