"""What tests do to checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from moepp_ds.checkpoint.files import read_index


def set_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index; its checksum is right again."""
    index = read_index(folder)
    change(index)
    content = {key: value for key, value in index.items() if key != "checksum"}
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(content, indent=1).encode())
    (folder / "index.json").write_text(json.dumps({**content, "checksum": checksum}, indent=1) + "\n")


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))
