"""A recipe that a checkpoint holds: under overrides, and key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from moepp_ds.config.errors import RecipeError
from moepp_ds.config.loading import check_recipe, lay_overrides
from moepp_ds.config.moe import SEAT_KEYS
from moepp_ds.config.recipe import Recipe


def stored_recipe(content: Any, overrides: Sequence[str] = (), *, place: str) -> Recipe:
    """The recipe whose `model_dump(mode="json")` is `content`, with `overrides` (each "a.b=value") laid over it.

    Unlike `load_recipe` it looks for no DeepSpeed JSON: a checkpoint is read on machines that do not train.
    place: what messages call it. Raises RecipeError that lists every problem found.
    """
    if not isinstance(content, dict):
        raise RecipeError(f"{place}: it is {content!r} and no mapping of sections (model, data, train, ...)")
    raw = deepcopy(content)
    moe = raw.get("model", {}).get("moe", {}) if isinstance(raw.get("model"), dict) else {}
    if isinstance(moe, dict) and moe.get("dropless"):  # recipes of 2026-11 kept the seats they did not use
        raw["model"]["moe"] = {key: value for key, value in moe.items() if key not in SEAT_KEYS}
    return check_recipe(raw, lay_overrides(raw, overrides), place=place)


def dotted(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, `a.b`."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat.update(dotted(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value})
    return flat
