"""Options --json FILE and --plot FILE of commands that measure, refused beforehand where they cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from moepp_ds.config import RecipeError

Json = Annotated[Path | None, typer.Option("--json", help="write the result there, too, for scripts")]
Plot = Annotated[Path | None, typer.Option("--plot", help="draw the result there, too: .png, .svg or .pdf")]

PICTURES = (".png", ".svg", ".pdf")


def check_place(file: Path | None, option: str = "--json") -> None:
    """Refuse a file that cannot be made, before the work whose result it is for. Raises RecipeError."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise RecipeError(f"{option} {file} cannot be written: name a file in a folder that exists")
    if file is not None and option == "--plot" and file.suffix not in PICTURES:
        raise RecipeError(f"--plot {file} is no picture that can be drawn: name a file that ends in .png, .svg or .pdf")


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write a result, if a file for it was named. Raises RecipeError."""
    if file is None:
        return
    try:
        file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    except OSError as error:
        raise RecipeError(f"--json {file} cannot be written: {error.strerror}; name another file") from None
