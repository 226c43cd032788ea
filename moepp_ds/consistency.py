"""Whether the ranks still hold what they must hold alike: a fault of memory, a link or a program shows here first.

1. Parameters   those that every rank has are equal on all of them, FFN experts on all ranks that have the same ones,
                bit for bit, by fingerprint.
2. Masters      the fp32 weights that a rank owns, rounded, are the weights it computes with.
3. Updates      every group of every rank's optimizer has counted as many.
4. Rows         no row of the update was read twice, and together they are one run of the stream.

Every rank looks at its own; then one gather, and all find the same. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.loader import Batch
from moepp_ds.agreement import FinalError, gather, name_ranks
from moepp_ds.checkpoint.fragments import owned_fragments
from moepp_ds.fingerprint import partial_fingerprint
from moepp_ds.model import expert_offsets

LINES = 20
"""Differences that a message names."""


class RanksDiffer(FinalError):
    """Ranks hold something else than they must; what was saved since they were last found right may be wrong, too."""


@dataclass(frozen=True)
class _Seen:
    """What one rank found, parameters in the order of the model, which is the same on every rank.

    fingerprints: of what it computes with. experts: the first of its FFN experts, None where all ranks have all.
    stray: places of parameters whose masters it owns, in part, and that differ from them.
    updates: counted by each optimizer group. starts: first rows of its micro batches.
    """

    fingerprints: list[int]
    experts: list[int | None]
    stray: list[int]
    updates: list[int]
    starts: list[int]


def check_consistency(engine: Any, batches: Sequence[Batch], step: int) -> None:
    """Compare the ranks after update `step`, done with this rank's `batches`. Collective.

    Raises RanksDiffer that names what differs and the ranks that hold it; nothing is changed.
    """
    names = [name for name, _ in engine.module.named_parameters()]
    seen = gather(_look(engine, batches))
    problems = [
        *_differing_parameters(names, seen),
        *_stray_masters(names, seen),
        *_differing_updates(seen),
        *_wrong_rows(seen, batch_rows=engine.train_batch_size(), micro_batch_size=len(batches[0].tokens_BS1)),
    ]
    if problems:
        more = [f"and {len(problems) - LINES} more"] if len(problems) > LINES else []
        raise RanksDiffer(
            f"the ranks no longer agree after update {step}:\n"
            + "\n".join(f"  {line}" for line in [*problems[:LINES], *more])
            + "\nResume from a checkpoint of an update that was found right, without the node that stands alone"
        )


def _look(engine: Any, batches: Sequence[Batch]) -> _Seen:
    offsets = expert_offsets(engine.module)
    parameters = dict(engine.module.named_parameters())
    return _Seen(
        fingerprints=[partial_fingerprint(parameter.flatten()) for parameter in parameters.values()],
        experts=[offsets.get(name) for name in parameters],
        stray=sorted({list(parameters).index(name) for name in _own_strays(engine, parameters, offsets)}),
        updates=_own_updates(engine.optimizer),
        starts=[batch.row_start for batch in batches],
    )


def _own_strays(
    engine: Any, parameters: Mapping[str, torch.nn.Parameter], offsets: Mapping[str, int]
) -> Iterator[str]:
    """Parameters of which this rank owns masters that, rounded, are not what it computes with."""
    for fragment in owned_fragments(engine):
        parameter, master = parameters[fragment.name].detach(), fragment.tensors["weight"]
        start = fragment.start - offsets.get(fragment.name, 0) * parameter[0].numel()
        live = parameter.flatten()[start : start + len(master)]
        if not torch.equal(live, master.to(live.device, live.dtype)):
            yield fragment.name


def _own_updates(zero: Any) -> list[int]:
    """Updates that AdamW has counted, by optimizer group."""
    states = (zero.optimizer.state[flat] for flat in zero.single_partition_of_fp32_groups)
    return [int(state.get("step", 0)) for state in states]


def _differing_parameters(names: Sequence[str], seen: Sequence[_Seen]) -> Iterator[str]:
    for at, name in enumerate(names):
        copies: dict[int | None, dict[int, list[int]]] = {}
        for rank, own in enumerate(seen):
            copies.setdefault(own.experts[at], {}).setdefault(own.fingerprints[at], []).append(rank)
        for first, holders in copies.items():
            if len(holders) > 1:
                which = name if first is None else f"{name} from FFN expert {first} on"
                yield f"{which} differs between {_name_sides(holders)}"


def _stray_masters(names: Sequence[str], seen: Sequence[_Seen]) -> Iterator[str]:
    for rank, own in enumerate(seen):
        for at in own.stray:
            yield f"{names[at]} on rank {rank} is not what its fp32 weights there, rounded, are"


def _differing_updates(seen: Sequence[_Seen]) -> Iterator[str]:
    holders: dict[int, list[int]] = {}
    for rank, own in enumerate(seen):
        for count in sorted(set(own.updates)):
            holders.setdefault(count, []).append(rank)
    if len(holders) > 1:
        counts = "; ".join(f"{count} on {name_ranks(ranks)}" for count, ranks in sorted(holders.items()))
        yield f"the optimizer's groups have counted different numbers of updates: {counts}"


def _wrong_rows(seen: Sequence[_Seen], *, batch_rows: int, micro_batch_size: int) -> Iterator[str]:
    """A line for each two micro batches between which rows are missing or come twice, and one for their number."""
    rows = sum(len(own.starts) for own in seen) * micro_batch_size
    if rows != batch_rows:
        yield f"{rows} rows were read; an update has {batch_rows} (train.batch_tokens / data.seq_len)"
    ends: tuple[int, int] | None = None
    for start, rank in sorted((start, rank) for rank, own in enumerate(seen) for start in own.starts):
        if ends is not None and start != ends[0]:
            what = "leave out rows between them" if start > ends[0] else "read the same rows"
            yield (
                f"rank {ends[1]}, rows {ends[0] - micro_batch_size} to {ends[0] - 1}, and rank {rank}, rows {start} to "
                f"{start + micro_batch_size - 1}, {what}"
            )
        ends = (start + micro_batch_size, rank)


def _name_sides(holders: Mapping[int, Sequence[int]]) -> str:
    """The ranks that agree with one another, the largest number of them first."""
    return " and ".join(name_ranks(ranks) for ranks in sorted(holders.values(), key=lambda ranks: -len(ranks)))
