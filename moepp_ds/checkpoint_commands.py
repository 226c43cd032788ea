"""`moepp checkpoint show|verify|diff|prune`: look at checkpoints, prove them whole, compare them, delete old ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from data_pipeline.locks import held
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

# What needs torch is imported inside: `moepp --help` answers at once.

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, prove them whole, compare them, delete old ones.")

Place = Annotated[Path, typer.Argument(help="folder of a checkpoint, or of a run: its newest")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]

WORST = 20
"""Parameters of a comparison that are printed one by one."""


@app.command()
def show(place: Place, json: AsJson = False) -> None:
    """Print what a checkpoint is: its update, recipe, layout, versions, files and sizes. Reads its index alone."""
    from moepp_ds.load import choose_folder

    folder = choose_folder(place)
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


def summarize(folder: Path) -> dict[str, Any]:
    """What `show` prints, in JSON values. Raises DamagedCheckpoint."""
    from math import prod

    from moepp_ds.checkpoint.files import read_index

    index = read_index(folder)
    recipe: Mapping[str, Any] = index.get("recipe") or {}
    layout = dict(index.get("layout") or {})
    if layout:
        layout["expert_parallel"] = (recipe.get("parallel") or {}).get("expert_parallel")
    sizes = {"index.json": (folder / "index.json").stat().st_size}
    sizes |= {name: note["bytes"] for name, note in sorted(index["files"].items())}
    return {
        "folder": str(folder),
        "format": index["format"],
        "step": index["step"],
        "updates": index.get("updates"),
        "tokens": index.get("tokens", 0),
        "recipe": recipe.get("name"),
        "kinds": index["kinds"],
        "parameters": len(index["parameters"]),
        "elements": sum(map(prod, index["parameters"].values())),
        "layout": layout,
        "versions": index.get("versions") or {},
        "origin": index.get("origin"),
        "bytes": sum(sizes.values()),
        "files": sizes,
    }


@app.command()
def verify(place: Place) -> None:
    """Read every byte of a checkpoint, compare it with its checksums and fingerprints, and list all damage."""
    from moepp_ds.checkpoint.verify import find_damage
    from moepp_ds.load import choose_folder

    folder = choose_folder(place)
    damage = find_damage(folder)
    if damage:
        raise DamagedCheckpoint("\n".join([f"{folder} is damaged:", *damage]))
    typer.echo(f"{folder} is whole")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="folder of a checkpoint, or of a run: its newest")],
    second: Annotated[Path, typer.Argument(help="what it is compared with")],
    json: AsJson = False,
) -> None:
    """Compare two checkpoints, saved on whatever layouts: settings, shapes, weights, moments."""
    from moepp_ds.checkpoint.compare import compare
    from moepp_ds.load import choose_folder

    found = compare(choose_folder(first), choose_folder(second))
    if json:
        typer.echo(orjson.dumps({"identical": found.identical, **asdict(found)}, option=orjson.OPT_INDENT_2))
        return
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would go")] = False,
) -> None:
    """Delete a run's old checkpoints and what broken-off saves have left. Not while the run is training.

    The newest is read and proven whole first: what is deleted may be needed where it is not.
    """
    from moepp_ds.checkpoint.files import delete, find_checkpoint, leftovers, set_aside_old, too_old
    from moepp_ds.checkpoint.verify import find_damage

    root = run_dir / "checkpoints"
    newest = find_checkpoint(root)
    if newest is None:
        raise CheckpointError(f"{run_dir} holds no checkpoints: there is no {root / 'latest'}; name a run's folder")
    busy = f"a process is training in {run_dir}, which deletes old ones itself (checkpoint.keep); stop it first"
    with held(run_dir / ".lock", refusal=busy):
        damage = [] if dry_run else find_damage(newest)
        if damage:
            said = f"nothing was deleted, for {newest}, the newest, is damaged (go on with --resume PATH of another):"
            raise DamagedCheckpoint("\n".join([said, *damage]))
        for path in [*too_old(newest, keep=keep), *leftovers(root)]:
            typer.echo(f"{'would delete' if dry_run else 'deleting'} {path}  {_size(path):,} bytes")
        if not dry_run:
            delete(set_aside_old(newest, keep=keep))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
