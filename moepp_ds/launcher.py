"""Start a node's ranks through the `deepspeed` launcher, stop them cleanly, and say how the run ended.

`launch/train.sh` is this module. It imports neither torch nor deepspeed, so it answers at once.

1. Read the recipe: a mistake in it is reported here, once, and not by every rank. It names the run folder.
2. Start `deepspeed LAUNCHER_OPTIONS --module moepp_ds.train RECIPE ARGS` in a session of its own.
3. On SIGTERM, SIGINT, SIGUSR1 or SIGHUP ask the ranks, and the ranks alone, by SIGTERM, to save and stop.
   Above them stand the `deepspeed` runner, which would die and leave everything running, and its child
   `deepspeed.launcher.launch`, which would give each rank 30 seconds and then kill it, checkpoint or not.
4. Wait until the session is empty. Whoever overstays is killed: after a stop `stop_grace` seconds, after the
   end of the first rank `exit_grace` seconds (its peers may wait for it in a collective for ever).
5. Read `status.json`, which rank 0 writes: {"state": "running|completed|stopped|failed", "step": n,
   "message": text}. The run ended as it says there, whatever the launcher's exit code; a file that an
   earlier run left does not count.

Exit code: 0 completed, 75 stopped cleanly and can be resumed, 1 failed.
The ranks find this process's id in the environment as MOEPP_SUPERVISOR_PID, to notice when it is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from moepp_ds.config import RecipeError, load_recipe

COMPLETED, FAILED, STOPPED = 0, 1, 75  # 75 is sysexits.h's EX_TEMPFAIL: nothing is wrong, try again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.2

# Left over from a launcher around this one, these would make every process look like a rank.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")


@dataclass(frozen=True)
class Launch:
    """What is started, where it reports, and how long it may take to end."""

    command: tuple[str, ...]
    run_dir: Path
    stop_grace: float
    """Seconds from the request to stop until ranks are killed: the time a checkpoint may take."""
    exit_grace: float
    """Seconds from the end of the first rank until the others are killed."""


@dataclass(frozen=True)
class Ending:
    """What was seen of the processes while they ended."""

    launcher_code: int
    ranks_started: int
    first_ended: tuple[int, ...]
    """Numbers of the ranks that were gone first; empty when none was missed before the end."""
    stop_asked: bool
    killed: int
    """Processes that did not end by themselves in time."""


@dataclass(frozen=True)
class Process:
    """A living process of the session; `rank` is its number if it is one of the ranks."""

    pid: int
    rank: int | None


def parse_launch(argv: Sequence[str]) -> Launch:
    """Turn `[launcher options] RECIPE [program arguments]` into a Launch.

    The recipe is the first argument that ends in .yaml or .yml; before it stand options of the `deepspeed`
    launcher and three of our own, behind it everything the program gets. Raises RecipeError.
    """
    at = next((i for i, arg in enumerate(argv) if arg.endswith((".yaml", ".yml"))), None)
    if at is None:
        raise RecipeError(
            f"no recipe among the arguments {shlex.join(argv)!r}: one must end in .yaml; usage: "
            "bash launch/train.sh [launcher options] RECIPE.yaml [--set key=value ...] [--resume auto]"
        )
    own, launcher_options = _own_options(argv[:at])
    recipe, arguments = argv[at], list(argv[at + 1 :])
    known, _ = _program_parser().parse_known_args(arguments)
    name = load_recipe(recipe, known.set).name
    run_dir = Path(known.run_dir or Path("runs") / name)
    if known.run_dir is None:
        arguments += ["--run-dir", str(run_dir)]
    if not any(option.startswith(("--master_port", "--hostfile", "-H")) for option in launcher_options):
        # The launcher's default port is the same for everybody, so two runs on one machine would meet.
        launcher_options += ["--master_port", str(_free_port())]
    command = (sys.executable, "-m", "deepspeed.launcher.runner", *launcher_options)
    command += ("--module", own.program, recipe, *arguments)
    return Launch(command, run_dir, stop_grace=own.stop_grace, exit_grace=own.exit_grace)


def _own_options(options: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="launch/train.sh",
        usage="bash launch/train.sh [launcher options] RECIPE.yaml [program arguments]",
        description="Train on this node. All other options go to the deepspeed launcher (--num_gpus N, ...).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stop_grace", type=float, default=600.0, help="seconds to save in when stopped (600)")
    add("--exit_grace", type=float, default=60.0, help="seconds ranks may outlive the first (60)")
    add("--program", default="moepp_ds.train", help="module every rank runs (moepp_ds.train)")
    return parser.parse_known_args(list(options))


def _program_parser() -> argparse.ArgumentParser:
    """The two arguments of the program that decide where it reports."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir")
    parser.add_argument("--set", action="append", default=[])
    return parser


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session_processes(session: int) -> list[Process]:
    """List the living processes of a session. Zombies have ended, so they are left out.

    A rank is a process that has LOCAL_RANK in its environment and a parent that has not: a rank's own helpers
    inherit the variable, and `deepspeed.launcher.launch` sets it for its children alone.
    """
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _read_proc(int(entry), "stat")):
            # "pid (command) state parent group session ...", and a command may hold spaces and brackets
            state, parent, _, of_session = stat.rpartition(b")")[2].split()[:4]
            if int(of_session) == session and state not in (b"Z", b"X"):
                parents[int(entry)] = int(parent)
    numbers = {pid: _rank_number(pid) for pid in parents}
    helpers = {pid for pid, parent in parents.items() if numbers.get(parent) is not None}
    return [Process(pid, None if pid in helpers else number) for pid, number in numbers.items()]


def _rank_number(pid: int) -> int | None:
    variables = dict(item.partition(b"=")[::2] for item in _read_proc(pid, "environ").split(b"\0"))
    return int(variables.get(b"RANK", b"0")) if b"LOCAL_RANK" in variables else None


def _read_proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return b""


def send_signal(pid: int, signum: int) -> None:
    """Signal a process that may have ended meanwhile."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


class Job:
    """The processes of one launch, from start to the last one's end."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._stop_asked_at: float | None = None
        self._kill_now = False
        self._asked: set[int] = set()
        self._ranks: dict[int, int] = {}
        self._first_ended: tuple[int, ...] = ()
        self._ending_since: float | None = None

    def handle_signal(self, signum: int, frame: FrameType | None) -> None:
        """Ask for a clean stop; a second Ctrl-C ends everything at once."""
        self._kill_now = self._kill_now or (signum == signal.SIGINT and self._stop_asked_at is not None)
        if self._stop_asked_at is None:
            self._stop_asked_at = time.monotonic()

    def run(self, environment: Mapping[str, str]) -> Ending:
        """Start the launcher and wait for the last process; meanwhile pass on a stop, kill who overstays."""
        # A session of its own: Ctrl-C in a terminal then reaches this process alone, and the session is the
        # list of everything that was started, whoever its parent is by now.
        launcher = subprocess.Popen(self._launch.command, env=dict(environment), start_new_session=True)
        killed: set[int] = set()
        while alive := session_processes(launcher.pid):
            self._follow_ranks(alive, launcher_ended=launcher.poll() is not None)
            if self._stop_asked_at is not None:
                self._ask_to_stop(alive)
            if self._overdue():
                for process in alive:
                    send_signal(process.pid, signal.SIGKILL)
                killed |= {process.pid for process in alive}
            time.sleep(POLL_SECONDS)
        return Ending(
            launcher_code=launcher.wait(),
            ranks_started=len(self._ranks),
            first_ended=self._first_ended,
            stop_asked=self._stop_asked_at is not None,
            killed=len(killed),
        )

    def _follow_ranks(self, alive: Sequence[Process], *, launcher_ended: bool) -> None:
        running = {process.pid: process.rank for process in alive if process.rank is not None}
        self._ranks.update(running)
        gone = sorted(rank for pid, rank in self._ranks.items() if pid not in running)
        if self._ending_since is None and (gone or launcher_ended):
            self._ending_since = time.monotonic()
            self._first_ended = tuple(gone)

    def _ask_to_stop(self, alive: Sequence[Process]) -> None:
        """Signal each rank once; while there has never been one, nothing is to save: signal everybody."""
        for process in alive:
            if process.pid not in self._asked and (process.rank is not None or not self._ranks):
                self._asked.add(process.pid)
                send_signal(process.pid, signal.SIGTERM)

    def _overdue(self) -> bool:
        now = time.monotonic()
        stop_asked_at, ending_since = self._stop_asked_at, self._ending_since
        too_slow = stop_asked_at is not None and now - stop_asked_at > self._launch.stop_grace
        left_behind = ending_since is not None and now - ending_since > self._launch.exit_grace
        return self._kill_now or too_slow or left_behind


def judge(ending: Ending, status: Mapping[str, object] | None) -> tuple[int, str]:
    """Say in one line how the run ended, with the exit code for it.

    `status` is what this run's rank 0 left in status.json, None when it left nothing.
    """
    late = f" ({ending.killed} processes did not end in time and were killed)" if ending.killed else ""
    first = "".join(f"; rank {rank} ended first" for rank in ending.first_ended)
    if status is None:
        if ending.stop_asked:  # nothing was trained, so nothing is lost, however the processes ended
            return STOPPED, f"stopped before training began; start it again with --resume auto{late}"
        if not ending.ranks_started:
            return FAILED, f"failed: the launcher ended with code {ending.launcher_code}, no rank was started{late}"
        return FAILED, f"failed before training began, with code {ending.launcher_code}; the reason is above{late}"
    state, step, message = status.get("state"), status.get("step"), status.get("message") or ""
    told = f": {message}" if message else ""
    if state == "completed":
        return COMPLETED, f"completed at step {step}{told}{late}"
    if state == "stopped":
        return STOPPED, f"stopped at step {step}{told}; continue with --resume auto{late}"
    if state == "failed":
        return FAILED, f"failed at step {step}{told}{late}"
    return FAILED, f"failed: ended at step {step} in state {state!r}{first}{late}"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Identify one writing of a file: a rename over it changes the inode, a write its time."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read_status(path: Path) -> dict[str, object] | None:
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def supervise(launch: Launch) -> int:
    """Run a launch to its end under this process's signal handlers; return the exit code of the verdict."""
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    environment["MOEPP_SUPERVISOR_PID"] = str(os.getpid())
    status_file = launch.run_dir / "status.json"
    earlier = _stamp(status_file)
    job = Job(launch)
    # Handlers first, so that no stop is missed. (Blocking the signals meanwhile would not do: the ranks would
    # inherit the mask and never hear of a stop.)
    for signum in STOP_SIGNALS:
        # SIGHUP that is ignored means nohup: the run is to outlive its terminal
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, job.handle_signal)
    ending = job.run(environment)
    status = _read_status(status_file) if _stamp(status_file) != earlier else None
    code, verdict = judge(ending, status)
    print(f"[train] {launch.run_dir}: {verdict}", flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module's docstring for what it does and for its exit codes."""
    try:
        if find_spec("deepspeed") is None:
            raise RecipeError(f"deepspeed is not installed in {sys.executable}; run `. launch/setup_env.sh`")
        launch = parse_launch(sys.argv[1:] if argv is None else argv)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    print(f"[train] {shlex.join(launch.command)}", flush=True)
    return supervise(launch)


if __name__ == "__main__":
    sys.exit(main())
