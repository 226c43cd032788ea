"""Checks that ranks which no longer agree are found and named; tests/test_consistency.py starts them on four ranks.

What a check damages it puts back, so that one engine serves all: at EP 2, ranks 0 and 2 have the FFN experts 0 and 1,
ranks 1 and 3 the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import Batch
from moepp_ds.checkpoint.fragments import owned_fragments
from moepp_ds.consistency import RanksDiffer, check_consistency
from moepp_ds.engine import join_ranks
from tests.programs import checks, tiny

RANKS = join_ranks()
EXPERTS = "blocks.3.moe.experts.down_EFD"


def trained(ways: int, precision: str) -> Any:
    asked = tiny.recipe(expert_parallel=ways, precision=precision)
    engine = tiny.engine_for(asked, RANKS)
    tiny.train(engine, asked, RANKS, [0, 1])
    return engine


ENGINE = trained(2, "fp32")


def mine(rank: int = RANKS.rank) -> list[Batch]:
    return tiny.micro_batches(1)[rank :: RANKS.world]


def found(batches: Sequence[Batch] | None = None) -> list[str]:
    """What is said of the engine after its second update, line by line."""
    try:
        check_consistency(ENGINE, mine() if batches is None else batches, 2)
    except RanksDiffer as error:
        first, *lines, last = str(error).split("\n")
        assert first == "the ranks no longer agree after update 2:"
        assert last.startswith("Resume from a checkpoint of an update that was found right")
        return [line.strip() for line in lines]
    return []


@contextmanager
def damaged(tensor: Tensor, rank: int, at: int, value: float) -> Iterator[None]:
    """Inside, one number of that rank's tensor is another."""
    flat = tensor.detach().view(-1)
    before = flat[at].clone()
    if RANKS.rank == rank:
        flat[at] = value
    yield
    flat[at] = before


def lines_of(name: str, lines: Sequence[str]) -> list[str]:
    """Those about weights as they are computed with: a rank that owns a damaged one sees its master differ, too."""
    assert all(line.startswith(name) for line in lines), lines
    return [line for line in lines if " differs between " in line]


def ranks_that_agree_pass_in_every_layout() -> None:
    for ways, precision in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (4, "fp32")):
        check_consistency(trained(ways, precision), mine(), 2)
    assert found() == []


def a_replicated_parameter_of_one_rank() -> None:
    for name in ("embedding.weight", "blocks.0.attention_norm.weight", "blocks.1.moe.router.weight_ED"):
        parameter = ENGINE.module.get_parameter(name)
        for rank in (0, 2):
            others = ", ".join(str(other) for other in range(4) if other != rank)
            with damaged(parameter, rank, 3, torch.nextafter(parameter.detach().view(-1)[3], torch.tensor(9.0)).item()):
                assert lines_of(name, found()) == [f"{name} differs between ranks {others} and rank {rank}"]
    assert found() == []


def elements_that_changed_places() -> None:
    flat = ENGINE.module.head.weight.detach().view(-1)
    if RANKS.rank == 3:
        flat[[5, 900]] = flat[[900, 5]]
    lines = lines_of("head.weight", found())
    if RANKS.rank == 3:
        flat[[5, 900]] = flat[[900, 5]]
    assert lines == ["head.weight differs between ranks 0, 1, 2 and rank 3"]
    assert found() == []


def an_expert_of_one_replica() -> None:
    parameter = ENGINE.module.get_parameter(EXPERTS)
    with damaged(parameter, 3, 7, 0.25):
        assert lines_of(EXPERTS, found()) == [f"{EXPERTS} from FFN expert 2 on differs between rank 1 and rank 3"]
    with damaged(parameter, 0, parameter.numel() - 1, 0.25):
        assert lines_of(EXPERTS, found()) == [f"{EXPERTS} from FFN expert 0 on differs between rank 0 and rank 2"]
    assert found() == []


def a_master_that_is_not_the_weight() -> None:
    own = next(fragment for fragment in owned_fragments(ENGINE))
    with damaged(own.tensors["weight"], 1, 0, 77.0):
        (line,) = found()
    assert re.fullmatch(r"\S+ on rank 1 is not what its fp32 weights there, rounded, are", line), line
    if RANKS.rank == 1:
        assert line.split()[0] == own.name
    assert found() == []


def a_count_of_updates() -> None:
    zero = ENGINE.optimizer
    step = zero.optimizer.state[zero.single_partition_of_fp32_groups[-1]]["step"]
    with damaged(step, 2, 0, 5.0):
        assert found() == [
            "the optimizer's groups have counted different numbers of updates: 2 on ranks 0, 1, 2, 3; 5 on rank 2"
        ]
    assert found() == []


def rows_read_twice_or_left_out() -> None:
    doubled = mine(0) if RANKS.rank == 1 else mine()
    assert found(doubled) == [
        "rank 0, rows 8 to 9, and rank 1, rows 8 to 9, read the same rows",
        "rank 1, rows 8 to 9, and rank 2, rows 12 to 13, leave out rows between them",
    ]
    short = tiny.micro_batches(2)[:1] if RANKS.rank == 3 else mine()
    assert found(short) == ["rank 2, rows 12 to 13, and rank 3, rows 16 to 17, leave out rows between them"]
    more = [*mine(), *tiny.micro_batches(2)[:1]] if RANKS.rank == 3 else mine()
    assert found(more) == ["10 rows were read; an update has 8 (train.batch_tokens / data.seq_len)"]


def a_message_stays_short() -> None:
    """Every parameter of a rank that lost an update."""
    kept = [parameter.detach().clone() for parameter in ENGINE.module.parameters()]
    if RANKS.rank == 1:
        for parameter in ENGINE.module.parameters():
            parameter.data.add_(1.0)
    lines = found()
    for parameter, before in zip(ENGINE.module.parameters(), kept):
        parameter.data.copy_(before)
    assert len(lines) == 21 and re.fullmatch(r"and \d+ more", lines[-1]), lines
    assert found() == []


CHECKS = [
    ranks_that_agree_pass_in_every_layout,
    a_replicated_parameter_of_one_rank,
    elements_that_changed_places,
    an_expert_of_one_replica,
    a_master_that_is_not_the_weight,
    a_count_of_updates,
    rows_read_twice_or_left_out,
    a_message_stays_short,
]

if __name__ == "__main__":
    checks.run(CHECKS)
