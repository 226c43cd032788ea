"""Tensor names end in their axes, and every axis is in the legend."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "moepp_ds"
MODEL_FILES = (
    "products router dispatch experts losses statistics reference attention moe_layer controller model"
    " gradient_ratio expert_parallel".split()
)


def legend(source: str) -> set[str]:
    """The single capitals of the paragraph of a module's docstring that begins with "Axis letters"."""
    paragraphs = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    found = [paragraph for paragraph in paragraphs if paragraph.startswith("Axis letters")]
    return set(re.findall(r"\b[A-Z]\b", " ".join(found)))


def axes(source: str) -> dict[str, str]:
    """Names in the code, of whatever is assigned, passed or read, with the axes at their end."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    # A lower-case letter comes before the suffix: MAX_EXPERT_GROUP is a constant and no tensor.
    matches = {name: re.fullmatch(r"_?[a-z]\w*?_([A-Z0-9]*[A-Z][A-Z0-9]*)", name) for name in names}
    return {name: match[1] for name, match in matches.items() if match}


def strangers(source: str, known: set[str]) -> dict[str, set[str]]:
    """Names with axes that are neither known nor defined by the module, and those axes."""
    known = known | legend(source) | set("0123456789")
    return {name: set(suffix) - known for name, suffix in axes(source).items() if not set(suffix) <= known}


def test_the_legend_holds_the_letters_of_the_design() -> None:
    assert set("TDFEKNRCVBSHA") <= legend((PACKAGE / "products.py").read_text())


@pytest.mark.parametrize("module", MODEL_FILES)
def test_every_axis_is_in_the_legend(module: str) -> None:
    common = legend((PACKAGE / "products.py").read_text())
    source = (PACKAGE / f"{module}.py").read_text()
    assert axes(source), "no name with axes was found"
    assert strangers(source, common) == {}


def test_a_stranger_is_found() -> None:
    source = '"""Axis letters: Z keys."""\nMAX_SIZE = 1\ndef f(x_TD, y_TZ, z_T2): self.w_TY = a.mask_SZ\n'
    assert axes(source) == {"x_TD": "TD", "y_TZ": "TZ", "z_T2": "T2", "w_TY": "TY", "mask_SZ": "SZ"}
    assert strangers(source, set("TDS")) == {"w_TY": {"Y"}}
