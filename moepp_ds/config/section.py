"""What all sections of a recipe share: strict, frozen, and closed to keys they do not know.

Strict means that a number is a number: "8" is refused where 8 is meant, and true is no 1.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    """Turn 1e11 into 100000000000: token counts are written that way, and YAML reads them as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


TokenCount = Annotated[int, BeforeValidator(_whole), Field(gt=0)]


class Section(BaseModel):
    """A part of a recipe; the sentence under each field is its description."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
