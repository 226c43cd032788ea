"""moepp_ds.launcher: what a command line becomes; and launch/train.sh with the real launcher, over ranks that stand in.

`launched_program.py` stands where the training program stands: real ranks, which save and exit on SIGTERM.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest
from supervised import Running, Start, start  # noqa: F401 (a fixture)

from data_pipeline.locks import take
from moepp_ds.config import RecipeError
from moepp_ds.launcher import main, parse_launch
from moepp_ds.supervisor.hosts import Host
from moepp_ds.supervisor.job import Graces
from moepp_ds.supervisor.roll import Place
from moepp_ds.supervisor.verdict import COMPLETED, FAILED, STOPPED

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
deepspeed: {deepspeed}
model:
  moe: {{num_ffn_experts: 2}}
  vocab_size: 64
  num_layers: 1
  hidden_size: 8
  num_heads: 2
  ffn_hidden_size: 8
data: {{path: nowhere}}
train: {{max_steps: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe called tiny."""
    (tmp_path / "ds.json").write_text("{}")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(deepspeed=tmp_path / "ds.json"))
    return path


# ---- command line


def test_command_is_the_launcher_with_its_options_then_the_program(recipe: Path) -> None:
    launch = parse_launch(["--num_gpus", "2", "--master_port", "7", str(recipe), "--resume", "auto", "--set", "name=a"])
    assert launch.command("none", None)[1:] == (
        *("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "7"),
        *("--module", "moepp_ds.train", str(recipe), "--set", "name=a", "--run-dir", "runs/a", "--resume", "none"),
    )
    rules = launch.rules
    assert (rules.run_dir, rules.graces, rules.max_restarts) == (Path("runs/a"), Graces(600.0, 60.0), 0)
    assert rules.resume == "auto"
    assert launch.roll is None


@pytest.mark.parametrize(
    ("arguments", "run_dir"),
    [
        ([], "runs/tiny"),
        (["--set", "name=other"], "runs/other"),
        (["--run-dir", "somewhere/else"], "somewhere/else"),
        (["--run-dir=somewhere/else", "--set", "name=other"], "somewhere/else"),
    ],
)
def test_run_dir_follows_the_name_unless_given(recipe: Path, arguments: list[str], run_dir: str) -> None:
    launch = parse_launch([str(recipe), *arguments])
    assert launch.rules.run_dir == Path(run_dir)
    assert sum(word.startswith("--run-dir") for word in launch.command("none", None)) == 1


def test_own_options_stay_here_and_every_start_has_a_free_port(recipe: Path) -> None:
    own = ["--stop_grace", "5", "--exit_grace", "2", "--program", "a.b", "--max_restarts", "3"]
    launch = parse_launch([*own, str(recipe)])
    assert (launch.rules.graces, launch.rules.max_restarts) == (Graces(5.0, 2.0), 3)
    commands = [launch.command("none", None) for _ in range(5)]
    assert not any("grace" in word or "restarts" in word for word in commands[0])
    assert commands[0][commands[0].index("--module") + 1] == "a.b"
    ports = {int(command[command.index("--master_port") + 1]) for command in commands}
    assert len(ports) > 1 and all(1024 <= port < 65536 for port in ports)


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("a slots=1\nb slots=1\n")
    return path


def test_several_hosts_get_their_list_their_master_and_their_port(recipe: Path, hostfile: Path) -> None:
    options = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", "1", "--min_nodes", "1"]
    launch = parse_launch([*options, "--log_level", "error", str(recipe)])
    assert launch.roll is not None
    assert (launch.roll.own, launch.roll.min_hosts, launch.roll.wait) == ("b", 1, 600.0)
    place = Place(4, Path("list"), (Host("a", 1), Host("b", 1)), node_rank=1, port=5, resume="auto")
    assert launch.command("auto", place)[3:] == (
        *("--log_level", "error", "--hostfile", "list", "--no_ssh", "--node_rank", "1"),
        *("--master_addr", "a", "--master_port", "5"),
        *("--module", "moepp_ds.train", str(recipe), "--run-dir", "runs/tiny", "--resume", "auto"),
    )
    given = parse_launch([*options, "--master_addr", "10.0.0.1", "--master_port", "9", str(recipe)])
    assert given.command("auto", place)[8:12] == ("--master_addr", "10.0.0.1", "--master_port", "9")


def test_hosts_by_pdsh_keep_the_launchers_port(recipe: Path, hostfile: Path) -> None:
    launch = parse_launch(["--hostfile", str(hostfile), str(recipe)])
    command = launch.command("none", None)
    assert launch.roll is None and "--master_port" not in command
    assert command[command.index("--hostfile") + 1] == str(hostfile)


def test_ranks_that_do_not_divide_the_batch_are_found_before_they_start(recipe: Path, hostfile: Path) -> None:
    options = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", "0"]
    launch = parse_launch([*options, str(recipe)])
    assert launch.roll is not None and launch.roll.fits(1) is None
    assert "is not divisible by" in str(launch.roll.fits(7 * 11 * 13))
    # who chooses devices by other options knows how many ranks there are, we do not
    launch = parse_launch([*options, "--num_gpus", "3", str(recipe)])
    assert launch.roll is not None and launch.roll.fits(7 * 11 * 13) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-restarts=3", "RECIPE"], "--max-restarts=3: no option of this .* did you mean --max_restarts"),
        (["RECIPE", "--resum", "auto"], "--resum auto: no arguments of training .*--resume auto|none|PATH"),
        (["RECIPE", "--num_gpus", "2"], "of the deepspeed launcher stand before the recipe"),
        (["--num_gpus", "2"], r"no recipe among the arguments '--num_gpus 2': one must"),
        (["--no_ssh", "RECIPE"], "--no_ssh starts the ranks of one host of several: add --hostfile FILE --node_rank"),
        (["--node_rank", "1", "RECIPE"], "--node_rank is for hosts that each have a supervisor"),
        (["--min_nodes", "1", "RECIPE"], "--min_nodes is for hosts that each have a supervisor"),
        (["--hostfile", "HOSTS", "--max_restarts", "1", "RECIPE"], "--max_restarts is for hosts that each have"),
        (["--max_restarts", "-1", "RECIPE"], "--max_restarts -1 is negative; give 0 or more"),
        (["--host_silence", "0", "RECIPE"], "--host_silence 0 would take every host for dead"),
        (["--hostfile", "HOSTS", "--no_ssh", "--node_rank", "2", "RECIPE"], "--node_rank 2: give auto, or 0 to 1"),
        (["--hostfile", "HOSTS", "--no_ssh", "--node_rank", "auto", "RECIPE"], "is none of the hosts in .*say which"),
        (
            ["--hostfile", "HOSTS", "--no_ssh", "--node_rank", "0", "--min_nodes", "3", "RECIPE"],
            "--min_nodes 3: .* has 2 hosts; give 1 to 2",
        ),
    ],
)
def test_wrong_options_are_named(recipe: Path, hostfile: Path, options: list[str], message: str) -> None:
    places = {"RECIPE": str(recipe), "HOSTS": str(hostfile)}
    with pytest.raises(RecipeError, match=message):
        parse_launch([places.get(word, word) for word in options])


def test_a_mistake_in_the_recipe_starts_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--set", "train.max_stepz=3"]) == FAILED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: " in shown.err and "did you mean train.max_steps?" in shown.err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["RECIPE", "--help"]])
def test_help_needs_no_recipe(recipe: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(recipe) if word == "RECIPE" else word for word in arguments])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(word in shown for word in ("--max_restarts", "--resume auto|none|PATH", "75 stopped", "--num_gpus"))


# ---- one supervisor a run


def test_a_second_supervisor_is_refused_at_once(
    recipe: Path, hostfile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts nothing, now or later: not even one that is of a host of several."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    of_two_hosts = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", "0", "--node_wait", "0"]
    for options in ([], of_two_hosts):
        with take(run_dir / ".supervisor.lock"):
            assert main(["--max_restarts", "5", *options, str(recipe), "--run-dir", str(run_dir)]) == FAILED
        shown = capsys.readouterr()
        assert f"error: process {os.getpid()} on " in shown.err and f"looks after {run_dir} already" in shown.err
        assert shown.out == ""
    with take(run_dir / ".supervisor.lock", shared=True):
        assert main([str(recipe), "--run-dir", str(run_dir)]) == FAILED
        assert "another supervisor looks after" in capsys.readouterr().err
        (run_dir / ".hosts").mkdir()
        with take(run_dir / ".hosts" / "b.lock"):
            assert main([str(recipe), "--run-dir", str(run_dir)]) == FAILED
        assert f"error: process {os.getpid()} on {socket.gethostname()} (host b) looks" in capsys.readouterr().err
        assert main([*of_two_hosts, str(recipe), "--run-dir", str(run_dir)]) == FAILED
        assert "waited 0 s in vain for b" in capsys.readouterr().out


# ---- the script


@pytest.fixture
def train_sh(tmp_path: Path, recipe: Path, start: Start) -> Start:  # noqa: F811
    """Start launch/train.sh with the real deepspeed launcher over two ranks of the stand-in program."""

    def start_training(*options: str, **env: str) -> Running:
        command = ["bash", "launch/train.sh", "--num_gpus", "2", "--program", "tests.launched_program"]
        command += [*options, str(recipe), "--run-dir", str(tmp_path / "run")]
        return start(command, {"DS_ACCELERATOR": "cpu", **env})

    return start_training


@pytest.mark.dist
@pytest.mark.slow
def test_train_sh_completes(train_sh: Start) -> None:
    run = train_sh(STEPS="5")
    assert run.code() == COMPLETED
    assert run.said() == ["completed at step 5"]


@pytest.mark.dist
def test_train_sh_stops_cleanly_under_the_real_launcher(train_sh: Start) -> None:
    run = train_sh(SAVING="3")
    run.until_training()
    assert b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0" in Path(f"/proc/{run.rank_pid(1)}/environ").read_bytes()
    run.process.terminate()
    assert run.code() == STOPPED
    assert run.state() == "stopped"
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    assert "continue with --resume auto" in run.output.splitlines()[-1]
    assert run.living() == []


@pytest.mark.dist
def test_where_a_run_was_told_to_begin_is_remembered(recipe: Path, start: Start, tmp_path: Path) -> None:  # noqa: F811
    """Until it has a checkpoint: a job that is stopped before comes back with `auto`."""
    run_dir, elsewhere = tmp_path / "run", tmp_path / "checkpoints/step-00000003"
    elsewhere.mkdir(parents=True)
    (elsewhere / "index.json").touch()
    command = ["bash", "launch/train.sh", "--num_gpus", "1", "--program", "tests.launched_program", str(recipe)]
    command += ["--run-dir", str(run_dir), "--resume"]
    for resume in (str(elsewhere), "auto"):
        assert start([*command, resume], {"DS_ACCELERATOR": "cpu", "STEPS": "2"}).code() == COMPLETED
    assert (run_dir / "resumed").read_text().split() == [str(elsewhere)] * 2
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/latest").write_text("step-00000002\n")
    assert start([*command, "auto"], {"DS_ACCELERATOR": "cpu", "STEPS": "2"}).code() == COMPLETED
    assert (run_dir / "resumed").read_text().split()[-1] == "auto"


@pytest.mark.dist
def test_train_sh_reports_a_killed_rank(train_sh: Start) -> None:
    run = train_sh("--exit_grace", "3", DEAF="1")
    run.until_training()
    os.kill(run.rank_pid(1), signal.SIGKILL)
    assert run.code() == FAILED
    assert re.search(r"failed at step \d+: rank 1 ended first, killed by signal 9 \(SIGKILL\)", run.said()[-1])
    assert run.living() == []


@pytest.mark.dist
def test_train_sh_stops_cleanly_when_everybody_is_signalled(train_sh: Start) -> None:
    """As SLURM signals a job step: DeepSpeed's launcher ends at once, and the ranks still get their time to save."""
    run = train_sh("--exit_grace", "1", SAVING="4")
    run.until_training()
    for pid in [run.process.pid, *run.living()]:
        os.kill(pid, signal.SIGUSR1)
    assert run.code() == STOPPED
    assert (run.run_dir / "saved0").exists() and (run.run_dir / "saved1").exists()
    assert run.living() == []
