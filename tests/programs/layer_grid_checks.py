"""Every combination of the grid with its FFN experts on two ranks; tests/test_layer_grid.py starts this program.

Rank r works on micro batch r with half of the experts, and compares with one rank that has them all and works on both
micro batches in turn: there the gradients of experts add up over the micro batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_ds.engine import join_ranks
from moepp_ds.expert_parallel import AllToAll, ExpertParallelMoE
from moepp_ds.moe_layer import MoELayer
from tests.programs import checks
from tests.programs.layer_grid import COMBINATIONS, make_case, make_layer, total_loss

WORLD, LIMIT = 2, 1e-12


@dataclass(frozen=True)
class Pass:
    """What a forward and a backward pass gave: results, gradients of the inputs, gradients by parameter."""

    values: dict[str, Tensor]
    input_grads: dict[str, Tensor]
    grads: dict[str, Tensor]


def layers(number: int) -> tuple[MoELayer, ExpertParallelMoE]:
    """The same float64 layer with all experts, and with this rank's half of them."""
    config = make_case(number).config
    make = partial(make_layer, config, ffn_hidden_size=16, has_residual=True, seed=number)
    whole, split = make(), make(factory=partial(ExpertParallelMoE, expert_parallel=WORLD))
    assert isinstance(split, ExpertParallelMoE)
    full = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            parameter.copy_(my_part(name, full[name]))
    split.set_deepspeed_parallelism()
    assert isinstance(split.exchange, AllToAll)
    return whole, split


def my_part(name: str, full: Tensor) -> Tensor:
    return full.chunk(WORLD)[dist.get_rank()] if name.startswith("experts.") else full


def work(layer: MoELayer, number: int, micro_batch: int) -> Pass:
    """Forward and backward of one micro batch."""
    case = make_case(number, micro_batch=micro_batch)
    layer.zero_grad()
    out = layer(case.x_TD, case.previous_TE, recompute=case.recompute, **case.told)
    total_loss(case, out.output_TD, out.logits_TE, out.balance_loss, out.z_loss).backward()
    values = {name: getattr(out, name).detach() for name in ("output_TD", "logits_TE", "balance_loss", "z_loss")}
    values |= {field.name: getattr(out.statistics, field.name) for field in fields(out.statistics)}
    values |= {name: getattr(out.routing, name).detach() for name in ("token_N", "expert_N", "rank_N", "gate_N")}
    inputs = {"x": case.x_TD, "previous logits": case.previous_TE}
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [name for name in grads if grads[name] is None]
    return Pass(
        values=values,
        # without a gating residual the logits before have no gradient, here or there
        input_grads={name: given.grad for name, given in inputs.items() if given.grad is not None},
        grads={name: grad.clone() for name, grad in grads.items() if grad is not None},
    )


def two_ranks_are_one(number: int) -> None:
    whole, split = layers(number)
    me, mine = dist.get_rank(), work(split, number, dist.get_rank())
    expected = [work(whole, number, micro_batch) for micro_batch in range(WORLD)]
    summed = {name: expected[0].grads[name] + expected[1].grads[name] for name in expected[0].grads}
    same(mine.values, expected[me].values)
    same(mine.input_grads, expected[me].input_grads)
    # Replicated parameters have the gradient of this rank's tokens; DeepSpeed adds them up over the ranks.
    of_tokens = {n: my_part(n, summed[n]) if n.startswith("experts.") else g for n, g in expected[me].grads.items()}
    same(mine.grads, of_tokens)
    replicated = {name: grad for name, grad in mine.grads.items() if not name.startswith("experts.")}
    for grad in replicated.values():
        dist.all_reduce(grad)
    same(replicated, {name: summed[name] for name in replicated})


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that tensors agree to LIMIT of their size; integers exactly."""
    assert actual.keys() == expected.keys(), (list(actual), list(expected))
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
        error = float((actual[name].double() - tensor.double()).norm())
        allowed = LIMIT * max(1.0, float(tensor.double().norm())) if tensor.is_floating_point() else 0.0
        assert error <= allowed, f"{name} differs by {error:g}, more than {allowed:g}"


def check_of(number: int) -> Callable[[], None]:
    check = partial(two_ranks_are_one, number)
    check.__name__ = f"combination_{number}"  # type: ignore[attr-defined]
    return check


if __name__ == "__main__":
    join_ranks()
    checks.run([check_of(number) for number in range(len(COMBINATIONS))])
