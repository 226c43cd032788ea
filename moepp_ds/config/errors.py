"""The one error a user of recipes meets, and the search for the name they probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RecipeError(ValueError):
    """A recipe, an override or a DeepSpeed JSON that cannot be run; the message says what to change."""


def nearest(name: str, valid: Iterable[str], *, least: float = 0.6) -> str | None:
    """Return the valid name most like `name`, or None when none is at least `least` alike (0 to 1)."""
    found = get_close_matches(name, list(valid), n=1, cutoff=least)
    return found[0] if found else None
