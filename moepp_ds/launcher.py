"""The command line of `launch/train.sh`: from what a user typed to a run that is looked after.

It imports neither torch nor deepspeed, so it answers at once. `moepp_ds.supervisor` does the rest.

1. Read the recipe and the program's arguments: a mistake in them is reported here, once, and not by every rank. The
   recipe names the run folder.
2. Take the run's lock: a second supervisor would start again and again what the first one's ranks keep out.
3. Each start is `deepspeed LAUNCHER_OPTIONS --module moepp_ds.train RECIPE ARGS`, with what a start must have of its
   own: a free port, what to resume, and where several hosts take part the list of them.

Exit code: 0 completed, 75 stopped and can be resumed, 1 failed or not started, 2 no such option.
The ranks find this process's id in the environment as MOEPP_SUPERVISOR_PID, to notice when it is gone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from data_pipeline.document import DataError
from data_pipeline.locks import Taken, holder, is_free, take
from moepp_ds.checkpoint.choices import check_resume_word
from moepp_ds.config import Recipe, RecipeError, load_recipe
from moepp_ds.intent import intended, note_intent
from moepp_ds.output import flush_output, print_line
from moepp_ds.supervisor.hosts import free_port, own_host, read_hostfile
from moepp_ds.supervisor.job import Graces, NotStarted
from moepp_ds.supervisor.restarts import Rules, supervise
from moepp_ds.supervisor.roll import Place, Roll, RollError, RollRules
from moepp_ds.supervisor.verdict import FAILED
from moepp_ds.train_arguments import train_parser

ELSEWHERE = ("--include", "-i", "--exclude", "-e", "--num_nodes", "--num_gpus")
"""Launcher options under which a host's ranks are not its slots."""

HELP = frozenset({"-h", "--help"})
TRAIN = "moepp_ds.train"


@dataclass(frozen=True)
class Launch:
    """What a command line asks for."""

    rules: Rules
    launcher_options: tuple[str, ...]
    """For every start; without those that a start gets of its own."""
    master_addr: str | None
    master_port: str | None
    program: str
    recipe: str
    arguments: tuple[str, ...]
    """For the program, behind the recipe; without --resume."""
    roll: RollRules | None
    """How several hosts find together, one supervisor on each; None where this process starts all ranks."""

    def command(self, resume: str, place: Place | None) -> tuple[str, ...]:
        """The command line of one start."""
        options = [*self.launcher_options]
        if place is not None:
            options += ["--hostfile", str(place.hostfile), "--no_ssh", "--node_rank", str(place.node_rank)]
            options += ["--master_addr", self.master_addr or place.hosts[0].name]
            options += ["--master_port", self.master_port or str(place.port)]
        else:
            options += ["--master_addr", self.master_addr] if self.master_addr else []
            port = self.master_port or (None if _has(options, "--hostfile", "-H") else str(free_port()))
            # The launcher's default port is the same for everybody, so two runs on one machine would meet.
            options += ["--master_port", port] if port else []
        program = ("--module", self.program, self.recipe, *self.arguments, "--resume", resume)
        return (sys.executable, "-m", "deepspeed.launcher.runner", *options, *program)


def parse_launch(argv: Sequence[str]) -> Launch:
    """Turn `[launcher options] RECIPE [program arguments]` into a Launch.

    The recipe is the first argument that ends in .yaml or .yml; before it stand options of the `deepspeed`
    launcher and our own, behind it everything the program gets. Raises RecipeError.
    """
    if HELP.intersection(argv):
        _own_parser().parse_args(["--help"])
    at = next((i for i, arg in enumerate(argv) if arg.endswith((".yaml", ".yml"))), None)
    if at is None:
        raise RecipeError(
            f"no recipe among the arguments {shlex.join(argv)!r}: one must end in .yaml; usage: "
            "bash launch/train.sh [launcher options] RECIPE.yaml [--set key=value ...] [--resume auto]"
        )
    own, options = _own_parser().parse_known_args(list(argv[:at]))
    _check_spelling(own, options)
    known, arguments = train_parser().parse_known_args(list(argv[at:]))
    if own.program == TRAIN and arguments:
        raise RecipeError(
            f"{shlex.join(arguments)}: no arguments of training (--set KEY=VALUE, --run-dir DIR, --resume "
            "auto|none|PATH); those of the deepspeed launcher stand before the recipe"
        )
    recipe = load_recipe(argv[at], known.set)
    run_dir = known.run_dir or Path("runs") / recipe.name
    resume = (intended(run_dir) if known.resume == "auto" else None) or known.resume
    check_resume_word(run_dir, resume)
    arguments += [word for setting in known.set for word in ("--set", setting)]
    arguments += ["--run-dir", str(run_dir)]
    _check_limits(own)
    roll = _roll_rules(own, options, recipe) if own.no_ssh else None
    if own.hostfile and roll is None:
        options += ["--hostfile", own.hostfile]
    rules = Rules(run_dir, Graces(own.stop_grace, own.exit_grace), own.max_restarts, resume)
    return Launch(
        rules,
        launcher_options=tuple(options),
        master_addr=own.master_addr,
        master_port=own.master_port,
        program=own.program,
        recipe=argv[at],
        arguments=tuple(arguments),
        roll=roll,
    )


def _roll_rules(own: argparse.Namespace, options: Sequence[str], recipe: Recipe) -> RollRules:
    """How the hosts of a hostfile find together."""
    if not own.hostfile or own.node_rank is None:
        raise RecipeError("--no_ssh starts the ranks of one host of several: add --hostfile FILE --node_rank auto")
    path = Path(own.hostfile)
    hosts = read_hostfile(path)
    host = own_host(hosts, own.node_rank, path)
    if own.min_nodes is not None and not 1 <= own.min_nodes <= len(hosts):
        raise RecipeError(f"--min_nodes {own.min_nodes}: {path} has {len(hosts)} hosts; give 1 to {len(hosts)}")

    def fits(world: int) -> str | None:
        try:
            recipe.layout(world)
        except RecipeError as error:
            return str(error)
        return None

    return RollRules(
        hostfile=path,
        own=host.name,
        min_hosts=own.min_nodes,
        wait=own.node_wait,
        silence=own.host_silence,
        fits=(lambda world: None) if _has(options, *ELSEWHERE) else fits,
    )


def _check_spelling(own: argparse.Namespace, options: Sequence[str]) -> None:
    """Name an option of ours that is nearly spelt right: the launcher would take it for its own, and print them all."""
    names = [f"--{name}" for name in vars(own)]
    for option in options:
        meant = get_close_matches(option.split("=")[0].replace("-", "_").replace("__", "--", 1), names, cutoff=0.9)
        if option.startswith("--") and meant:
            raise RecipeError(f"{option}: no option of this command or the launcher; did you mean {meant[0]}?")


def _check_limits(own: argparse.Namespace) -> None:
    for name in ("stop_grace", "exit_grace", "node_wait", "host_silence", "max_restarts"):
        if getattr(own, name) < 0:
            raise RecipeError(f"--{name} {getattr(own, name):g} is negative; give 0 or more")
    if not own.host_silence:
        raise RecipeError("--host_silence 0 would take every host for dead; give seconds, such as 60")
    alone = [name for name in ("min_nodes", "node_rank") if getattr(own, name) is not None]
    if not own.no_ssh and (alone or (own.hostfile and own.max_restarts)):
        option = alone[0] if alone else "max_restarts"
        raise RecipeError(
            f"--{option} is for hosts that each have a supervisor: start this command on every host with "
            "--hostfile FILE --no_ssh --node_rank auto"
        )


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/train.sh",
        usage="bash launch/train.sh [launcher options] RECIPE.yaml [program arguments]",
        description="Train on this host, and look after the run. Launcher options are those below and all of the "
        "deepspeed launcher's (--num_gpus N, --include, ...). Program arguments, behind the recipe: --set KEY=VALUE to "
        "override a key (a.b=c), --run-dir DIR (runs/<name of the recipe>), --resume auto|none|PATH (none).",
        epilog="Exit code: 0 completed, 75 stopped and goes on with --resume auto, 1 failed or not started, "
        "2 no such option.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--max_restarts", type=int, default=0, help="restarts in a row without progress (0)")
    add("--stop_grace", type=float, default=600.0, help="seconds to save in when stopped (600)")
    add("--exit_grace", type=float, default=60.0, help="seconds ranks may outlive the first (60)")
    add("--program", default=TRAIN, help=f"module every rank runs ({TRAIN})")
    several = parser.add_argument_group("several hosts, each with its own supervisor")
    add = several.add_argument
    add("--hostfile", "-H", metavar="FILE", help="lines `name slots=8`, read anew at every start")
    add("--no_ssh", action="store_true", help="this command is started on every host")
    add("--node_rank", metavar="auto|N", help="which line of the hostfile this host is")
    add("--min_nodes", type=int, metavar="M", help="go on with so many when others are missing (all)")
    add("--node_wait", type=float, default=600.0, help="seconds to wait for missing hosts (600)")
    add("--host_silence", type=float, default=60.0, help="seconds until a silent host counts as gone (60)")
    add("--master_addr", help="where rank 0 is reached (the first host's name)")
    add("--master_port", help="and its port (a free one)")
    return parser


def _has(options: Sequence[str], *names: str) -> bool:
    return any(option.split("=")[0] in names for option in options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module's docstring for its exit codes."""
    try:
        if find_spec("deepspeed") is None:
            raise RecipeError(f"deepspeed is not installed in {sys.executable}; run `. launch/setup_env.sh`")
        launch = parse_launch(sys.argv[1:] if argv is None else argv)
        lock = _lock(launch)
        roll = Roll(launch.rules.run_dir, launch.roll) if launch.roll is not None else None
    except (RecipeError, RollError, DataError, OSError) as error:
        print_line(f"error: {error}", error=True)
        return FAILED

    def command(resume: str, place: Place | None) -> tuple[str, ...]:
        if resume not in ("auto", "none"):
            with suppress(OSError):  # on a full disk the run begins all the same
                note_intent(launch.rules.run_dir, resume)
        try:
            words = launch.command(resume, place)
        except OSError as error:  # no port is free, say
            raise NotStarted(str(error)) from error
        print_line(f"[train] {shlex.join(words)}")
        return words

    with lock:
        return supervise(launch.rules, command, roll)


def _lock(launch: Launch) -> IO[bytes]:
    """The lock of who looks after the run: one supervisor alone, or together those of its hosts."""
    run_dir = launch.rules.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        return take(run_dir / ".supervisor.lock", shared=launch.roll is not None)
    except Taken as error:
        by = error.by or _supervisors_of_hosts(run_dir) or "another supervisor"
        raise RecipeError(
            f"{by} looks after {run_dir} already (status.json there says how it stands); stop that one first, or name "
            "another --run-dir"
        ) from None


def _supervisors_of_hosts(run_dir: Path) -> str:
    """Who looks after a run for its hosts, as they wrote into their own locks."""
    locks = sorted((run_dir / ".hosts").glob("*.lock"))
    return ", ".join(f"{holder(lock)} (host {lock.stem})" for lock in locks if not is_free(lock))


if __name__ == "__main__":
    code = main()
    flush_output()
    sys.exit(code)
