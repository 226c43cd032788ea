"""Which checkpoints are in a folder, and which one is meant: one search for `--resume` and for every command.

No torch is needed to look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

from moepp_ds.checkpoint.chunks import size_problem
from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint
from moepp_ds.checkpoint.files import candidates, is_named_by_step, read_index, step_of, stored_kinds
from moepp_ds.config import RecipeError

WORDS = ("auto", "none")
"""What --resume takes beside a folder."""


@dataclass(frozen=True)
class Choices:
    """What a run goes on from, or a command looks at.

    folders: the best first, then those that would do if it is damaged; empty for a new run. passed_over: newer ones
    that are not among them, and why, a line each.
    """

    folders: list[Path] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Glance:
    """A checkpoint's folder as its index and the sizes of its files show it.

    bytes: of all its files, as the index has them; those that are there, where it has none. tokens: None likewise.
    problem: what is wrong, None where nothing is seen to be; only reading every byte proves a checkpoint whole.
    """

    folder: Path
    step: int
    tokens: int | None
    bytes: int
    problem: str | None


def choices_under(root: Path) -> Choices:
    """The checkpoints in the folder `root` that a run may go on from; see `files.candidates`."""
    folders = candidates(root)
    return Choices(folders, _passed_over(root, folders))


def find_choices(path: Path) -> Choices:
    """The checkpoint that `path` is, or those of a run's folder or of its checkpoints' folder.

    Raises CheckpointError where there is none.
    """
    if (path / "index.json").exists():
        return Choices([path])
    problems: list[str] = []
    for root in (path, path / "checkpoints"):
        found = choices_under(root)
        if found.folders:
            return found
        problems += found.passed_over
    if problems:
        raise DamagedCheckpoint("\n  ".join([f"{path} holds no checkpoint that is whole:", *problems]))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint's folder, or a run's such as runs/NAME")
    raise CheckpointError(
        f"{path} is no checkpoint: it holds no index.json, and neither it nor its folder checkpoints/ holds a step-*; "
        "name a checkpoint's folder, or a run's such as runs/NAME"
    )


def check_resume_word(path: Path, resume: str) -> None:
    """Refuse a --resume for the run folder `path` that names nothing, before any rank is started.

    Raises RecipeError for what is neither `auto` nor `none` nor the place of a checkpoint. What `auto` and `none` find
    is for the first rank to judge.
    """
    if resume in WORDS:
        return
    if Path(resume).exists():
        try:
            find_choices(Path(resume))
        except CheckpointError as error:
            raise RecipeError(f"--resume {resume}: {error}") from None
        return
    own = path / "checkpoints" / resume
    meant = get_close_matches(resume.lower(), WORDS, n=1)
    hint = f"did you mean {own if own.exists() else meant[0]}? " if own.exists() or meant else ""
    raise RecipeError(
        f"--resume {resume}: there is no such folder; {hint}give auto (the newest checkpoint of {path}), none (a new "
        f"run), or the folder of a checkpoint (`moepp checkpoint list {path}` shows them)"
    )


def step_folders(root: Path) -> list[Path]:
    """The folders under `root` that have a checkpoint's name, whole or not, the oldest first."""
    found = [path for path in root.glob("step-*") if is_named_by_step(path) and (path.is_dir() or path.is_symlink())]
    return sorted(found, key=step_of)


def root_of(place: Path) -> Path:
    """The folder of checkpoints that `place` is, or has as a run's folder; CheckpointError where there is none."""
    if step_folders(place) or (place / "latest").is_file():
        return place
    root = place / "checkpoints"
    if not root.is_dir():
        said = "holds no folder checkpoints/" if place.exists() else "does not exist"
        raise CheckpointError(f"{place} {said}; name a run's folder such as runs/NAME")
    return root


def named_by_latest(root: Path) -> Path | None:
    """The folder that the file `latest` names, whether it is there or not; None if it names none."""
    try:
        folder = root / (root / "latest").read_text(errors="replace").strip()
    except (OSError, ValueError):
        return None
    return folder if folder.parent == root and is_named_by_step(folder) else None


def glance(folder: Path) -> Glance:
    """Look at a checkpoint that has its step's name, without reading its weights."""
    try:
        index = read_index(folder)
        stored_kinds(index)
    except DamagedCheckpoint as error:
        there = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
        return Glance(folder, step_of(folder), None, sum(there), str(error))
    notes = index["files"]
    found = (size_problem(folder / name, note["bytes"]) for name, note in notes.items())
    problem = next(filter(None, found), None)
    size = (folder / "index.json").stat().st_size + sum(note["bytes"] for note in notes.values())
    return Glance(folder, index["step"], index.get("tokens", 0), size, problem)


def summarize(folder: Path) -> dict[str, Any]:
    """What the index of a checkpoint says of it, in JSON values. Raises DamagedCheckpoint."""
    index = read_index(folder)
    recipe, layout = _mapping(index.get("recipe")), _mapping(index.get("layout"))
    if layout:
        layout["expert_parallel"] = _mapping(recipe.get("parallel")).get("expert_parallel")
    sizes = {"index.json": (folder / "index.json").stat().st_size}
    sizes |= {name: note["bytes"] for name, note in sorted(index["files"].items())}
    return {
        "folder": str(folder),
        "format": index["format"],
        "step": index["step"],
        "updates": index.get("updates"),
        "tokens": index.get("tokens", 0),
        "recipe": recipe.get("name"),
        "kinds": index["kinds"],
        "parameters": len(index["parameters"]),
        "elements": sum(map(prod, index["parameters"].values())),
        "layout": layout,
        "versions": index.get("versions") or {},
        "origin": index.get("origin"),
        "bytes": sum(sizes.values()),
        "files": sizes,
    }


def _mapping(value: Any) -> dict[str, Any]:
    """What the run wrote there; nothing where that is of another type, which the index's own checks let through."""
    return dict(value) if isinstance(value, dict) else {}


def _passed_over(root: Path, folders: list[Path]) -> list[str]:
    """Why checkpoints newer than the first of `folders` are not taken, and the one that `latest` names."""
    newest = step_of(folders[0]) if folders else -1
    named = named_by_latest(root)
    lines = []
    for folder in reversed(step_folders(root)):
        if step_of(folder) <= newest:
            break
        if (folder / "index.json").is_file():
            lines.append(
                f"{folder} is later than the one that `latest` names: left behind by a run that went back, or saved "
                f"right before a crash; --resume {folder} goes on from it"
            )
        else:
            lines.append(f"{folder} holds no index.json: it was copied in part, or damaged, or its disk is missing")
    if named is not None and not named.is_dir() and not named.is_symlink():
        lines.insert(0, f"{named} is gone, which `latest` names")
    return lines
