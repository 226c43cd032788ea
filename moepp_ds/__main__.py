"""The `moepp` command. Training itself is started by `launch/train.sh` or `deepspeed --module moepp_ds.train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer
from rich.console import Console

from data_pipeline.document import DataError
from moepp_ds import checkpoint_commands
from moepp_ds.bench import commands as bench_commands
from moepp_ds.checkpoint import CheckpointError
from moepp_ds.config import RecipeError, load_recipe
from moepp_ds.report import print_report, report_run
from moepp_ds.result_files import Json, check_place, write_json

# Commands that load a model import it inside: the others answer at once.

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key: model.moe.tau=0.5; null gives the default"),
]
Checkpoint = Annotated[Path, typer.Argument(help="folder of a checkpoint, or of a run: its newest")]
Tokenizer = Annotated[Path | None, typer.Option(help="tokenizer file; default: that of the recipe's shards")]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at MoE++ recipes and runs.")
app.add_typer(checkpoint_commands.app, name="checkpoint")
app.add_typer(bench_commands.app, name="bench")


@app.command()
def recipe(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file")],
    world: Annotated[int | None, typer.Option(help="number of ranks; default: parallel.expert_parallel")] = None,
    overrides: Overrides = None,
) -> None:
    """Check a recipe, print it with every default filled in, and print its arithmetic on WORLD ranks."""
    loaded = load_recipe(path, overrides or [])
    # First, since it refuses a world that does not fit.
    arithmetic = loaded.arithmetic(world or loaded.parallel.expert_parallel)
    typer.echo(loaded.dump())
    for line in arithmetic:
        typer.echo(f"# {line}")


@app.command()
def estimate(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file")],
    world: Annotated[int | None, typer.Option(help="number of ranks; default: parallel.expert_parallel")] = None,
    ep: Annotated[int | None, typer.Option(help="ranks that share the experts; default: the recipe's")] = None,
    device: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100, h200, b200, mi300x, or this")] = "h200",
    utilization: Annotated[float, typer.Option(help="share of the device's FLOPs that training reaches")] = 0.4,
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Print what a run will take of one rank: memory, FLOPs, all-to-all, time."""
    from moepp_ds.estimate import estimate as estimated
    from moepp_ds.estimate import print_estimate

    check_place(json)
    loaded = load_recipe(path, [*(overrides or []), *([f"parallel.expert_parallel={ep}"] if ep is not None else [])])
    found = estimated(loaded, world or loaded.parallel.expert_parallel, device=device, utilization=utilization)
    write_json(json, found.as_json())
    print_estimate(found, loaded)


@app.command()
def profile(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file")],
    out: Annotated[Path, typer.Option(help="folder for the traces, one file a rank")],
    ranks: bench_commands.Ranks = None,
    micro_batches: bench_commands.MicroBatches = 1,
    overrides: Overrides = None,
) -> None:
    """Write a trace of one update, for chrome://tracing or ui.perfetto.dev, with the model's modules as regions."""
    from moepp_ds.bench.on_ranks import on_ranks

    loaded = load_recipe(path, overrides or [])
    with on_ranks(ranks or loaded.parallel.expert_parallel) as joined:
        from moepp_ds.bench.profile import profile_update
        from moepp_ds.bench.step import load_shortened

        shortened = load_shortened(path, overrides or [], world=joined.world, micro_batches=micro_batches)
        table = profile_update(shortened, joined, out)
        if joined.is_first:
            typer.echo(table)
            typer.echo(f"traces of {joined.world} ranks are in {out}")


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


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="text to go on from")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of probability to draw from; 1 is all")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overrides: Overrides = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Continue a text. Every token goes through the whole model anew; to serve a model, export it."""
    from moepp_ds.generate import Sampling, complete
    from moepp_ds.load import default_device, load_model

    sampling = Sampling(temperature, top_p, seed)
    loaded = load_model(checkpoint, overrides or [], device=default_device(), tokenizer=tokenizer)
    typer.echo(complete(loaded, prompt, max_new_tokens=max_new_tokens, sampling=sampling).text)


@app.command()
def trace(
    checkpoint: Annotated[Path, typer.Option(help="folder of a checkpoint, or of a run: its newest")],
    text: Annotated[str, typer.Option(help="what is followed through the layers")],
    seats: Annotated[bool, typer.Option("--seats", help="with a training step's seats, and what they drop")] = False,
    json: Json = None,
    overrides: Overrides = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Show where each token of a text went, layer by layer: experts, combine weights, drops, FFN experts."""
    from moepp_ds.load import default_device, load_model
    from moepp_ds.trace import as_json, print_trace, trace_text

    check_place(json)
    loaded = load_model(checkpoint, overrides or [], device=default_device(), tokenizer=tokenizer)
    traced = trace_text(loaded, text, seats=seats)
    write_json(json, as_json(traced, loaded))
    print_trace(traced, Console())


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="of each source; default: evaluation.rows")] = None,
    sources: Annotated[bool, typer.Option("--sources", help="print every source, too")] = False,
    json: Json = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Score held-out text and measure what it took. One --set may sweep its key: --set KEY=V1,V2,V3."""
    from moepp_ds.load import default_device, load_model
    from moepp_ds.sweep import as_json, parse_sweep, print_sweep, sweep

    check_place(json)
    plan = parse_sweep(overrides or [])
    loaded = load_model(checkpoint, plan.settings()[0][1], device=default_device(), tokenizer=tokenizer)
    points = sweep(loaded, plan, rows=rows)
    try:
        write_json(json, as_json(loaded, plan, points))
    finally:  # a full disk costs the file, not what it took long to measure
        print_sweep(plan, points, Console(), sources=sources)


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run")],
    step: Annotated[int, typer.Option(min=1, help="update that was skipped or stopped the run")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="folder of the weights; default: the run's newest from before the update")
    ] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:1; default: the first accelerator")] = None,
    json: Json = None,
) -> None:
    """Do an update that was not taken once more, in one process: losses by row, first bad module, gradient norms."""
    from moepp_ds.replay import as_json, chosen_device, print_replay
    from moepp_ds.replay import replay as do_again

    check_place(json)
    done = do_again(run_dir, step, device=chosen_device(device), checkpoint=checkpoint)
    write_json(json, as_json(done))
    print_replay(done, Console())


@app.command()
def upcycle(
    run_dir: Annotated[Path, typer.Argument(help="folder of the run to be made")],
    recipe: Annotated[Path, typer.Option(help="YAML file; its model section adds to what the checkpoint says")],
    folders: Annotated[list[Path], typer.Option("--from", help="folder of a published checkpoint; dense: several")],
    experts: Annotated[
        Literal["copy", "noise", "split"] | None, typer.Option(help="what becomes of dense FFNs; default: copy")
    ] = None,
    noise: Annotated[float | None, typer.Option(help="with --experts noise: of each matrix's spread [0.01]")] = None,
    attention: Annotated[
        Literal["average", "first"] | None,
        typer.Option(help="attention, norms, embeddings of several dense checkpoints; default: average"),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start a run from a published MoE, which gains zero-computation experts, or from dense checkpoints as experts.

    Sizes come from the checkpoint's config.json. The shards must be made with the checkpoint's tokenizer.
    """
    from moepp_ds.upcycle import upcycle as make_run

    done = make_run(
        run_dir, recipe, folders, experts=experts, attention=attention, noise=noise, overrides=overrides or []
    )
    _print_start(done.folder, run_dir, done.notices)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="folder to be made")],
    layout: Annotated[
        Literal["moepp", "released"] | None,
        typer.Option(help="whose names and keys; default: the released model's if it can say this model"),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the weights")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="of a file of weights")] = "5GB",
    overrides: Overrides = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Write a model folder for transformers: weights, config, code, tokenizer and model card."""
    import torch

    from moepp_ds.hf_export import export_checkpoint, parse_size

    done = export_checkpoint(
        checkpoint,
        out,
        layout=layout,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype],
        max_shard_bytes=parse_size(max_shard_size),
        overrides=overrides or [],
        tokenizer=tokenizer,
    )
    for notice in done.notices:
        typer.echo(f"note: {notice}", err=True)
    typer.echo(f"{done.folder} holds the model in the {done.layout} layout; fill in the license in its README.md")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="model folder of moepp export, or of the released model")],
    run_dir: Annotated[Path, typer.Argument(help="folder of the run to be made")],
    recipe: Annotated[Path, typer.Option(help="YAML file; its model section adds to what the folder says")],
    overrides: Overrides = None,
) -> None:
    """Start a run from a model folder. The shards must be made with the folder's tokenizer."""
    from moepp_ds.hf_import import import_folder

    done = import_folder(folder, run_dir, recipe, overrides or [])
    _print_start(done.folder, run_dir, done.notices)


@app.command("import-deepspeed")
def import_deepspeed(
    folder: Annotated[Path, typer.Argument(help="folder that engine.save_checkpoint was given")],
    run_dir: Annotated[Path, typer.Argument(help="folder of the run to be made")],
    recipe: Annotated[Path, typer.Option(help="YAML file; its model section says what the checkpoint holds")],
    tag: Annotated[str | None, typer.Option(help="which save; default: the one that the file `latest` names")] = None,
    names: Annotated[
        Path | None, typer.Option(help="YAML file, lines of REGEX: NAME, for parameters with names of their own")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Go on with a run whose checkpoint DeepSpeed's own saver wrote, at its step, on any layout."""
    from moepp_ds.ds_native import import_deepspeed as import_checkpoint

    done = import_checkpoint(folder, run_dir, recipe, overrides or [], tag=tag, names=names)
    _print_start(done.folder, run_dir, done.notices)


def _print_start(folder: Path, run_dir: Path, notices: Sequence[str]) -> None:
    for notice in notices:
        typer.echo(f"note: {notice}", err=True)
    typer.echo(f"{folder} holds the weights; go on with")
    recipe, run = quote(f"{run_dir}/recipe.yaml"), quote(str(run_dir))
    typer.echo(f"  bash launch/train.sh {recipe} --run-dir {run} --resume auto")


def main() -> None:
    """Run the command; a user's mistake is one message and exit code 1, not a traceback."""
    try:
        app()
    except (RecipeError, DataError, CheckpointError, OSError) as error:  # the last: of a place, such as no permission
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
