"""The `moepp` command. Training itself is started by `launch/train.sh` or `deepspeed --module moepp_ds.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_pipeline.document import DataError
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.report import print_report, report_run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at MoE++ recipes and runs.")


@app.command()
def recipe(
    path: Annotated[Path, typer.Argument(help="YAML file")],
    world: Annotated[int | None, typer.Option(help="ranks; default: those that share experts")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key")] = None,
) -> None:
    """Check a recipe, print it with every default filled in, and print its arithmetic on WORLD ranks."""
    loaded = load_recipe(path, overrides or [])
    # First, since it refuses a world that does not fit.
    arithmetic = loaded.arithmetic(world or loaded.parallel.expert_parallel)
    typer.echo(loaded.dump())
    for line in arithmetic:
        typer.echo(f"# {line}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run")],
    below: Annotated[str | None, typer.Option(help="fail unless every source beats this: bigram, unigram")] = None,
    fall: Annotated[float, typer.Option(help="fail unless the training loss fell by this share")] = 0.0,
) -> None:
    """Compare a run's held-out losses with n-gram models of its training tokens."""
    if below not in (None, "bigram", "unigram"):
        raise typer.BadParameter(f"{below} is no baseline; use bigram or unigram", param_hint="--below")
    result = report_run(run_dir)
    print_report(result, Console())
    if (below and not result.beats(below)) or result.fall < fall:
        typer.echo("the run did not learn what was asked for", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a user's mistake is one message and exit code 1, not a traceback."""
    try:
        app()
    except (RecipeError, DataError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
