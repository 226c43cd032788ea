"""What all sections of a recipe share: strict, frozen, and closed to keys they do not know.

Strict means that a number is a number: "8" is refused where 8 is meant, and true is no 1.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe; the sentence under each field is its description."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
