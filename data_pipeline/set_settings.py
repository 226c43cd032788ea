"""What all shards of a set have in common: fixed by the first build into a folder, the same for all later ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from data_pipeline.atomic import write_atomically
from data_pipeline.document import DataError
from data_pipeline.manifest import Settings, TokenizerInfo
from data_pipeline.tokenizer import Tokenizer

_FILE = "settings.json"


def tokenizer_info(tokenizer: Tokenizer, file: str) -> TokenizerInfo:
    """What a set, or a run without one, keeps of its tokenizer; `file` is where its file lies."""
    return TokenizerInfo(
        file=file,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        eos_token=tokenizer.eos_token,
        eos_id=tokenizer.eos_id,
        fingerprint=tokenizer.fingerprint,
    )


def settle(root: Path, settings: Settings, tokenizer_file: Path) -> Settings:
    """Fix the settings of the set at `root`, or compare them with the set's; put the tokenizer into the set."""
    if (root / _FILE).exists():
        before = read_settings(root)
        settings = replace(settings, tokenizer=replace(settings.tokenizer, file=before.tokenizer.file))
        if before != settings:
            raise DataError(
                f"{root} was begun with other settings: {_differences(before, settings)}; build into another"
                " folder, or delete this one"
            )
    else:
        write_atomically(root / _FILE, orjson.dumps(settings, option=orjson.OPT_INDENT_2) + b"\n")
    data = tokenizer_file.read_bytes()
    inside = root / settings.tokenizer.file
    if not inside.exists() or inside.read_bytes() != data:
        write_atomically(inside, data)
    return settings


def read_settings(root: Path) -> Settings:
    """The settings of the set at `root`, finished or not."""
    path = root / _FILE
    try:
        return TypeAdapter(Settings).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{root} holds nothing that was built: {_FILE} is missing; check the path") from None
    except ValidationError:
        raise DataError(f"{path} is damaged; build into another folder, or delete this one") from None


def differences(before: Settings, now: Settings) -> list[tuple[str, str, str]]:
    """What two sets of settings differ in: (name, one value, the other)."""
    pairs = [
        ("tokenizer", before.tokenizer.fingerprint[:12], now.tokenizer.fingerprint[:12]),
        ("held-out share", before.held_out, now.held_out),
        ("part length", before.part_tokens, now.part_tokens),
        ("split length", before.split_bytes, now.split_bytes),
        ("excluded Pile sets", _listed(before.pile_exclude), _listed(now.pile_exclude)),
        ("deduplication", before.dedup, now.dedup),
    ]
    return [(name, str(old), str(new)) for name, old, new in pairs if old != new]


def _differences(before: Settings, now: Settings) -> str:
    return ", ".join(f"{name} {old} then and {new} now" for name, old, new in differences(before, now))


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
