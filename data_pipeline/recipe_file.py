"""Recipes as files: the YAML they are written in, and the data section of one, without the rest of the program.

Recipes are YAML with numbers as YAML 1.2 writes them: 5e-4 and 1e11 are numbers; 010 and 1:30, which YAML 1.1
takes for 8 and 90, are none. A key given twice is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from data_pipeline.config import DataConfig, MixtureStage, RawInputs
from data_pipeline.document import DataError
from data_pipeline.weights import nearest


class _RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader, which makes plain values only, with the changes above."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} is given a second time", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1: 5e-4 and 1e11 lack the dot that makes them numbers, 010 is octal, 1:30 is sexagesimal
# and 2024-01-01 a date. Plain decimal numbers take the place of all these.
_DECIMAL = r"(?:0|[1-9][0-9_]*)"
_NUMBERS = {
    "tag:yaml.org,2002:int": rf"^[-+]?{_DECIMAL}$",
    "tag:yaml.org,2002:float": (
        rf"^(?:[-+]?(?:{_DECIMAL}(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (*_NUMBERS, "tag:yaml.org,2002:timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _RecipeLoader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The plain values that a recipe's text spells; yaml.YAMLError when it spells none."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506  a SafeLoader by inheritance
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def read_data_section(path: Path, *, shards: Path | None = None) -> tuple[DataConfig, int | None]:
    """The `data` section of the recipe at `path` over prepared shards, and the tokens of its run if it says them.

    shards: takes the place of data.path. Raises DataError that lists every problem of the section.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from None
    data = raw.get("data") if isinstance(raw, dict) else None
    if not isinstance(data, dict):
        raise DataError(f"{path} is no recipe: it has no section `data`")
    if shards is not None:
        data = {**data, "path": str(shards), "mode": "prepared", "raw": None}
    config = checked_data(data, place=str(path))
    if config.mode == "stream":
        raise DataError(f"{path} streams raw files; name a shard set (OUT) to look at its mixture over prepared shards")
    try:
        return config, _planned_tokens(raw.get("train"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def checked_data(data: Mapping[str, Any], *, place: str) -> DataConfig:
    """`data` as a data section; DataError that lists every problem of it. place: whose it is, for the message."""
    try:
        return DataConfig.model_validate(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(['data', *map(str, one['loc'])])}: {_said(one)}" for one in error.errors(include_url=False)
        ]
        raise DataError("\n  ".join([f"{place}:", *problems])) from None


def _said(problem: ErrorDetails) -> str:
    """What is wrong with a key; of one that is unknown, also which was probably meant."""
    if problem["type"] != "extra_forbidden":
        return problem["msg"].removeprefix("Value error, ")
    known = {key for section in (DataConfig, MixtureStage, RawInputs) for key in section.model_fields}
    return f"there is no such key{nearest(str(problem['loc'][-1]), known)}"


def _planned_tokens(train: Any) -> int | None:
    """The token budget, or the tokens of the updates, whichever ends the run first; None when it says neither."""
    if not isinstance(train, dict):
        return None
    numbers = {key: train[key] for key in ("token_budget", "max_steps", "batch_tokens") if train.get(key) is not None}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise DataError(f"train.{key} is {number!r}; give a positive number")
    ends = [int(numbers["token_budget"])] if "token_budget" in numbers else []
    if {"max_steps", "batch_tokens"} <= numbers.keys():
        ends.append(int(numbers["max_steps"] * numbers["batch_tokens"]))
    return min(ends, default=None)
