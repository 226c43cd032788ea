"""A tiny model and its batches, for programs of several ranks; and the same training without DeepSpeed.

Four blocks, the second and the fourth with a MoE++ layer of 4 FFN, 2 constant, 1 copy and 1 zero expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from moepp_ds.checkpoint.fragments import owned_fragments
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.config import Recipe, load_recipe
from moepp_ds.controller import RoutingInputs
from moepp_ds.engine import Ranks, build_engine
from moepp_ds.expert_parallel import decays
from moepp_ds.model import MoEPlusPlusModel, initialize
from moepp_ds.update import update

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, SEQUENCE, MICRO_BATCH, ROWS = 64, 16, 2, 8


def recipe(*overrides: str, expert_parallel: int = 1, precision: str = "fp32") -> Recipe:
    """The tiny recipe; `ROWS` rows an update."""
    return load_recipe(
        ROOT / "launch" / "recipes" / "quickstart.yaml",
        [
            f"deepspeed=ds_configs/zero2_{precision}.json",
            f"model.vocab_size={VOCABULARY}",
            "model.num_layers=4",
            "model.hidden_size=16",
            "model.num_heads=2",
            "model.ffn_hidden_size=24",
            "model.init_std=0.2",
            "model.moe.every=2",
            "model.moe.num_ffn_experts=4",
            f"data.seq_len={SEQUENCE}",
            f"train.batch_tokens={ROWS * SEQUENCE}",
            f"train.micro_batch_size={MICRO_BATCH}",
            f"train.precision={precision}",
            "train.warmup_steps=0",
            "train.max_lr=1e-2",
            f"parallel.expert_parallel={expert_parallel}",
            *overrides,
        ],
    )


def micro_batches(step: int) -> list[Batch]:
    """All micro batches of update `step`, counted from 0, whatever the layout."""
    tokens = np.random.Generator(np.random.Philox(step)).integers(0, VOCABULARY, (ROWS, SEQUENCE + 1))
    sources = np.zeros(MICRO_BATCH, dtype=np.int64)
    return [
        Batch(tokens[at : at + MICRO_BATCH], step * ROWS + at, sources) for at in range(0, ROWS, MICRO_BATCH)
    ]


def engine_for(asked: Recipe, ranks: Ranks) -> Any:
    """A fresh engine of that recipe."""
    return build_engine(asked, ranks, eos_id=0)[0]


def train(engine: Any, asked: Recipe, ranks: Ranks, steps: Sequence[int]) -> list[tuple[float, float]]:
    """Do these updates; (loss, gradient norm) of each."""
    done = []
    for step in steps:
        mine = micro_batches(step)[ranks.rank :: ranks.world]
        rate = asked.learning_rate(step)
        result = update(engine, mine, ranks, rate=rate, num_sources=1, stop=lambda: False)
        done.append((result.loss, result.grad_norm))
    return done


def global_arrays(engine: Any) -> dict[str, Tensor]:
    """`kind|name` -> the flat global array, put together from the fragments of all ranks; NaN where there is none.

    Asserts that no element is in two fragments. Collective.
    """
    mine = [
        (kind, fragment.name, fragment.start, tensor.clone())
        for fragment in owned_fragments(engine)
        for kind, tensor in fragment.tensors.items()
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    sizes = {name: int(np.prod(shape)) for name, shape in global_shapes(engine.module.config).items()}
    arrays: dict[str, Tensor] = {}
    for kind, name, start, values in (fragment for fragments in everyone for fragment in fragments):
        array = arrays.setdefault(f"{kind}|{name}", torch.full((sizes[name],), torch.nan))
        place = array[start : start + len(values)]
        assert len(place) == len(values) and place.isnan().all(), f"{kind} of {name} is owned twice at {start}"
        place.copy_(values)
    return arrays


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Assert that two sets of arrays are equal bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"arrays differ: {different}"


@dataclass
class PlainRun:
    """The same training by plain PyTorch: one process, every expert, all micro batches in turn."""

    model: MoEPlusPlusModel
    optimizer: torch.optim.AdamW
    clip: float

    @staticmethod
    def start(asked: Recipe) -> PlainRun:
        model = MoEPlusPlusModel(asked.model, eos_id=0)
        initialize(model, seed=asked.train.seed, std=asked.model.init_std)
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if decays(n, p) is decayed], "weight_decay": weight_decay}
            for decayed, weight_decay in ((True, asked.train.weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, betas=asked.train.adam_betas, eps=asked.train.adam_eps)
        return PlainRun(model, optimizer, asked.train.gradient_clipping)

    def update(self, step: int, *, rate: float) -> tuple[float, float]:
        """One update; (loss, gradient norm). The gradients, clipped if they were, stay."""
        self.optimizer.zero_grad()
        batches, total = micro_batches(step), 0.0
        for batch in batches:
            routing = RoutingInputs(first_row=batch.row_start)  # what `update` tells a model that has no state yet
            loss = self.model(torch.from_numpy(batch.tokens_BS1), routing).loss / len(batches)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return total, norm.item()

    def arrays(self) -> dict[str, Tensor]:
        """As `global_arrays`."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[f"weight|{name}"] = parameter.detach().flatten()
            for kind in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(parameter)
                found[f"{kind}|{name}"] = (state[kind] if state else torch.zeros_like(parameter)).flatten()
        return found


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float) -> None:
    """Assert that the norm of each array's difference is at most `relative` of the expected array's norm."""
    assert actual.keys() == expected.keys()
    errors = {
        name: float((actual[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30))
        for name in expected
    }
    wrong = {name: error for name, error in errors.items() if not error <= relative}  # NaN is wrong, too
    assert not wrong, f"{len(wrong)} differ by more than {relative:g}, the most: {max(wrong.items(), key=_second)}"


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
