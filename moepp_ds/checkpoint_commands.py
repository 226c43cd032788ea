"""`moepp checkpoint list|show|verify|diff|prune`: look at checkpoints, prove them whole, compare, delete old ones."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console

from data_pipeline.locks import Taken, take
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

if TYPE_CHECKING:
    from moepp_ds.checkpoint.compare import Comparison

# What needs torch is imported inside: `moepp --help` answers at once.

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, prove them whole, compare them, delete old ones.")

Place = Annotated[Path, typer.Argument(help="folder of a checkpoint, or of a run: its newest")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]

WORST = 20
"""Parameters of a comparison that are printed one by one."""


@app.command("list")
def list_(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run, or of its checkpoints")], json: AsJson = False
) -> None:
    """List a run's checkpoints, the oldest first: what is seen to be wrong, and which one `--resume auto` takes.

    latest: the file `latest` names it; next: `--resume auto` goes on from it. Reads indexes and the sizes of files;
    `moepp checkpoint verify RUN --all` reads every byte.
    """
    from moepp_ds.checkpoint.choices import choices_under, glance, named_by_latest, root_of, step_folders
    from moepp_ds.checkpoint.files import leftovers

    root = root_of(run_dir)
    seen = [glance(folder) for folder in step_folders(root)]
    usable = {found.folder for found in seen if found.problem is None}
    latest = named_by_latest(root)
    taken = next((folder for folder in choices_under(root).folders if folder in usable), None)
    unfinished = {str(path): _size(path) for path in leftovers(root)}
    if json:
        rows = [
            asdict(found)
            | {"folder": str(found.folder), "latest": found.folder == latest, "taken": found.folder == taken}
            for found in seen
        ]
        typer.echo(orjson.dumps({"checkpoints": rows, "unfinished": unfinished}, option=orjson.OPT_INDENT_2))
        return
    header = [("update", "tokens", "bytes", "", "")] if seen else []
    rows_of_text = [
        (
            f"{found.step:,}",
            "?" if found.tokens is None else f"{found.tokens:,}",
            f"{found.bytes:,}",
            ", ".join(said for at, said in ((latest, "latest"), (taken, "next")) if at == found.folder),
            "complete" if found.problem is None else f"damaged: {_without_advice(found.problem)}",
        )
        for found in seen
    ]
    _print_table(str(root), [*header, *rows_of_text])
    if not seen:
        typer.echo(f"{root} holds no checkpoint")
    if latest is not None and latest not in [found.folder for found in seen]:
        typer.echo(f"`latest` names {latest.name}, which is gone")
    for path, size in unfinished.items():
        typer.echo(f"being written or deleted, or left over: {path}  {size:,} bytes")


@app.command()
def show(place: Place, json: AsJson = False) -> None:
    """Print what a checkpoint is: its update, recipe, layout, versions, files and sizes. Reads its index alone."""
    from moepp_ds.checkpoint.choices import summarize

    folder = _find(place)
    summary = summarize(folder)
    if json:
        typer.echo(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
        return
    lines = {
        "checkpoint": folder,
        "update": f"{summary['step']:,}, after {summary['tokens']:,} tokens",
        "recipe": summary["recipe"],
        "holds": ", ".join(summary["kinds"]),
        "parameters": f"{summary['elements']:,} numbers in {summary['parameters']:,} parameters",
        "saved on": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary["layout"].items() if value),
        "versions": ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
        "origin": summary["origin"],
        "size": f"{summary['bytes']:,} bytes",
    }
    for name, value in lines.items():
        if value:
            typer.echo(f"{name + ':':12} {value}")
    for name, size in summary["files"].items():
        typer.echo(f"  {name}  {size:,} bytes")


@app.command()
def verify(
    place: Place,
    every: Annotated[bool, typer.Option("--all", help="every checkpoint of a run, a line each")] = False,
) -> None:
    """Read every byte of a checkpoint, compare it with its checksums and fingerprints, and list all damage.

    Exit code: 0 whole, 1 damaged.
    """
    from moepp_ds.checkpoint.verify import find_damage

    if every:
        _verify_all(place)
        return
    folder = _find(place)
    damage = find_damage(folder)
    if damage:
        raise DamagedCheckpoint("\n".join([f"{folder} is damaged:", *damage]))
    typer.echo(f"{folder} is whole")


def _verify_all(place: Path) -> None:
    from moepp_ds.checkpoint.choices import root_of, step_folders
    from moepp_ds.checkpoint.verify import find_damage

    root = root_of(place)
    folders = step_folders(root)
    if not folders:
        raise CheckpointError(f"{root} holds no checkpoint; name a run's folder")
    damaged = 0
    for folder in folders:
        damage = find_damage(folder)
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        typer.echo(f"{folder} is {f'damaged: {_without_advice(damage[0])}{more}' if damage else 'whole'}")
        damaged += bool(damage)
    if damaged:
        typer.echo(f"{damaged} of {len(folders)} checkpoints are damaged", err=True)
        raise typer.Exit(1)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="folder of a checkpoint, or of a run: its newest")],
    second: Annotated[Path, typer.Argument(help="what it is compared with")],
    json: AsJson = False,
) -> None:
    """Compare two checkpoints, saved on whatever layouts: settings, shapes, weights, moments.

    Exit code, as of `cmp`: 0 identical, 1 different, 2 they cannot be compared.
    """
    from moepp_ds.checkpoint.compare import compare

    try:
        found = compare(_find(first), _find(second))
    except (CheckpointError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if json:
        typer.echo(orjson.dumps({"identical": found.identical, **asdict(found)}, option=orjson.OPT_INDENT_2))
    else:
        _print_differences(found)
    if not found.identical:
        raise typer.Exit(1)


def _print_differences(found: Comparison) -> None:
    if found.identical:
        typer.echo("identical: every setting, weight and moment")
        return
    typer.echo(f"updates {found.steps[0]} and {found.steps[1]}")
    for said, differences in (("settings", found.recipe), ("shapes", found.shapes)):
        _print_table(said, [(key, str(old), str(new)) for key, old, new in differences])
    worst = sorted(found.weights.items(), key=lambda item: -item[1])
    _print_table("largest difference of a weight", [(name, f"{value:.3g}") for name, value in worst[:WORST]])
    if len(worst) > WORST:
        typer.echo(f"and {len(worst) - WORST} more parameters that differ by less")
    if not worst:
        typer.echo("the weights are identical")
    if found.kinds[0] != found.kinds[1]:
        typer.echo(f"the one holds {', '.join(found.kinds[0])}, the other {', '.join(found.kinds[1])}")
    if found.moments:
        typer.echo(f"the moments of {len(found.moments)} parameters differ")


def _find(place: Path) -> Path:
    """The checkpoint that a resume would try first; says which newer ones it passes over."""
    from moepp_ds.checkpoint.choices import find_choices

    found = find_choices(place)
    for line in found.passed_over:
        typer.echo(f"note: a newer checkpoint is passed over: {line}", err=True)
    return found.folders[0]


def _without_advice(problem: str) -> str:
    """What is wrong, in one line, where no other checkpoint is asked for."""
    from moepp_ds.checkpoint.chunks import ANOTHER

    return problem.replace(f"; {ANOTHER}", "").replace("\n", "; ")


def _print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    if not rows:
        return
    typer.echo(f"{title}:")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        typer.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@app.command()
def prune(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run")],
    keep: Annotated[int, typer.Option(min=1, help="checkpoints that stay, up to the one that `latest` names")],
    keep_every: Annotated[
        int | None,
        typer.Option(min=0, help="those of a multiple of so many updates stay, too (0: none); else as in the recipe"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would go")] = False,
) -> None:
    """Delete a run's old checkpoints and what broken-off saves have left.

    The newest is read and proven whole first: what is deleted may be needed where it is not. While the run is training
    only checkpoints before the newest go, and what it is writing is left alone.
    """
    from moepp_ds.checkpoint.files import find_checkpoint, leftovers, step_of
    from moepp_ds.checkpoint.retention import delete, set_aside, set_aside_before, stored_keep_every, too_old

    root = run_dir / "checkpoints"
    newest = find_checkpoint(root)
    if newest is None:
        raise CheckpointError(f"{run_dir} holds no checkpoints: there is no {root / 'latest'}; name a run's folder")
    if not dry_run:  # before the lock is taken, which would keep the run from being started again meanwhile
        newest = _proven(newest)
    with ExitStack() as lock:
        try:
            lock.enter_context(closing(take(run_dir / ".lock")))
            training = False
        except Taken as error:
            training = True
            by = error.by or "a process"
            typer.echo(f"{by} is training in {run_dir}: what it is writing is left alone", err=True)
        now = find_checkpoint(root)
        if now is None or step_of(now) < step_of(newest):
            raise CheckpointError(f"nothing was deleted: {run_dir} went back to an earlier one meanwhile; try again")
        if keep_every is None:
            keep_every = stored_keep_every(newest)
        old = too_old(newest, keep=keep, keep_every=keep_every)
        for path in [*old, *(set_aside_before(newest) if training else leftovers(root))]:
            typer.echo(f"{'would delete' if dry_run else 'deleting'} {path}  {_size(path):,} bytes")
        if not dry_run:
            set_aside(old)
            delete(set_aside_before(newest) if training else leftovers(root))


def _proven(newest: Path) -> Path:
    """The newest checkpoint, read and found whole, also where a run deletes it meanwhile for one that is newer."""
    from moepp_ds.checkpoint.files import find_checkpoint
    from moepp_ds.checkpoint.verify import find_damage

    while damage := find_damage(newest):
        now = find_checkpoint(newest.parent)
        if now is None or now == newest:
            said = f"nothing was deleted, for {newest}, the newest, is damaged (go on with --resume PATH of another):"
            raise DamagedCheckpoint("\n".join([said, *damage]))
        newest = now
    return newest


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
