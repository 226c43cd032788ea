"""Checks of what this project assumes of DeepSpeed; tests/test_deepspeed_contract.py starts them.

    ... --module tests.programs.contract_checks [ONE CHECK ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from moepp_ds.checkpoint.fragments import optimizer_facts, owned_fragments
from moepp_ds.config import Recipe
from moepp_ds.ds_config import deepspeed_config
from moepp_ds.engine import join_ranks
from moepp_ds.expert_parallel import AllToAll, ExpertParallelMoE, parameter_groups
from moepp_ds.model import MoEPlusPlusModel, expert_offsets, initialize
from moepp_ds.moe_layer import LocalExchange
from tests.programs import checks, tiny

RANKS = join_ranks()
LAYOUTS = [ways for ways in (1, 2) if RANKS.world % ways == 0]
"""Expert-parallel sizes that this world allows; checks go through all of them."""


OTHER_CHOICES = [
    "num_shared_experts=1",
    "shared_expert_gate=true",
    "router.num_layers=2",
    "router.logit_std=1.0",
    "router.jitter=0.1",
    "router.z_loss_weight=0.01",
]
"""What adds parameters to a layer, losses, or noise that must not depend on the layout."""


def moe_layers(engine: Any) -> list[ExpertParallelMoE]:
    return [module for module in engine.module.modules() if isinstance(module, ExpertParallelMoE)]


def weights(engine: Any) -> dict[str, Tensor]:
    """What this rank computes with."""
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def my_part(engine: Any, name: str, full: Tensor) -> Tensor:
    """Of a global array, the part that is in this rank's model, in the parameter's shape."""
    parameter = engine.module.get_parameter(name)
    start = expert_offsets(engine.module).get(name, 0) * parameter[0].numel()
    return full[start : start + parameter.numel()].view_as(parameter)


# -- the engine ------------------------------------------------------------------------------------------------


def experts_are_recognised() -> None:
    for ways in LAYOUTS:
        engine = tiny.engine_for(tiny.recipe(expert_parallel=ways), RANKS)
        assert engine.has_moe_layers is True
        assert engine.num_experts == [4, 4]


def layers_join_their_groups() -> None:
    for ways in LAYOUTS:
        engine = tiny.engine_for(tiny.recipe(expert_parallel=ways), RANKS)
        kind = AllToAll if ways > 1 else LocalExchange
        assert len(moe_layers(engine)) == 2
        assert all(type(layer.exchange) is kind for layer in moe_layers(engine))


def expert_parallel_ranks_are_consecutive() -> None:
    for ways in LAYOUTS:
        engine = tiny.engine_for(tiny.recipe(expert_parallel=ways), RANKS)
        first = RANKS.rank // ways * ways
        group = groups._get_expert_parallel_group(f"ep_size_{ways}")
        assert dist.get_process_group_ranks(group) == list(range(first, first + ways))
        replicas = groups._get_expert_data_parallel_group(f"ep_size_{ways}")
        assert dist.get_process_group_ranks(replicas) == list(range(RANKS.rank % ways, RANKS.world, ways))
        assert all(layer.first_local_expert == RANKS.rank % ways * (4 // ways) for layer in moe_layers(engine))


def unknown_json_keys_pass_in_silence() -> None:
    """Why moepp_ds.ds_config refuses them itself."""
    asked = tiny.recipe()
    config = {**deepspeed_config(asked, RANKS.world), "gradient_cliping": 5.0}
    assert engine_with(config, asked, 1).gradient_clipping() == 1.0


def updates_are_counted() -> None:
    """An update is one global step, however many micro batches it has; AdamW counts it in every group."""
    for ways in LAYOUTS:
        asked = tiny.recipe(expert_parallel=ways)
        engine = tiny.engine_for(asked, RANKS)
        assert engine.global_steps == 0
        tiny.train(engine, asked, RANKS, [0, 1, 2])
        assert engine.gradient_accumulation_steps() == 4 // RANKS.world
        assert engine.global_steps == 3
        zero = engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            step = zero.optimizer.state[flat]["step"]
            assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 3.0)


# -- where weights and moments are ----------------------------------------------------------------------------


def optimizer_has_the_parts_we_read() -> None:
    for ways in LAYOUTS:
        asked = tiny.recipe(expert_parallel=ways)
        engine = tiny.engine_for(asked, RANKS)
        tiny.train(engine, asked, RANKS, [0])
        zero = engine.optimizer
        assert len(zero.single_partition_of_fp32_groups) == len(zero.bit16_groups) == len(zero.param_groups)
        assert len(zero.bit16_groups) == 3  # decayed, not decayed, experts
        held = [parameter for group in zero.bit16_groups for parameter in group]
        assert {id(p) for p in held} == {id(p) for p in engine.module.parameters()}
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
            assert flat.dtype == torch.float32 and flat.ndim == 1
            assert {"exp_avg", "exp_avg_sq", "step"} == set(zero.optimizer.state[flat])
            for mapping in (p._hp_mapping for p in group if p._hp_mapping is not None):
                place, inside = mapping.hp_fragment_address, mapping.lp_fragment_address
                assert place.numel == inside.numel > 0
                view = flat.narrow(0, place.start, place.numel)
                assert mapping.hp_fragment.data_ptr() == view.data_ptr()
        assert zero.overflow is False and zero.dynamic_loss_scale is False
        assert optimizer_facts(engine)["updates"] == 1


def fragments_tile_every_parameter() -> None:
    """All ranks' fragments together are the model: each element once, at its global place."""
    for ways in LAYOUTS:
        asked = tiny.recipe(expert_parallel=ways)
        found = tiny.global_arrays(tiny.engine_for(asked, RANKS))  # asserts that nothing is owned twice
        tiny.same(found, tiny.PlainRun.start(asked).arrays())  # NaN, where nothing is owned, equals nothing


def masters_reach_the_weights_through_update_lp_params() -> None:
    for ways in LAYOUTS:
        for precision in ("fp32", "bf16"):
            engine = tiny.engine_for(tiny.recipe(expert_parallel=ways, precision=precision), RANKS)
            for fragment in owned_fragments(engine):
                weight = fragment.tensors["weight"]
                weight.copy_(torch.arange(fragment.start, fragment.start + len(weight)))
            engine.optimizer.update_lp_params()
            for name, weight in weights(engine).items():
                expected = my_part(engine, name, torch.arange(10**5, dtype=torch.float32))
                assert torch.equal(weight, expected.to(weight.dtype)), name


# -- gradients -------------------------------------------------------------------------------------------------


def gradients_equal_plain_torch() -> None:
    """Averaged once over all micro batches and ranks, expert gradients too: AdamW's first moment shows them."""
    for ways in LAYOUTS:
        asked = tiny.recipe("train.gradient_clipping=0.0", expert_parallel=ways)
        engine, plain = tiny.engine_for(asked, RANKS), tiny.PlainRun.start(asked)
        tiny.train(engine, asked, RANKS, [0])
        plain.update(0, rate=asked.learning_rate(0))
        found = {k: v / 0.1 for k, v in tiny.global_arrays(engine).items() if k.startswith("exp_avg|")}
        named = plain.model.named_parameters()
        gradients = {f"exp_avg|{name}": p.grad.flatten() for name, p in named if p.grad is not None}
        tiny.close(found, gradients, relative=1e-5)


def small_buckets_change_nothing() -> None:
    """Gradients that leave in many small buckets, some cut inside a parameter, are the same."""
    for ways in LAYOUTS:
        asked = tiny.recipe(expert_parallel=ways)
        arrays = []
        for size in (None, 700):
            config = deepspeed_config(asked, RANKS.world)
            if size:
                config["zero_optimization"].update(reduce_bucket_size=size, allgather_bucket_size=size)
            engine = engine_with(config, asked, ways)
            tiny.train(engine, asked, RANKS, [0, 1])
            arrays.append(tiny.global_arrays(engine))
        tiny.close(arrays[1], arrays[0], relative=1e-6)


def engine_with(config: dict[str, Any], asked: Recipe, ways: int) -> Any:
    """As `build_engine` does it, with a configuration that no recipe gives."""

    def factory(*args: Any, **kwargs: Any) -> ExpertParallelMoE:
        return ExpertParallelMoE(*args, **kwargs, expert_parallel=ways)

    model = MoEPlusPlusModel(asked.model, eos_id=0, layer_factory=factory)
    initialize(model, seed=asked.train.seed, std=asked.model.init_std)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), betas=(0.9, 0.95), fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def norm_counts_every_expert_once() -> None:
    for ways in LAYOUTS:
        asked = tiny.recipe(expert_parallel=ways)
        engine, plain = tiny.engine_for(asked, RANKS), tiny.PlainRun.start(asked)
        ((_, norm),) = tiny.train(engine, asked, RANKS, [0])
        _, expected = plain.update(0, rate=0.0)
        assert abs(norm - expected) <= 1e-5 * expected, (ways, norm, expected)


def clipping_scales_every_gradient() -> None:
    for ways in LAYOUTS:
        moments = []
        for clip in (0.0, 0.01):
            asked = tiny.recipe(f"train.gradient_clipping={clip}", expert_parallel=ways)
            engine = tiny.engine_for(asked, RANKS)
            ((_, norm),) = tiny.train(engine, asked, RANKS, [0])
            assert norm > 0.1  # of the gradient before clipping, in both
            arrays = tiny.global_arrays(engine)
            moments.append({name: a for name, a in arrays.items() if name.startswith("exp_avg|")})
        unclipped, clipped = moments
        tiny.close(clipped, {name: a * 0.01 / norm for name, a in unclipped.items()}, relative=1e-4)


def _spoiled(precision: str) -> None:
    """A NaN in the gradient of one parameter on one rank stops the update on all."""
    for ways in LAYOUTS:
        for victim in ("blocks.1.moe.experts.down_EFD", "blocks.0.attention_norm.weight"):
            asked = tiny.recipe(expert_parallel=ways, precision=precision)
            engine = tiny.engine_for(asked, RANKS)
            tiny.train(engine, asked, RANKS, [0])
            before, arrays = weights(engine), tiny.global_arrays(engine)
            if RANKS.rank == RANKS.world - 1:
                hook = engine.module.get_parameter(victim).register_hook(lambda grad: grad * torch.nan)
            for batch in tiny.micro_batches(1)[RANKS.rank :: RANKS.world]:
                engine.backward(engine(torch.from_numpy(batch.tokens_BS1)).loss)
                engine.step()
            where = f"{precision}, {ways} ways, {victim}"
            assert engine.optimizer.overflow is True, where
            assert float(engine.get_global_grad_norm()) == float("inf"), where
            assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items()), where
            tiny.same(tiny.global_arrays(engine), arrays)
            assert optimizer_facts(engine)["updates"] == 1, where
            if RANKS.rank == RANKS.world - 1:
                hook.remove()
            ((loss, norm),) = tiny.train(engine, asked, RANKS, [2])  # and the next update is an ordinary one
            assert loss == loss and 0 < norm < float("inf") and engine.optimizer.overflow is False, where


def nan_gradient_skips_the_update_in_fp32() -> None:
    _spoiled("fp32")


def nan_gradient_skips_the_update_in_bf16() -> None:
    _spoiled("bf16")


def updates_equal_plain_torch() -> None:
    """Losses, norms, weights and moments are those of AdamW in one process: an update to 1e-5, three to 1e-4."""
    for ways in LAYOUTS:
        for choices in (["dropless=true"], ["dropless=false"], OTHER_CHOICES):
            # AdamW's first update is the sign of a gradient, also of one that is rounding alone, unless eps is more
            overrides = [*(f"model.moe.{choice}" for choice in choices), "train.adam_eps=1e-6"]
            asked = tiny.recipe(*overrides, expert_parallel=ways)
            engine, plain = tiny.engine_for(asked, RANKS), tiny.PlainRun.start(asked)
            for steps, relative in (([0], 1e-5), ([1, 2], 1e-4)):
                found = tiny.train(engine, asked, RANKS, steps)
                expected = [plain.update(step, rate=asked.learning_rate(step)) for step in steps]
                torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=relative, atol=0)
                tiny.close(tiny.global_arrays(engine), plain.arrays(), relative=relative)
                used = weights(engine)
                full = {name: p.detach().flatten() for name, p in plain.model.named_parameters()}
                tiny.close(used, {n: my_part(engine, n, full[n]) for n in used}, relative=relative)


CHECKS: list[Callable[[], None]] = [
    experts_are_recognised,
    layers_join_their_groups,
    expert_parallel_ranks_are_consecutive,
    unknown_json_keys_pass_in_silence,
    updates_are_counted,
    optimizer_has_the_parts_we_read,
    fragments_tile_every_parameter,
    masters_reach_the_weights_through_update_lp_params,
    gradients_equal_plain_torch,
    small_buckets_change_nothing,
    norm_counts_every_expert_once,
    clipping_scales_every_gradient,
    nan_gradient_skips_the_update_in_fp32,
    nan_gradient_skips_the_update_in_bf16,
    updates_equal_plain_torch,
]

if __name__ == "__main__":
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    checks.run([check for check in CHECKS if not wanted or check.__name__ in wanted])
