"""Which of our parameters a tensor of DeepSpeed's is.

1. A file of names, where there is one, says what a tensor is called here: regex of the whole name -> a name of ours or
   of the released model, or null to leave it out.
2. What DeepSpeed's layer of experts puts into names is taken out: `.deepspeed_moe.experts.deepspeed_experts.3.` is
   expert 3, `.deepspeed_moe.gate.` the router.
3. Names are then ours (`blocks.0.attention.q_proj.weight`), the released model's (`model.layers.0.self_attn...`), or
   the latter's names of experts and router below our `blocks.0.moe.`; an expert's gate and value may be two matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from data_pipeline.recipe_file import parse_yaml
from moepp_ds.checkpoint.shapes import global_shapes
from moepp_ds.config import ModelConfig, RecipeError
from moepp_ds.config.errors import nearest
from moepp_ds.ds_native.partitions import Shape
from moepp_ds.hf_names import Part, parts, unused_tensors

LINES = 8
"""Problems of a kind that an error lists one by one."""

_WRAPPERS = (
    (".deepspeed_moe.experts.deepspeed_experts.", ".experts.experts."),
    (".deepspeed_moe.gate.", ".gate."),
)
_RELEASED_MOE, _OUR_MOE = re.compile(r"^model\.layers\.(\d+)\.mlp\.moe\."), r"blocks.\1.moe."
_JOINT = re.compile(r"^(.*\.experts\.experts\.\d+\.)up_proj\.weight$")

Rules = Mapping[str, str | None]


@dataclass(frozen=True)
class Sources:
    """Where our parameters come from. parts: every element of every parameter once. native: their tensors' own names.

    left_out: tensors that the file of names leaves out.
    """

    parts: list[Part]
    native: Mapping[str, str]
    left_out: list[str]


def read_rules(file: Path) -> Rules:
    """The rules of a file of names, in their order; RecipeError if it holds anything else."""
    try:
        rules = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as a file of names: {' '.join(str(error).split())}") from None
    if not isinstance(rules, dict) or not rules:
        raise RecipeError(f"{file} is no file of names; write lines such as  h\\.(\\d+)\\.ln: blocks.\\1.ffn_norm")
    for pattern, name in rules.items():
        try:
            if not isinstance(pattern, str) or not isinstance(name, str | None):
                raise re.error("both must be text, or the name null")
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"{file}: {pattern}: {name}: {error}; write REGEX: NAME, or REGEX: null") from None
    return rules


def find_sources(model: ModelConfig, shapes: Mapping[str, Shape], rules: Rules | None = None) -> Sources:
    """Match what a checkpoint holds, by its names, to what the model has.

    Raises RecipeError that lists every tensor that is missing, left over, or of another shape.
    """
    native, left_out = _translated(shapes, rules or {})
    left_out += [native.pop(name) for name in unused_tensors(model, "released") if name in native]
    chosen = list(_chosen(model, native))
    needed = {name: shape for part in chosen for name, shape in part.tensors.items()}
    problems = [
        [
            f"of another shape: {_called(own, name)} is {list(shapes[own])}, the model's is {list(needed[name])}"
            for name, own in native.items()
            if name in needed and shapes[own] != tuple(needed[name])
        ],
        [f"missing: {name} {list(shape)}" for name, shape in needed.items() if name not in native],
        [f"extra: {_called(own, name)} {list(shapes[own])}" for name, own in native.items() if name not in needed],
    ]
    if any(problems):
        said = "the checkpoint does not hold the recipe's model; change its model section, or say what is called how"
        lines = [line for found in problems for line in _first(found)]
        raise RecipeError("\n  ".join([f"{said} (--names FILE):", *lines]))
    return Sources(chosen, native, left_out)


def _translated(shapes: Mapping[str, Shape], rules: Rules) -> tuple[dict[str, str], list[str]]:
    """The checkpoint's names by what they mean here, and those that are left out."""
    native: dict[str, str] = {}
    left_out, used = [], set()
    for name in shapes:
        here: str | None = name
        for pattern, target in rules.items():
            if found := re.fullmatch(pattern, name):
                used.add(pattern)
                here = None if target is None else _expanded(found, pattern, target)
                break
        if here is None:
            left_out.append(name)
            continue
        for theirs, ours in _WRAPPERS:
            here = here.replace(theirs, ours)
        if here in native:
            raise RecipeError(f"{native[here]} and {name} would both be {here}; change the file of names")
        native[here] = name
    for pattern in rules:
        if pattern not in used:
            one = nearest(pattern, shapes, least=0.3) or next(iter(shapes))
            raise RecipeError(f"--names: {pattern} fits no name of the checkpoint; one of them is {one}")
    return native, left_out


def _expanded(found: re.Match[str], pattern: str, target: str) -> str:
    try:
        return found.expand(target)
    except (re.error, IndexError) as error:
        raise RecipeError(f"--names: {pattern}: {target}: {error}; \\1 is what the first (...) fits") from None


def _chosen(model: ModelConfig, native: Mapping[str, str]) -> Iterator[Part]:
    """The parts of our parameters, each in the spelling that is there; in the released one where none is."""
    for name, shape in global_shapes(model).items():
        if name in native:
            yield Part(name, 0, tuple(shape), {name: tuple(shape)})
    for part in parts(model):
        if part.parameter not in native:
            yield next((way for way in _spellings(part) if way.tensors.keys() <= native.keys()), part)


def _spellings(part: Part) -> Iterator[Part]:
    """The part under its released name, and under the others that it may have."""
    for name in part.tensors:
        if joint := _JOINT.match(name):
            (columns, rows) = part.tensors[name]
            halves = {f"{joint[1]}{half}_proj.weight": (columns // 2, rows) for half in ("gate", "up")}
            yield from _below_either(replace(part, tensors=halves, form="halves"))
    yield from _below_either(part)


def _below_either(part: Part) -> Iterator[Part]:
    yield part
    yield replace(part, tensors={_RELEASED_MOE.sub(_OUR_MOE, name): shape for name, shape in part.tensors.items()})


def _first(lines: list[str]) -> list[str]:
    return lines[:LINES] + ([f"and {len(lines) - LINES} more"] if len(lines) > LINES else [])


def _called(native: str, here: str) -> str:
    return native if native == here else f"{native} (as {here})"
