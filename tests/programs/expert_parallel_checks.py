"""Checks of moepp_ds.expert_parallel on two ranks; tests/test_expert_parallel.py starts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moepp_ds import expert_parallel
from moepp_ds.engine import join_ranks
from moepp_ds.expert_parallel import AllToAll, ExpertParallelMoE, check_partition, parameter_groups
from moepp_ds.kinds import ExpertKinds
from moepp_ds.model import MoEPlusPlusModel
from moepp_ds.moe_layer import LayerSettings, MoELayer, MoEOutput
from moepp_ds.router import RouterSettings
from moepp_ds.statistics import RoutingStatistics
from tests.programs import checks, tiny

WORLD = 2
WIDTH, FFN_WIDTH, TOKENS = 6, 10, 23
KINDS = ExpertKinds(num_ffn=4, num_constant=2, num_copy=1, num_zero=1)
SEATS = [3, 5, 2, 4, 3, 3, 2, 9]
"""Few enough that experts of every kind refuse some of TOKENS x 3 assignments."""


# -- the exchange alone: rank p owns experts 2p and 2p + 1 ----------------------------------------------------


def coded_rows(rank: int, counts: Sequence[int]) -> Tensor:
    """One row per assignment, [rank, expert, number], sorted by expert."""
    rows = [[rank, expert, number] for expert, count in enumerate(counts) for number in range(count)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def exchange(counts_of_rank: Sequence[Sequence[int]]) -> None:
    """Send rows of known counts, double them where they arrive, and look at both ends and at the gradient."""
    rank = dist.get_rank()
    rows_RD = coded_rows(rank, counts_of_rank[rank]).requires_grad_()
    parcel = AllToAll(dist.group.WORLD).send(rows_RD, counts_of_rank[rank])
    rows_QD, counts = parcel.receive()
    expected = [
        [source, expert, number]
        for expert in (2 * rank, 2 * rank + 1)
        for source in range(WORLD)
        for number in range(counts_of_rank[source][expert])
    ]
    assert rows_QD.tolist() == expected
    assert list(counts) == [sum(c[expert] for c in counts_of_rank) for expert in (2 * rank, 2 * rank + 1)]
    scale = 2.0 + rank  # the owner's, so that a row shows who worked on it
    result_RD = parcel.give_back(rows_QD * scale)
    owner_R1 = torch.tensor([[2.0 + expert // 2] for expert in rows_RD[:, 1].tolist()]).reshape(-1, 1)
    assert torch.equal(result_RD, rows_RD * owner_R1)
    weight_RD = torch.arange(result_RD.numel(), dtype=torch.float64).view_as(result_RD)
    (result_RD * weight_RD).sum().backward()
    assert rows_RD.grad is not None and torch.equal(rows_RD.grad, weight_RD * owner_R1)


def uneven_splits() -> None:
    exchange([[3, 0, 1, 2], [0, 5, 0, 1]])
    exchange([[1, 1, 1, 1], [1, 1, 1, 1]])


def rank_that_sends_nothing() -> None:
    exchange([[0, 0, 0, 0], [2, 1, 0, 4]])
    exchange([[2, 0, 0, 0], [0, 0, 0, 0]])


def nobody_sends_anything() -> None:
    exchange([[0, 0, 0, 0], [0, 0, 0, 0]])


def everything_to_the_other_rank() -> None:
    exchange([[0, 0, 4, 1], [0, 0, 3, 2]])  # rank 1 works on all
    exchange([[0, 0, 4, 1], [2, 6, 0, 0]])  # each works on the other's


# -- the layer: two ranks with half of the experts each against one with all ---------------------------------


def layers(
    *, seats: Callable[[int], Sequence[int]] | None, bias: dict[int, float] | None = None
) -> tuple[MoELayer, ExpertParallelMoE]:
    """The same float64 layer with all experts here, and with half of them.

    bias: by expert, what its logit gets from the last feature of every token, which is 1.
    """
    settings = LayerSettings(router=RouterSettings(top_k=3), tau=0.75, seats=seats, drop_policy="probability")
    whole = MoELayer(WIDTH, FFN_WIDTH, KINDS, settings, has_residual=True).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in whole.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        for expert, value in (bias or {}).items():
            whole.router.weight_ED[expert, -1] = value
    split = ExpertParallelMoE(
        WIDTH, FFN_WIDTH, KINDS, settings, has_residual=True, expert_parallel=WORLD
    ).double()
    with torch.no_grad():
        for (name, mine), full in zip(split.named_parameters(), whole.parameters()):
            mine.copy_(_my_part(name, full))
    split.set_deepspeed_parallelism()
    return whole, split


def _my_part(name: str, full: Tensor) -> Tensor:
    return full.chunk(WORLD)[dist.get_rank()] if name.startswith("experts.") else full


def inputs(rank: int) -> tuple[Tensor, Tensor]:
    """Tokens (other ones and another number of them on each rank) and logits of a layer before."""
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(TOKENS - 6 * rank, WIDTH, generator=generator, dtype=torch.float64)
    x_TD[:, -1] = 1.0
    logits_TE = torch.randn(len(x_TD), KINDS.total, generator=generator, dtype=torch.float64)
    return x_TD.requires_grad_(), logits_TE.requires_grad_()


def forward_backward(
    layer: MoELayer, rank: int, *, recompute: bool = False
) -> tuple[MoEOutput, Tensor, Tensor]:
    """The output for that rank's tokens, with gradients of all it returns in the parameters and in the inputs."""
    x_TD, logits_TE = inputs(rank)
    out = layer(x_TD, logits_TE, recompute=recompute)
    weight_TD = torch.cos(torch.arange(out.output_TD.numel(), dtype=torch.float64)).view_as(out.output_TD)
    (out.output_TD * weight_TD).sum().add(out.balance_loss).add(out.logits_TE.sin().sum()).backward()
    assert x_TD.grad is not None and logits_TE.grad is not None
    return out, x_TD.grad, logits_TE.grad


def compare(whole: MoELayer, split: ExpertParallelMoE, *, recompute: bool = False) -> MoEOutput:
    """Assert that outputs and every gradient agree to 1e-10; return what the split layer gave."""

    def equal(name: str, actual: Tensor | None, expected: Tensor | None) -> None:
        assert actual is not None and expected is not None, f"{name} has no gradient"
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")

    me = dist.get_rank()
    expert_gradients = {name: torch.zeros_like(p) for name, p in whole.experts.named_parameters()}
    for rank in range(WORLD):  # a micro batch each; expert gradients add up over them
        whole.zero_grad()
        result = forward_backward(whole, rank)
        for name, parameter in whole.experts.named_parameters():
            assert parameter.grad is not None
            expert_gradients[name] += parameter.grad
        if rank == me:
            expected, expected_x, expected_logits = result
            dense = {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}
    out, x_grad, logits_grad = forward_backward(split, me, recompute=recompute)
    for name in ("output_TD", "logits_TE", "balance_loss", "z_loss"):
        equal(name, getattr(out, name), getattr(expected, name))
    for field in fields(RoutingStatistics):
        equal(field.name, getattr(out.statistics, field.name), getattr(expected.statistics, field.name))
    equal("x_TD", x_grad, expected_x)
    equal("previous logits", logits_grad, expected_logits)
    for name, parameter in split.named_parameters():
        _, is_expert, local = name.rpartition("experts.")
        equal(name, parameter.grad, _my_part(name, expert_gradients[local]) if is_expert else dense[name])
    return out


def layer_equals_one_rank_dropless() -> None:
    out = compare(*layers(seats=None))
    assert torch.equal(out.statistics.wanted_E, out.statistics.kept_E)


def layer_equals_one_rank_with_capacity() -> None:
    out = compare(*layers(seats=lambda tokens: SEATS))
    assert (out.statistics.kept_E < out.statistics.wanted_E).any()


def layer_equals_one_rank_when_recomputed() -> None:
    compare(*layers(seats=lambda tokens: SEATS), recompute=True)


def one_rank_gets_every_token() -> None:
    out = compare(*layers(seats=None, bias={0: 90.0, 1: 80.0, 4: 70.0}))
    assert out.statistics.wanted_E.tolist() == [n * out.output_TD.shape[0] for n in (1, 1, 0, 0, 1, 0, 0, 0)]


def no_token_reaches_an_ffn_expert() -> None:
    """The experts then have gradients all the same, of zeros: DeepSpeed waits for every parameter."""
    whole, split = layers(seats=None, bias={5: 90.0, 6: 80.0, 7: 70.0})
    out = compare(whole, split)
    assert out.statistics.wanted_E[:4].sum() == 0
    assert all(p.grad is not None and not p.grad.any() for p in split.experts.parameters())


def evaluation_needs_no_gradient() -> None:
    whole, split = layers(seats=lambda tokens: SEATS)
    x_TD, logits_TE = inputs(dist.get_rank())
    with torch.no_grad():
        expected, out = whole.eval()(x_TD, logits_TE), split.eval()(x_TD, logits_TE)
    torch.testing.assert_close(out.output_TD, expected.output_TD, rtol=1e-10, atol=1e-10)
    assert torch.equal(out.statistics.kept_E, out.statistics.wanted_E)  # evaluation drops nothing


# -- what travels ----------------------------------------------------------------------------------------------


class Traffic:
    """Wraps torch.distributed.all_to_all_single and adds up the bytes of rows, leaving the counts' integers out."""

    def __init__(self) -> None:
        self.kept_here: list[int] = []
        self.sent: list[int] = []
        self.received: list[int] = []
        self._real: Any = dist.all_to_all_single

    def __enter__(self) -> Traffic:
        setattr(dist, "all_to_all_single", self._count)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(dist, "all_to_all_single", self._real)

    def _count(
        self, output: Tensor, input: Tensor, output_splits: Any = None, input_splits: Any = None, **kwargs: Any
    ) -> Any:
        if input.is_floating_point():
            me, row = dist.get_rank(), input.shape[1] * input.element_size()
            assert len(input) == sum(input_splits) and len(output) == sum(output_splits)
            self.kept_here.append(input_splits[me] * row)
            self.sent.append((sum(input_splits) - input_splits[me]) * row)
            self.received.append((sum(output_splits) - output_splits[me]) * row)
        return self._real(output, input, output_splits, input_splits, **kwargs)


def only_kept_ffn_assignments_travel() -> None:
    for seats in (None, lambda tokens: SEATS):
        _, split = layers(seats=seats)
        with Traffic() as traffic:
            out, *_ = forward_backward(split, dist.get_rank())
        kept_PE = [torch.empty_like(out.statistics.kept_E) for _ in range(WORLD)]
        dist.all_gather(kept_PE, out.statistics.kept_E)
        me, other, row = dist.get_rank(), 1 - dist.get_rank(), WIDTH * 8
        away = int(kept_PE[me][2 * other : 2 * other + 2].sum()) * row
        arriving = int(kept_PE[other][2 * me : 2 * me + 2].sum()) * row
        home = int(kept_PE[me][2 * me : 2 * me + 2].sum()) * row
        # out, back, and the gradients of both in the opposite order
        assert traffic.sent == [away, arriving, away, arriving], traffic.sent
        assert traffic.received == [arriving, away, arriving, away], traffic.received
        assert traffic.kept_here == [home] * 4
        assert out.statistics.kept_E[4:].sum() > 0  # the zero-computation assignments, of which no row went anywhere


# -- DeepSpeed's seams -----------------------------------------------------------------------------------------


def rank_order_is_checked() -> None:
    _, split = layers(seats=None)
    split.first_local_expert = 2 - split.first_local_expert
    with pytest.raises(RuntimeError, match=r"is number \d of its expert-parallel group but holds the experts of"):
        split.set_deepspeed_parallelism()


def model() -> MoEPlusPlusModel:
    def factory(*args: Any, **kwargs: Any) -> MoELayer:
        return ExpertParallelMoE(*args, **kwargs, expert_parallel=WORLD)

    shared = ("model.moe.num_shared_experts=1", "model.moe.shared_expert_gate=true")
    recipe = tiny.recipe(*shared, expert_parallel=WORLD)
    return MoEPlusPlusModel(recipe.model, eos_id=0, layer_factory=factory)


def experts_are_marked_and_nothing_else() -> None:
    marked = set()
    for name, parameter in model().named_parameters():
        if hasattr(parameter, "allreduce") or hasattr(parameter, "group_name"):
            marks = vars(parameter)
            assert (marks["allreduce"], marks["group_name"]) == (False, "ep_size_2"), name
            marked.add(name)
    # the dense FFNs of blocks 0 and 2 and the shared experts are of the same class, and ordinary parameters
    weights = ("gate_up_EDG", "down_EFD")
    assert marked == {f"blocks.{block}.moe.experts.{weight}" for block in (1, 3) for weight in weights}


def parameter_groups_partition_the_model() -> None:
    whole = model()
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    found = {}
    for group in parameter_groups(whole, weight_decay=0.25):
        key = (group["name"], group.get("moe", False), group["weight_decay"])
        assert key not in found and group["params"]
        found[key] = {names[id(parameter)] for parameter in group["params"]}
    assert sorted(found) == [("decay", False, 0.25), ("ep_size_2", True, 0.25), ("no_decay", False, 0.0)]
    assert found["no_decay", False, 0.0] == {
        "norm.weight",
        *(f"blocks.{block}.{norm}.weight" for block in range(4) for norm in ("attention_norm", "ffn_norm")),
        *(f"blocks.{block}.moe.{vector}" for block in (1, 3) for vector in ("constants.value_JD", "shared_gate_D")),
    }
    assert {name.split(".")[-2] for name in found["ep_size_2", True, 0.25]} == {"experts"}
    assert set().union(*found.values()) == set(names.values())
    assert sum(map(len, found.values())) == len(names)


def large_expert_groups_are_split() -> None:
    expert_parallel.MAX_EXPERT_GROUP, largest = 2000, expert_parallel.MAX_EXPERT_GROUP
    try:
        split = parameter_groups(model(), weight_decay=0.1)  # gate_up has 2 x 16 x 48 elements, down 2 x 24 x 16
    finally:
        expert_parallel.MAX_EXPERT_GROUP = largest
    sizes = [[p.numel() for p in group["params"]] for group in split if group.get("moe")]
    assert sizes == [[1536], [768], [1536], [768]], sizes


def unpartitioned_model_is_refused() -> None:
    whole = model()
    split = parameter_groups(whole, weight_decay=0.1)
    lost = split[0]["params"].pop(0)
    with pytest.raises(RuntimeError, match=r"embedding.weight is in 0 groups"):
        check_partition(split, whole)
    split[0]["params"] += [lost, lost]
    with pytest.raises(RuntimeError, match=r"embedding.weight is in 2 groups"):
        check_partition(split, whole)
    split[0]["params"].pop()
    split[1]["params"].append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"1 others are no parameters of the model"):
        check_partition(split, whole)


CHECKS = [
    uneven_splits,
    rank_that_sends_nothing,
    nobody_sends_anything,
    everything_to_the_other_rank,
    layer_equals_one_rank_dropless,
    layer_equals_one_rank_with_capacity,
    layer_equals_one_rank_when_recomputed,
    one_rank_gets_every_token,
    no_token_reaches_an_ffn_expert,
    evaluation_needs_no_gradient,
    only_kept_ffn_assignments_travel,
    rank_order_is_checked,
    experts_are_marked_and_nothing_else,
    parameter_groups_partition_the_model,
    large_expert_groups_are_split,
    unpartitioned_model_is_refused,
]

if __name__ == "__main__":
    join_ranks()
    checks.run(CHECKS)
