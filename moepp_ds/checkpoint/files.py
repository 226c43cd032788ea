"""A checkpoint's folder and its index: complete or absent, found by name, refused where it was changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from data_pipeline.atomic import TEMPORARY, sync_folder, write_atomically
from moepp_ds.checkpoint.chunks import ANOTHER, CHUNK_BYTES, count_chunks, digest, size_problem, unreadable
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

FORMAT = 2

_NAME = re.compile(r"step-([1-9][0-9]{0,9})?[0-9]{8}")
"""Just the names that `folder_name` gives: one for each step."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two, of every parameter."""

KINDS = ("weight", *MOMENTS)
"""What is stored of a parameter: its fp32 weight and its moments."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)  # which a model does not hand on to those inside it


class _FileNote(_Strict):
    """What the index says of a file, as `chunks.write_chunks` has it."""

    bytes: int = Field(ge=0)
    header: int = Field(ge=8, le=CHUNK_BYTES)
    chunks: list[str]

    @model_validator(mode="after")
    def _has_every_checksum(self) -> _FileNote:
        if self.header > self.bytes or len(self.chunks) != count_chunks(self.header, self.bytes):
            raise ValueError(f"{len(self.chunks)} checksums are not those of {self.bytes} bytes")
        return self


class _Routing(_Strict):
    """What routing remembers, as `controller.RoutingState` has it."""

    bias_LE: list[list[FiniteFloat]] | None
    share_LE: list[list[FiniteFloat]] | None


class _Data(_Strict):
    """Where a loader was."""

    order: dict[str, Any] = {}


class _Index(_Strict):
    """What every index holds, and what many do; the rest belongs to the run."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    tokens: int = Field(default=0, ge=0)
    data: _Data | None = None
    routing: _Routing | None = None
    kinds: list[str]
    versions: dict[str, str] | None = None
    origin: dict[str, Any] | None = None
    parameters: dict[str, list[Annotated[int, Field(ge=1)]]]
    fingerprints: dict[str, list[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]]
    files: dict[Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")], _FileNote]  # no path leads out of the folder


def folder_name(step: int) -> str:
    """The folder of the checkpoint of update `step`."""
    return f"step-{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is until it is published."""
    return root / f".{folder_name(step)}.partial"


def is_named_by_step(folder: Path) -> bool:
    """Whether a folder has a name of `folder_name`."""
    return _NAME.fullmatch(folder.name) is not None


def step_of(folder: Path) -> int:
    """The update whose checkpoint is in a folder of `folder_name`."""
    return int(folder.name.removeprefix("step-"))


def write_index(folder: Path, content: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write index.json with the notes of all ranks' files; with it the folder is a complete checkpoint.

    The files must be visible from here, in their sizes: ranks that do not share the folder are found out. The index
    must be one that can be read, too: a checkpoint that cannot is never published, and makes no older one superfluous.
    """
    for name, note in files.items():
        problem = size_problem(folder / name, note["bytes"])
        if problem:
            raise CheckpointError(f"{problem}, as rank 0 sees it; the run folder must be one that all nodes share")
    text = _index_text({"format": FORMAT, **content, "files": files})
    write_atomically(folder / "index.json", text.encode())
    read_index(folder)


def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name, and then move `latest`. If that fails, all is as it was before."""
    sync_folder(final.parent.parent)  # which has the name of the folder that all checkpoints are in
    latest = final.parent / "latest"
    before = latest.read_bytes() if latest.exists() else None
    # A run that was resumed from an earlier checkpoint comes by here again.
    replaced = hide(final) if final.exists() else None
    try:
        partial.rename(final)
        sync_folder(final.parent)
        write_atomically(latest, f"{final.name}\n".encode())
    except OSError:
        with suppress(OSError):  # written, perhaps, and only not yet safe from a power cut
            if before is None:
                latest.unlink(missing_ok=True)
            elif latest.read_bytes() != before:
                write_atomically(latest, before)
        if not partial.exists():
            final.rename(partial)
        if replaced is not None:
            replaced.rename(final)
        raise


def name_latest(folder: Path) -> bool:
    """Have `latest` name a checkpoint that is there; False if it did already. Raises OSError, and it stays as it was.

    For a run that goes on from an earlier one: what came later is left behind from now on, not from its next save on.
    """
    latest = folder.parent / "latest"
    with suppress(CheckpointError):  # what cannot be read may still be replaced
        if _named_by(latest) == folder:
            return False
    write_atomically(latest, f"{folder.name}\n".encode())
    return True


def complete_ones(root: Path) -> dict[int, Path]:
    """The complete checkpoints under `root`, by their steps."""
    folders = [folder for folder in root.glob("step-*") if is_named_by_step(folder)]
    return {step_of(folder): folder for folder in folders if _has_index(folder)}


def _has_index(folder: Path) -> bool:
    """Whether a folder has an index, readable or not: one that cannot be read is for `read_index` to name."""
    try:
        return (folder / "index.json").is_file()
    except OSError:
        return True


def leftovers(root: Path) -> list[Path]:
    """What is left of saves that never ended, and of deletions."""
    return sorted([*root.glob(".step-*"), *root.glob(f"{TEMPORARY}*")])


def hide(folder: Path) -> Path:
    """Hide a checkpoint under a name that is free, for deletion: a half-deleted one is never seen as a checkpoint."""
    names = (folder.with_name(f".{folder.name}.old-{number}") for number in count())
    return folder.rename(next(path for path in names if not path.exists()))


def find_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, as `latest` names it; None if there is none."""
    latest = root / "latest"
    if not latest.exists():
        return None
    named = _named_by(latest)
    if named is None or not _has_index(named):
        said = named.name if named else "no folder of a step"
        raise DamagedCheckpoint(f"{latest} names {said}, which is no checkpoint; name one by its folder")
    return named


def _named_by(latest: Path) -> Path | None:
    """The folder that a file `latest` names, whether it is there or not; None if it names none.

    Raises CheckpointError where it cannot be read now: it may name an earlier one than there are.
    """
    try:
        name = latest.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        said = f"{latest} cannot be read: {error}; repair it, or name a checkpoint by its folder"
        raise CheckpointError(said) from error
    return latest.parent / name if _NAME.fullmatch(name) else None


def candidates(root: Path) -> list[Path]:
    """The complete checkpoints under `root` that a run may go on from, the newest first.

    Those are the one that `latest` names and, in case it is damaged or gone, the ones before it; later ones are of a
    part of the run that was left behind. Where `latest` is missing or names nothing, all of them, by their steps.
    """
    complete = complete_ones(root)
    newest = _named_by(root / "latest")
    last = step_of(newest) if newest else max(complete, default=0)
    return [complete[step] for step in sorted(complete, reverse=True) if step <= last]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint, its checksum included; refuses other folders and formats, and a changed index."""
    path = folder / "index.json"
    if not _has_index(folder):
        raise DamagedCheckpoint(f"{folder} is no checkpoint: it holds no index.json")
    try:
        text = path.read_text(encoding="utf-8")
        index = json.loads(text)
        found = index["format"]
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}); {ANOTHER}") from error
    if found != FORMAT:
        raise DamagedCheckpoint(
            f"{path} has format {found}, this version reads {FORMAT}; use the version that wrote it"
        )
    if text != _index_text(index):
        raise DamagedCheckpoint(f"{path} does not match its checksum; {ANOTHER}")
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedCheckpoint(f"{path} is no index of a checkpoint: {place}: {first['msg']}; {ANOTHER}") from None
    return index


def stored_kinds(index: Mapping[str, Any]) -> tuple[str, ...]:
    """What a checkpoint holds of every parameter: all of KINDS, or weights alone."""
    kinds = tuple(index["kinds"])
    if kinds not in (KINDS, KINDS[:1]):
        raise DamagedCheckpoint(f"a checkpoint holds {', '.join(KINDS)}, or weight alone, not '{', '.join(kinds)}'")
    return kinds


def _index_text(content: Mapping[str, Any]) -> str:
    """The index as it is stored: exactly one text for a content, with the checksum of the rest at its end."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    checksum = digest(json.dumps(rest, indent=1).encode())
    return json.dumps({**rest, "checksum": checksum}, indent=1) + "\n"


def shape_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The parameters that two models do not have in common, a line for each of the first 20."""
    lines = [
        f"  {name}: checkpoint {stored.get(name, 'lacks it')}, model {wanted.get(name, 'lacks it')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    return "\n".join(lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else []))
