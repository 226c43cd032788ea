"""Recipes as files: their YAML, and the data section read alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from data_pipeline.document import DataError
from data_pipeline.recipe_file import parse_yaml, read_data_section


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_numbers_are_those_of_yaml_1_2() -> None:
    assert parse_yaml("{a: 5e-4, b: 1e11, c: 010, d: 1:30, e: 2024-01-01}") == {
        "a": 5e-4,
        "b": 1e11,
        "c": "010",
        "d": "1:30",
        "e": "2024-01-01",
    }
    with pytest.raises(yaml.YAMLError, match="key 'a' is given a second time"):
        parse_yaml("{a: 1, a: 2}")
    with pytest.raises(yaml.YAMLError, match="nested too deeply"):
        parse_yaml("[" * 5000)


def test_the_data_section_and_the_tokens_of_the_run(tmp_path: Path) -> None:
    text = """
    model: {whatever: not looked at}
    data:
      path: shards
      seq_len: 64
      stages:
        - {mixture: strategy_1, tokens: 64e3}
        - {mixture: strategy_2}
    train: {token_budget: 1e11, max_steps: 1000, batch_tokens: 65536}
    """
    config, planned = read_data_section(recipe(tmp_path, text))
    assert config.path == "shards" and planned == 65_536_000
    assert [stage.rows for stage in config.flat_stages] == [1000, None]
    config, _ = read_data_section(recipe(tmp_path, text), shards=tmp_path / "other")
    assert config.path == str(tmp_path / "other")


@pytest.mark.parametrize(
    ("train", "planned"),
    [
        ("{token_budget: 1e6}", 10**6),
        ("{token_budget: 1e6, max_steps: 5}", 10**6),
        ("{max_steps: 5}", None),
        ("7", None),
        ("{max_steps: null, batch_tokens: 5}", None),
    ],
)
def test_tokens_of_the_run_are_told_where_the_recipe_says_them(tmp_path: Path, train: str, planned: int | None) -> None:
    assert read_data_section(recipe(tmp_path, f"data: {{path: p}}\ntrain: {train}"))[1] == planned


def test_a_recipe_that_streams_needs_a_shard_set(tmp_path: Path) -> None:
    path = recipe(tmp_path, "data: {path: spool, mode: stream, raw: {dolma: d, tokenizer: t}}")
    with pytest.raises(DataError, match=re.escape("streams raw files; name a shard set (OUT)")):
        read_data_section(path)
    assert read_data_section(path, shards=tmp_path)[0].mode == "prepared"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is no recipe: it has no section `data`"),
        ("data: 3", "is no recipe: it has no section `data`"),
        ("{", "cannot be read as a recipe: while parsing"),
        ("data: {path: p, seq_len: x, sed: 1}", "data.seq_len: Input should be a valid integer\n  data.sed: there"),
        ("data: {path: p, sed: 1}", "data.sed: there is no such key (nearest: 'seed')"),
        (
            "data: {path: p, stages: [{mixture: strategy_1, token: 5}]}",
            "data.stages.0.token: there is no such key (nearest: 'tokens')",
        ),
        ("{data: {path: p}, train: {token_budget: .inf}}", "recipe.yaml: train.token_budget is inf; give a positive"),
        ("{data: {path: p}, train: {max_steps: x, batch_tokens: 5}}", "train.max_steps is 'x'; give a positive number"),
        ("{data: {path: p}, train: {max_steps: -1}}", "train.max_steps is -1; give a positive number"),
        ("data: {path: p, mixture: strategy_9}", "data.mixture: unknown mixture 'strategy_9' (nearest: 'strategy_"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_data_section(recipe(tmp_path, text))
    with pytest.raises(DataError, match="cannot be read as a recipe: .*No such file"):
        read_data_section(tmp_path / "none.yaml")
