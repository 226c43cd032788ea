"""From a YAML file and `--set a.b=c` to a Recipe, or one RecipeError that lists every problem.

1. Read the file as YAML (`data_pipeline.recipe_file` says of which kind), a key given twice refused.
2. Lay its model section over one that comes from elsewhere, such as an imported folder, if there is one.
3. Lay the overrides over it all; their values are YAML too.
4. Fill in `name`, find the DeepSpeed JSON.
5. Check everything at once, and say what is wrong in the user's words: dotted key, place, nearest valid key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from data_pipeline.recipe_file import parse_yaml
from moepp_ds.config.errors import RecipeError, nearest
from moepp_ds.config.recipe import Recipe


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, model: Mapping[str, Any] | None = None
) -> Recipe:
    """Read the recipe at `path` and lay `overrides` (each "a.b=value") over it.

    model: a model section from elsewhere, as plain values; what the file and the overrides say of the model is laid
    over it, key by key, so a recipe for given weights need not repeat their sizes.

    The DeepSpeed JSON is looked for from the working folder, then from each folder above the recipe; the
    recipe returned holds its absolute path. `data.path` is left as it is, relative to the working folder.

    Raises RecipeError that lists every problem found.
    """
    file = Path(path)
    raw = _read(file)
    if model is not None and isinstance(raw.get("model") or {}, dict):
        raw["model"] = _laid_over(model, raw.get("model") or {})
    origins = lay_overrides(raw, overrides)
    raw.setdefault("name", file.stem)
    if isinstance(raw.get("deepspeed"), str) and raw["deepspeed"]:
        raw["deepspeed"] = str(_find(raw["deepspeed"], file))
    return check_recipe(raw, origins, place=str(file))


def lay_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Lay "a.b=value" overrides over `raw`, which changes; the last one holds. Returns who said each dotted key."""
    origins: dict[str, str] = {}
    for override in overrides:
        dotted, value = _parse_override(override)
        _lay_over(raw, dotted, value, override)
        origins[dotted] = f"--set {override}"
    return origins


def check_recipe(raw: Mapping[str, Any], origins: Mapping[str, str], *, place: str) -> Recipe:
    """Make a recipe of plain values, or raise RecipeError that lists every problem in the words of `place`."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [line for problem in error.errors(include_url=False) for line in _describe(problem, origins)]
    heading = f"{place}: {len(problems)} problems" if len(problems) > 1 else f"{place}:"
    raise RecipeError("\n  ".join([heading, *problems]))


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        meant = nearest(file.name, near)
        hint = f"; did you mean {file.parent / meant}?" if meant else ""
        raise RecipeError(f"{file}: there is no such recipe{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read as a recipe: {error}") from None
    try:
        raw = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: is not valid YAML: {_flat(error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{file}: a recipe is a mapping of sections (model, data, train, ...), not {_show(raw)}"
        )
    return raw


def _parse_override(override: str) -> tuple[str, Any]:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise RecipeError(f"--set {override}: write it as section.key=value, for example train.max_steps=100")
    try:
        return dotted, parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {_flat(error)}") from None


def _lay_over(raw: dict[str, Any], dotted: str, value: Any, override: str) -> None:
    *sections, key = dotted.split(".")
    here = raw
    for depth, section in enumerate(sections):
        below = here[section] = {} if here.get(section) is None else here[section]  # null is a section not there
        if not isinstance(below, dict):
            taken = ".".join(sections[: depth + 1])
            raise RecipeError(
                f"--set {override}: {taken} is the value {_show(below)}, so nothing can be set below it"
            )
        here = below
    here[key] = value


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `below` with every key of `above`; where both hold a section, the same inside it."""
    merged = deepcopy(dict(below))
    for key, value in above.items():
        here = merged.get(key)
        merged[key] = _laid_over(here, value) if isinstance(here, Mapping) and isinstance(value, Mapping) else value
    return merged


def _find(name: str, recipe: Path) -> Path:
    """Find a file that a recipe names: from the working folder, else the nearest folder above the recipe."""
    try:
        wanted = Path(name).expanduser()
    except RuntimeError as error:  # no such user
        raise RecipeError(f"{recipe}: deepspeed: {name}: {error}") from None
    folders = [] if wanted.is_absolute() else [Path.cwd(), *recipe.resolve().parents]
    tried = [wanted] if wanted.is_absolute() else list(dict.fromkeys(folder / wanted for folder in folders))
    for candidate in tried:
        if os.path.isfile(candidate):  # False, unlike Path.is_file, for a name that is too long
            return candidate.resolve()
    looked = "\n  ".join(str(candidate) for candidate in tried)
    raise RecipeError(f"{recipe}: deepspeed: {name} was not found; tried, in this order:\n  {looked}")


def _describe(problem: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Put one of pydantic's errors into lines: dotted key, what is wrong, where it was said.

    It is one line, but for a section that finds several contradictions in itself and raises them together.
    """
    loc = [str(part) for part in problem["loc"]]
    dotted = ".".join(loc)
    unknown = problem["type"] == "extra_forbidden"  # then an override below it is what brought it in
    said = next(
        (
            origins[key]
            for key in origins
            if dotted == key or dotted.startswith(f"{key}.") or unknown and key.startswith(f"{dotted}.")
        ),
        None,
    )
    place = f" (from {said})" if said else ""
    if unknown:
        return [f"{dotted}: unknown key{_suggest(loc)}{place}"]
    if problem["type"] == "missing":
        return [f"{dotted}: is required and not given"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return [f"{dotted}: {line}{place}" if dotted else f"{line}{place}" for line in message.split("\n")]
    return [f"{dotted}: {_show(problem['input'])}: {message[0].lower()}{message[1:]}{place}"]


def _suggest(loc: Sequence[str]) -> str:
    """Name the key that was probably meant, in this section or else anywhere, or list the section."""
    keys = dict(_keys(Recipe))
    section = ".".join(part for part in loc[:-1] if not part.isdigit())  # data.stages.0 is a section data.stages
    inside = [key for key, parent in keys.items() if parent == section]
    names = [key.rpartition(".")[2] for key in inside]
    near = nearest(loc[-1], names)
    if near:
        return f"; did you mean {'.'.join([*loc[:-1], near])}?"
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    far = nearest(loc[-1], elsewhere, least=0.8)
    if far:
        return f"; did you mean {elsewhere[far]}?"
    return f"; valid here: {', '.join(names)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every dotted key of the recipe with the dotted name of the section that holds it."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", prefix.rstrip(".")
        kinds = (field.annotation, *get_args(field.annotation))  # a section, or a section or null, or a list of them
        for kind in (*kinds, *(inner for kind in kinds for inner in get_args(kind))):
            if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
