"""From returned statistics to named metrics: metrics.jsonl, TensorBoard, log.txt, status.json of a run folder.

Only the first rank makes a `RunFolder`. metrics.jsonl is the record: one JSON object an update, written before
the checkpoint that covers it. A resumed run drops the lines after its checkpoint and writes them anew, so the
file reads as if the run had never stopped. TensorBoard is written here rather than through DeepSpeed's monitor,
which cannot purge the points after a checkpoint; other monitors that the DeepSpeed JSON turns on (csv_monitor,
wandb) get the same scalars through it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from data_pipeline.atomic import write_atomically
from data_pipeline.locks import Taken, take
from moepp_ds.controller import RoutingState
from moepp_ds.kinds import ExpertKinds
from moepp_ds.output import print_line
from moepp_ds.records import Curves, Lines
from moepp_ds.statistics import RoutingStatistics
from moepp_ds.status import State, time_now, write_status


def layer_metrics(
    statistics: RoutingStatistics,
    *,
    kinds: ExpertKinds,
    tokens: int,
    state: RoutingState = RoutingState(),
    gradient_ratio_L: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """One record per MoE layer, from the sums over an update of `tokens` tokens.

    share: of the assignments the router made, by expert kind. ffn_experts_per_token: mean routed FFN experts that
    computed a token (after drops), wanted_ffn_experts_per_token: that it chose. ffn_experts_histogram: share of the
    tokens that 0, 1, 2, ... FFN experts computed. dropped: share of all assignments that found no seat, dropped_share:
    of each kind's. ffn_load: assignments kept by each FFN expert, 1.0 being the mean over FFN experts. balance: the
    balance loss over its value at perfect balance. entropy: of the router's scores in nats; top_1, top_2: mean highest
    and second highest score. bias: the controller's, of each FFN expert. gradient_ratio: how
    hard the balance loss pulls at the router's logits, beside everything else (see moepp_ds.gradient_ratio).
    """
    records = []
    for layer in range(len(statistics.balance)):
        wanted_E, kept_E, histogram_H = (
            getattr(statistics, name)[layer].tolist() for name in ("wanted_E", "kept_E", "histogram_H")
        )
        ffn = kept_E[: kinds.num_ffn]
        ranges = {kind: at for kind, at in kinds.slices().items() if at.start < at.stop}
        wanted = {kind: sum(wanted_E[at]) for kind, at in ranges.items()}
        kept = {kind: sum(kept_E[at]) for kind, at in ranges.items()}
        record: dict[str, Any] = {
            "share": {kind: count / sum(wanted_E) for kind, count in wanted.items()},
            "ffn_experts_per_token": sum(ffn) / tokens,
            "wanted_ffn_experts_per_token": wanted["ffn"] / tokens,
            "ffn_experts_histogram": [count / tokens for count in histogram_H],
            "dropped": (sum(wanted_E) - sum(kept_E)) / sum(wanted_E),
            "dropped_share": {kind: (count - kept[kind]) / count for kind, count in wanted.items() if count},
            "ffn_load": [count * len(ffn) / max(sum(ffn), 1) for count in ffn],
            **{
                name: float(getattr(statistics, name)[layer]) / tokens
                for name in ("balance", "entropy", "top_1", "top_2")
            },
        }
        if state.bias_LE is not None:
            record["bias"] = list(state.bias_LE[layer][: kinds.num_ffn])
        if gradient_ratio_L is not None:
            record["gradient_ratio"] = gradient_ratio_L[layer]
        records.append(record)
    return records


def scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a metrics record by slash-separated name: `layers/03/share/ffn`, `validation/dolma/loss`."""
    flat: list[tuple[str, float]] = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                walk(f"{name}/{number:02d}", inner)
        elif value is not None:
            flat.append((name, float(value)))

    for key, value in record.items():
        walk(key if isinstance(value, (Mapping, list)) else f"train/{key}", value)
    return flat


class RunFolder:
    """The files of one run.

    recipe.yaml      the recipe with every default filled in
    ds_config.json   the dictionary DeepSpeed was given
    metrics.jsonl    one object an update
    tensorboard/     the same as curves
    checkpoints/     see moepp_ds.checkpoint
    log.txt          what was printed
    status.json      how it stands, see moepp_ds.status
    """

    def __init__(
        self,
        path: Path,
        *,
        tensorboard: bool,
        resumed_step: int,
        others: Any = None,
        lock: IO[bytes] | None = None,
    ) -> None:
        """Open the folder of a run that has done `resumed_step` updates; later metrics are dropped.

        others: DeepSpeed's monitor, for what else the DeepSpeed JSON turns on (csv_monitor, wandb). lock: of
        `take_folder`, where it is taken already.
        """
        self._lock = take_folder(path) if lock is None else lock
        self.path = path
        self._others = others if others is not None and others.enabled else None
        self.step = resumed_step  # the last update that was recorded
        self.checkpoint: Path | None = None  # the one that the run stands on
        self._log = Lines(path / "log.txt")
        _keep_until(path / "metrics.jsonl", resumed_step)
        self._metrics = Lines(path / "metrics.jsonl")
        self._curves = None
        if tensorboard:
            self._curves = Curves(path / "tensorboard", self._metrics, resumed_step=resumed_step, points=_points)

    def describe(self, *, recipe: str, ds_config: Mapping[str, Any]) -> None:
        """Store what the run was started with."""
        write_atomically(self.path / "recipe.yaml", recipe.encode())
        write_atomically(self.path / "ds_config.json", (json.dumps(ds_config, indent=2) + "\n").encode())

    def say(self, line: str) -> None:
        """Keep a line in log.txt, and print it."""
        self.log(line)
        print_line(line)

    def log(self, line: str) -> None:
        """Keep in log.txt what is printed elsewhere, with the time."""
        self._log.append(f"{time_now()}  {line}")

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Append one update's metrics and its curves; the line survives the death of this process from here on.

        Numbers that are not finite are written as null: JSON has no others. On a full disk all of it waits for room.
        """
        finite = _finite(metrics)
        self.step = finite["step"]
        self._metrics.append(json.dumps(finite, allow_nan=False))
        if self._curves is not None:
            self._curves.add(finite)
        if self._others is not None:
            try:
                self._others.write_events([(name, value, self.step) for name, value in _points(finite)])
            except OSError as error:
                warnings.warn(f"a monitor of the DeepSpeed JSON misses points: {error}", stacklevel=2)

    def sync(self) -> None:
        """Put everything recorded so far on the disk: before a checkpoint that a later run goes on from.

        Raises OSError where the metrics cannot be; the curves wait, as they can be drawn from these.
        """
        self._metrics.sync()
        if self._curves is not None:
            self._curves.sync(self.step)

    def set_status(self, state: State, *, step: int, message: str = "", restart: bool | None = None) -> None:
        """Replace status.json; see `write_status`."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        write_status(self.path, state, step=step, message=message, checkpoint=checkpoint, restart=restart)

    def close(self) -> None:
        """Flush and close every file."""
        if self._curves is not None:
            self._curves.close(self.step)
        self._metrics.close()
        self._log.close()
        self._lock.close()


def _points(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    return scalars({key: value for key, value in record.items() if key != "step"})


class FolderInUse(RuntimeError):
    """Another process trains in a run folder. It may end soon: no fault of what was given."""


def take_folder(path: Path) -> IO[bytes]:
    """Hold the run folder, made where it is missing: two runs that write into one spoil both.

    The kernel lets go when the process ends. Raises FolderInUse.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        return take(path / ".lock")
    except Taken as error:
        by = error.by or "another process"
        raise FolderInUse(f"{by} is training in {path}; wait for it, stop it, or name another --run-dir") from None


def _keep_until(path: Path, step: int) -> None:
    """Drop the metrics after update `step`, and a last line that was cut off."""
    if not path.exists():
        return
    end = kept = 0
    with path.open("r+b") as lines:  # a long run's file is large: read once, cut in place
        for number, line in enumerate(lines, start=1):
            if kept == step or not line.endswith(b"\n"):  # what follows goes, whatever a power cut made of it
                break
            try:
                kept = json.loads(line)["step"]
                if kept > step:
                    break
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is damaged ({error}); delete the file from there on, or go on in another "
                    "--run-dir with --resume PATH"
                ) from None
            end += len(line)
        lines.truncate(end)


def _finite(value: Any) -> Any:
    """A metrics record with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_line(metrics: Mapping[str, Any], *, total_steps: int, seconds_left: float) -> str:
    """One line for one update."""
    layers = metrics["layers"]
    ffn = sum(layer["ffn_experts_per_token"] for layer in layers) / len(layers)
    norm = f"{metrics['grad_norm']:.3f}" if math.isfinite(metrics["grad_norm"]) else "skipped"
    return (
        f"step {metrics['step']:>{len(str(total_steps))}}/{total_steps}  loss {metrics['loss']:.4f}  "
        f"lm {metrics['lm_loss']:.4f}  grad {norm}  lr {metrics['lr']:.2e}  "
        f"{metrics['tokens_per_s']:,.0f} tokens/s  {ffn:.2f} FFN experts/token  "
        f"ETA {timedelta(seconds=round(seconds_left))}"
    )
