"""The files of one checkpoint of DeepSpeed: which tag, and whether all of them are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moepp_ds.checkpoint import CheckpointError

MODEL = "mp_rank_00_model_states.pt"
_PARTITION = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_OPTIMIZER = re.compile(rf"{_PARTITION.pattern}|expp_rank_\d+_mp_rank_00_optim_states\.pt")
_TAG = re.compile(r"[\w.-]*\w[\w.-]*", re.ASCII)

_REFUSED = (
    (re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"), "ZeRO stage 3 cuts parameters up"),
    (re.compile(r".*mp_rank_(?!00)\d+_.*_states\.pt"), "a model spread by tensor parallelism"),
    (re.compile(r"layer_\d+-.*model_states\.pt"), "a model spread by pipeline parallelism"),
    (re.compile(r"expert_\d+_mp_rank_\d+_model_states\.pt"), "experts without layer numbers, of an old DeepSpeed"),
    (re.compile(r"zero"), "a universal checkpoint"),
)
"""Names that are of something else, and what."""


@dataclass(frozen=True)
class Files:
    """The files of a tag. partitions: by rank. experts: by (MoE layer, expert among all of the layer)."""

    tag: Path
    partitions: Mapping[int, Path]
    experts: Mapping[tuple[int, int], Path]

    @property
    def model(self) -> Path:
        """The state of the model, and what else there is once."""
        return self.tag / MODEL

    def check_complete(self, *, world: int, num_experts: Iterable[int]) -> None:
        """Refuse shards that are missing, and those that are left over: of another save."""
        self._compare("rank", {str(rank) for rank in range(world)}, {str(r): f for r, f in self.partitions.items()})
        experts = {f"{layer}/{expert}" for layer, count in enumerate(num_experts) for expert in range(count)}
        self._compare("layer/expert", experts, {f"{layer}/{e}": file for (layer, e), file in self.experts.items()})

    def _compare(self, what: str, meant: set[str], found: Mapping[str, Path]) -> None:
        missing = sorted(meant - found.keys(), key=_by_numbers)
        if missing:
            raise CheckpointError(
                f"{self.tag} lacks the files of {what} {listed(missing)} ({len(missing)} of {len(meant)}); copy them "
                "from the machines that wrote them"
            )
        more = [file.name for key, file in found.items() if key not in meant]
        if more:
            raise CheckpointError(
                f"{self.tag} holds {listed(more)}, which the model's file knows nothing of: two saves are mixed"
            )


def find_files(folder: Path, tag: str | None) -> Files:
    """The files of `tag` in the folder given to `save_checkpoint`, by default the one that its file `latest` names.

    folder: that one, or the folder of a tag itself. Raises CheckpointError for what is no such checkpoint.
    """
    path = _tag_folder(folder, tag)
    names = sorted(file.name for file in path.iterdir())
    for pattern, what in _REFUSED:
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found:
            raise CheckpointError(
                f"{path / found} is of {what}, which is not read; load it with DeepSpeed and save it from ZeRO 1 or 2, "
                "without model parallelism"
            )
    if MODEL not in names:
        raise CheckpointError(f"{path} is no checkpoint of DeepSpeed: it holds no {MODEL}")
    partitions: dict[int, Path] = {}
    for name in names:
        if match := _PARTITION.fullmatch(name):
            rank = int(match[1])
            if rank in partitions:
                raise CheckpointError(f"{path} holds {name} and {partitions[rank].name}: two saves are mixed")
            partitions[rank] = path / name
    experts = {(int(m[1]), int(m[2])): path / name for name in names if (m := _EXPERT.fullmatch(name))}
    unknown = [name for name in names if "optim_states" in name and not _OPTIMIZER.fullmatch(name)]
    if unknown:
        raise CheckpointError(f"{path} holds optimizer states of a kind that is not known: {listed(unknown)}")
    return Files(path, partitions, experts)


def _tag_folder(folder: Path, tag: str | None) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name the one that was given to engine.save_checkpoint")
    if tag is None and (folder / MODEL).exists():
        return folder
    latest = folder / "latest"
    if tag is None:
        tags = _tags(folder)
        if not latest.is_file():
            hint = f"name one with --tag: {listed(tags)}" if tags else "name the folder that save_checkpoint was given"
            raise CheckpointError(f"{folder} is no checkpoint of DeepSpeed: it holds no file `latest`; {hint}")
        with latest.open(encoding="utf-8", errors="replace") as opened:
            tag = opened.read(256).strip()
    if not _TAG.fullmatch(tag):
        raise CheckpointError(f"{tag[:40]!r} is no tag: it must be the plain name of a folder in {folder}")
    if not (folder / tag).is_dir():
        raise CheckpointError(f"{folder} holds no tag {tag}; it holds {listed(_tags(folder)) or 'none'}")
    return folder / tag


def _tags(folder: Path) -> list[str]:
    return sorted(found.parent.name for found in folder.glob("*/*_model_states.pt"))


def listed(names: Iterable[str]) -> str:
    """The first ten of them, each once, and how many more there are."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:10]) + (f" and {len(unique) - 10} more" if len(unique) > 10 else "")


def _by_numbers(key: str) -> list[int]:
    return [int(number) for number in key.split("/")]
