"""Configuration: defaults, stages and limits, and what is refused."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.weights import flatten_mixture


def test_config_defaults_and_strictness() -> None:
    config = DataConfig(path="shards")
    assert (
        config.mixture,
        config.seq_len,
        config.seed,
        config.shuffle_window,
        config.interleave,
        config.sampling,
    ) == (
        "strategy_1",
        2048,
        0,
        16384,
        64,
        "exact",
    )
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DataConfig(path="shards", seqlen=4)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {"path": ""},
        {"seq_len": 0},
        {"seq_len": "2048"},
        {"seed": -1},
        {"seed": 2**63},
        {"shuffle_window": 0},
        {"interleave": 0},
        {"sampling": "greedy"},
        {"mixture": {"a": -1}},
        {"mixture": ["a"]},
    ],
)
def test_config_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**{"path": "shards", **values})


@pytest.mark.parametrize(("mixture", "written"), [(None, "null"), (["a"], '["a"]'), (3, "3")])
def test_a_mixture_of_another_type_is_named_once(mixture: Any, written: str) -> None:
    with pytest.raises(ValidationError, match="1 validation error for DataConfig\nmixture\n.* name a preset") as error:
        DataConfig(path="shards", mixture=mixture)
    assert f"mixture is {written};" in str(error.value)


TWO_STAGES: list[dict[str, Any]] = [{"mixture": "strategy_1", "tokens": 4096e3}, {"mixture": {"dolma": 1, "pile": 3}}]


def test_stages_take_the_place_of_the_mixture() -> None:
    config = DataConfig(path="p", stages=TWO_STAGES)  # type: ignore[arg-type]
    assert config.mixture is None
    assert [stage.rows for stage in config.flat_stages] == [2000, None]
    assert config.flat_stages[1].mixture.weights == {"dolma": Fraction(1, 4), "pile": Fraction(3, 4)}
    assert config.source_names == tuple(sorted(flatten_mixture("strategy_1").weights))
    assert config.notices == ["stage 2: mixture weights sum to 4; they were scaled to sum to 1"]
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    plain = DataConfig(path="p", mixture={"a": 1})
    assert [stage.rows for stage in plain.flat_stages] == [None] and plain.notices == []


def test_epoch_limits_are_exact_and_nested_as_a_mixture_may_be() -> None:
    config = DataConfig(path="p", max_epochs={"redpajama": {"book": 0.1}, "pile": 4})  # type: ignore[dict-item]
    assert config.max_epochs == {"redpajama/book": 0.1, "pile": 4.0}
    assert config.epoch_limit("redpajama/book") == Fraction(1, 10)
    assert config.epoch_limit("pile") == 4 and config.epoch_limit("dolma") is None
    assert DataConfig(path="p", max_epochs=2).epoch_limit("dolma") == 2
    assert DataConfig(path="p").epoch_limit("dolma") is None


def test_home_folders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/somebody")
    raw = {"dolma": "~/dolma", "pile": "s3://bucket/~/pile", "tokenizer": "t.model"}
    config = DataConfig(path="~/spool", mode="stream", raw=raw)  # type: ignore[arg-type]
    assert config.path == "/home/of/somebody/spool" and config.raw is not None
    assert config.raw.corpora == {"dolma": "/home/of/somebody/dolma", "pile": "s3://bucket/~/pile"}


STREAM = {"mode": "stream", "raw": {"dolma": "d", "tokenizer": "t"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": {"a": 1}, "stages": TWO_STAGES}, "and stages are given too; set one of them to null"),
        ({"stages": []}, "at least 1 item"),
        ({"stages": [{"mixture": "strategy1"}]}, "(nearest: 'strategy_1')"),
        (
            {"stages": [{"mixture": "strategy_1", "tokens": 2049}, {"mixture": "strategy_2"}]},
            "stage 1 has 2,049 tokens, no multiple of seq_len 2048; use 2,048 or 4,096 (data.stages)",
        ),
        ({"stages": [{"mixture": "strategy_1", "tokens": 2048}]}, "stage 1 of 1 has tokens: 2048; every stage but"),
        ({"stages": [{"mixture": "strategy_1"}] * 2}, "stage 1 of 2 has tokens: null; every stage but the last"),
        (
            {"stages": [{"mixture": {"a": 1}, "tokens": 2048}, {"mixture": {"a/b": 1}}]},
            "mixture names both 'a' and 'a/b', which lies under it",
        ),
        ({"max_epochs": 0}, "max_epochs is 0; give a positive number of passes over the source (data.max_epochs)"),
        ({"max_epochs": "2"}, 'max_epochs is "2"; give a positive number'),
        ({"max_epochs": {"dolma": float("nan")}}, "max_epochs of 'dolma' is NaN; give a positive number"),
        ({"max_epochs": {"dolma": None}}, "max_epochs of 'dolma' is null; give a positive number"),
        ({"max_epochs": {"dolm": 1}}, "max_epochs names 'dolm', which has no weight (nearest: 'dolma'); the sources"),
        ({"max_epochs": {"redpajama/c4": 1, "redpajama": {"c4": 2}}}, "gives a limit to 'redpajama/c4' twice; keep"),
        ({"mixture": {"a": 1, "b": 1e-7}}, "mixture weight of 'b' is 1e-07 of the total, which rounds to no slot"),
        ({"stages": [{"mixture": "strategy_1", "tokens": 1e30}, {"mixture": "strategy_2"}]}, "or equal to 1000000000"),
        ({"mode": "stream"}, "mode: stream needs data.raw"),
        ({"raw": STREAM["raw"]}, "raw is given and mode is prepared; set data.mode to stream"),
        ({**STREAM, "max_epochs": 1}, "max_epochs needs the length of every source, which mode: stream does not know"),
        ({"mode": "stream", "raw": {"tokenizer": "t"}}, "raw names no files; give at least one of redpajama, dolma"),
        ({"path": "~no body/x"}, "~no body/x begins with ~ and there is no such home folder"),
    ],
)
def test_what_does_not_agree_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)) as error:
        DataConfig(**{"path": "p", **values})
    assert error.value.error_count() == 1
