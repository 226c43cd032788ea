"""The text every Python installation carries: the standard library's own source files and pydoc's topics.

A source file is taken apart so that no passage comes out twice: docstrings and long comments leave the code.

    Module    one source file: its docstring, its comments as prose, its definitions, and its bare code
    Topic     one of pydoc's topics ("The standard type hierarchy"), a chapter of the language reference
"""

from __future__ import annotations

import ast
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics as pydoc_topics

EXCLUDED = frozenset(
    # not the standard library, not on every installation, or tables of numbers rather than text
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "_bundled", "lib-dynload")
    + ("__pycache__", "encodings", "pydoc_data")
)
_MIN_COMMENT_LINES = 3


@dataclass(frozen=True, slots=True)
class Definition:
    """A class, function or method with its source."""

    name: str
    """Qualified inside its module: `Message.get_payload`."""
    signature: str
    """The name with its arguments; for a class, with its bases."""
    is_class: bool
    is_nested: bool
    """A member of a class, so that its source is also part of that class's."""
    docstring: str
    """Dedented; empty when there is none."""
    source: str


@dataclass(frozen=True, slots=True)
class Module:
    """One source file of the standard library."""

    name: str
    """Dotted, such as `email.message`."""
    docstring: str
    comments: tuple[str, ...]
    """Comments of three and more lines, without their marks, in file order."""
    definitions: tuple[Definition, ...]
    code: str
    """The file without its docstrings and without those comments."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One of pydoc's topics."""

    name: str
    text: str


def library_folder() -> Path:
    """Where this interpreter's standard library lies, also from inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def module_files(root: Path) -> list[tuple[str, Path]]:
    """(dotted name, path) of every source file below `root` that is text of its own, sorted by name."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED and name.isidentifier()]
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and stem.isidentifier() and not stem.startswith("_sysconfigdata"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(found)


def topics() -> list[Topic]:
    """pydoc's topics, sorted by name."""
    return [Topic(name=name, text=text.strip()) for name, text in sorted(pydoc_topics.topics.items())]


def read_module(name: str, path: Path) -> Module | None:
    """Take one source file apart; None for one that is no valid source, which some distributions ship."""
    try:
        with tokenize.open(path) as file:  # honours the coding line
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None
    lines = source.split("\n")
    comments = list(_comment_blocks(lines))
    removed = {i for start, end in (*comments, *_docstring_lines(tree, lines)) for i in range(start, end)}
    return Module(
        name=name,
        docstring=ast.get_docstring(tree) or "",
        comments=tuple(_comment_text(lines[start:end]) for start, end in comments),
        definitions=tuple(_definitions(tree, lines)),
        code="\n".join(line for i, line in enumerate(lines) if i not in removed).strip("\n") + "\n",
    )


def _comment_blocks(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Half-open line ranges of full-line comments that are long enough to be prose."""
    start = 0
    for i, line in enumerate((*lines, "")):
        if not line.lstrip().startswith("#"):
            if i - start >= _MIN_COMMENT_LINES:
                yield start, i
            start = i + 1


def _comment_text(lines: list[str]) -> str:
    stripped = [line.strip().lstrip("#").removeprefix(" ").rstrip() for line in lines]
    return "\n".join("" if set(line) <= set("-=*~ ") else line for line in stripped).strip("\n")


def _docstring_lines(tree: ast.Module, lines: list[str]) -> Iterator[tuple[int, int]]:
    """Half-open line ranges of docstrings that have their lines to themselves."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                first = node.body[0]
                if not lines[first.lineno - 1].encode()[: first.col_offset].strip():
                    yield first.lineno - 1, first.end_lineno or first.lineno


def _definitions(tree: ast.Module | ast.ClassDef, lines: list[str], prefix: str = "") -> Iterator[Definition]:
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        start, end = node.lineno - 1, node.end_lineno
        inside = node.bases if isinstance(node, ast.ClassDef) else [node.args]
        yield Definition(
            name=prefix + node.name,
            signature=f"{prefix}{node.name}({', '.join(map(ast.unparse, inside))})",
            is_class=isinstance(node, ast.ClassDef),
            is_nested=bool(prefix),
            docstring=ast.get_docstring(node) or "",
            source="\n".join(lines[start:end]) + "\n",
        )
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, lines, f"{prefix}{node.name}.")
