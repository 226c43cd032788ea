"""Scores of held-out text: what is counted, in which unit, and that ranks without rows take part.

One process works here, without ranks; two ranks are tests/programs/evaluate_checks.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from programs import tiny
from programs.checks import expect, start
from shard_sets import EOS, write_set, write_shard
from torch import Tensor

from data_pipeline.stream import HeldOut, open_held_out
from moepp_ds.config import ModelConfig
from moepp_ds.controller import RoutingInputs
from moepp_ds.evaluate import Score, evaluate, overall, score_lines
from moepp_ds.model import MoEPlusPlusModel, initialize

VOCABULARY, SEQ_LEN = 32, 4
DOCUMENTS = [[5, 9, 3], [8, 2, 30, 4, 11], [6, 10]]
FLAT = [5, 9, 3, EOS, 8, 2, 30, 4, 11, EOS, 6, 10, EOS]
"""The documents laid end to end: 13 tokens, hence 12 targets, which are 3 rows of 4."""


def held_out(folder: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, *, text_bytes: int = 39) -> HeldOut:
    path = folder / "held_out.shard"
    record = write_shard(path, documents, vocab_size=VOCABULARY)
    return HeldOut(record.tokens, text_bytes, record.documents, eos_id=EOS, paths=[path])


def make_model(model: type[MoEPlusPlusModel] = MoEPlusPlusModel, *, seats: float = 1.0) -> MoEPlusPlusModel:
    """Two MoE++ layers of 4 FFN, 1 constant, 1 copy and 1 zero expert; float64, in training mode."""
    sizes = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 12}
    experts = {"num_ffn_experts": 4, "capacity_factor": seats}
    made = model(ModelConfig.model_validate({"vocab_size": VOCABULARY, **sizes, "moe": experts}), eos_id=EOS).double()
    initialize(made, seed=0, std=0.5)
    return made


def score(model: MoEPlusPlusModel, texts: HeldOut, *, micro_batch_size: int = 2, rows: int = 99) -> Score:
    scores = evaluate(model, {"text": texts}, seq_len=SEQ_LEN, micro_batch_size=micro_batch_size, rows=rows)
    assert list(scores) == ["text"]
    return scores["text"]


@torch.no_grad()
def nats_of(model: MoEPlusPlusModel, tokens: Sequence[int]) -> list[float]:
    """Nats of each token from the second on, a row and a target at a time."""
    was_training = model.training
    model.eval()
    nats = []
    for first in range(0, len(tokens) - 1, SEQ_LEN):
        row = tokens[first : first + SEQ_LEN + 1]
        nats += [model.token_losses(torch.tensor([row]))[0, at].item() for at in range(len(row) - 1)]
    model.train(was_training)
    return nats


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_loss_is_the_mean_over_all_targets(tmp_path: Path, micro_batch_size: int) -> None:
    """Every token but the first once, however the rows are cut into micro batches."""
    model = make_model()
    nats = nats_of(model, FLAT)
    found = score(model, held_out(tmp_path), micro_batch_size=micro_batch_size)
    assert found.tokens == len(nats) == 12
    assert found.loss == pytest.approx(sum(nats) / 12, rel=1e-9)
    assert found.bits_per_byte == pytest.approx(sum(nats) / 12 / math.log(2) * 13 / 39, rel=1e-9)


def test_bits_per_byte_of_a_model_that_knows_nothing(tmp_path: Path) -> None:
    """32 equally likely tokens are 5 bits each; 39 bytes in 13 tokens are 3 bytes each."""
    model = make_model()
    torch.nn.init.zeros_(model.head.weight)
    found = score(model, held_out(tmp_path))
    assert found.loss == pytest.approx(math.log(32), rel=1e-9)
    assert found.bits_per_byte == pytest.approx(5 / 3, rel=1e-9)
    assert score_lines({"text": found}) == ["  text  loss 3.4657  1.6667 bits/byte  12 tokens"]


@pytest.mark.parametrize(("rows", "targets"), [(1, 4), (2, 8), (3, 12), (4, 12)])
def test_rows_limits_what_is_scored(tmp_path: Path, rows: int, targets: int) -> None:
    """Bytes per token are still those of the whole text."""
    model = make_model()
    found = score(model, held_out(tmp_path), rows=rows)
    expected = sum(nats_of(model, FLAT)[:targets]) / targets
    assert found.tokens == targets
    assert found.loss == pytest.approx(expected, rel=1e-9)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 3, rel=1e-9)


class Poisoned(MoEPlusPlusModel):
    """Has no number for a target of PADDING."""

    PADDING = 31

    def token_losses(self, tokens_BS1: Tensor, routing: RoutingInputs | None = None) -> Tensor:
        return super().token_losses(tokens_BS1, routing).masked_fill(tokens_BS1[:, 1:] == self.PADDING, torch.nan)


def test_what_fills_the_last_row_is_not_scored(tmp_path: Path) -> None:
    """12 tokens are 11 targets: the last row has one that is none, and whatever its loss is, it does not count."""
    texts = held_out(tmp_path, [*DOCUMENTS[:2], [6]])
    poisoned = replace(texts, eos_id=Poisoned.PADDING)
    assert poisoned.rows(SEQ_LEN)[0][-1, -1] == Poisoned.PADDING
    expected = sum(nats_of(make_model(), [*FLAT[:11], EOS])) / 11
    for found in (score(make_model(), texts), score(make_model(Poisoned), poisoned)):
        assert found.tokens == 11
        assert found.loss == pytest.approx(expected, rel=1e-9)


def test_every_source_is_scored_on_its_own(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    texts = {"a": held_out(tmp_path), "b": held_out(tmp_path / "b", [[7, 7, 7, 12]], text_bytes=10)}
    model = make_model()
    scores = evaluate(model, texts, seq_len=SEQ_LEN, micro_batch_size=2, rows=99)
    assert scores == {"a": score(model, texts["a"]), "b": score(model, texts["b"])}
    assert scores["b"].loss == pytest.approx(sum(nats_of(model, [7, 7, 7, 12, EOS])) / 4, rel=1e-9)
    together = overall(scores, texts)
    nats = sum(nats_of(model, FLAT)) + sum(nats_of(model, [7, 7, 7, 12, EOS]))
    assert together.tokens == 12 + 4
    assert together.loss == pytest.approx(nats / 16, rel=1e-9)
    scored_bytes = 12 * 39 / 13 + 4 * 10 / 5  # 3 bytes a token, and 2
    assert together.bits_per_byte == pytest.approx(nats / math.log(2) / scored_bytes, rel=1e-9)


def test_biases_of_the_controller_count(tmp_path: Path) -> None:
    """A bias that lifts the zero expert and the last FFN expert above all others: both are everyone's choice."""
    model = make_model()
    bias_LE = torch.zeros(2, 7).index_fill_(1, torch.tensor([3, 6]), 9.0)
    routing = RoutingInputs(bias_LE=bias_LE)
    found = evaluate(
        model, {"text": held_out(tmp_path)}, seq_len=SEQ_LEN, micro_batch_size=2, rows=99, routing=routing
    )
    with torch.no_grad():
        rows = torch.tensor([FLAT[:5], FLAT[4:9], FLAT[8:13]])
        expected = model.eval().token_losses(rows, routing).mean().item()
        assert model.hidden(rows, routing)[1][1].statistics.wanted_E.tolist() == [0, 0, 0, 15, 0, 0, 15]
    assert found["text"].loss == pytest.approx(expected, rel=1e-9)
    assert found["text"] != score(model, held_out(tmp_path))


def test_nothing_is_dropped(tmp_path: Path) -> None:
    """Next to no seats change what the model computes in training, and not its scores."""
    cramped, roomy = make_model(seats=0.01), make_model(seats=100.0)
    rows = torch.tensor([FLAT[:9]])
    assert not torch.allclose(cramped.token_losses(rows), roomy.token_losses(rows), rtol=1e-3)
    assert score(cramped, held_out(tmp_path)) == score(roomy, held_out(tmp_path))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tmp_path: Path, training: bool) -> None:
    model = make_model().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, held_out(tmp_path))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.token_losses(torch.tensor([FLAT[:5]])).sum().backward()  # gradients are on again


@pytest.mark.dist
def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    """1, 3 and 5 rows of micro batches of 2: rank 1 has none at all, one, and none in the second round."""
    numbers = torch.Generator().manual_seed(0)
    texts = {
        source: {source: [torch.randint(2, tiny.VOCABULARY, (tokens,), generator=numbers).tolist()]}
        for source, tokens in {"one": 9, "three": 3 * tiny.SEQUENCE - 2, "five": 5 * tiny.SEQUENCE}.items()
    }
    shards = write_set(tmp_path / "shards", texts, texts, vocab_size=tiny.VOCABULARY)
    overrides = [f"data.path={shards}", "data.mixture={one: 1, three: 1, five: 1}", "model.moe.capacity_factor=0.5"]
    results = start("tests.programs.evaluate_checks", [str(tmp_path), *overrides], world=2, log=tmp_path / "log.txt")
    expect(results, "scores_are_written")
    first, second = (json.loads((tmp_path / f"scores-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second

    asked = tiny.recipe(*overrides)
    model = MoEPlusPlusModel(asked.model, eos_id=EOS)
    initialize(model, seed=asked.train.seed, std=asked.model.init_std)
    sources = open_held_out(asked.data)
    rows = {source: len(text.rows(tiny.SEQUENCE)[0]) for source, text in sources.items()}
    assert rows == {"one": 1, "three": 3, "five": 5}
    alone = evaluate(model, sources, seq_len=tiny.SEQUENCE, micro_batch_size=tiny.MICRO_BATCH, rows=99)
    assert {source: found["tokens"] for source, found in first.items()} == {"one": 9, "three": 46, "five": 80}
    for source, expected in alone.items():
        assert first[source] == pytest.approx(asdict(expected), rel=1e-5)
