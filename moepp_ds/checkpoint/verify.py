"""All that is wrong with a checkpoint, found by reading every byte of it."""

from __future__ import annotations

from pathlib import Path

from moepp_ds.checkpoint.chunks import ChunkReader
from moepp_ds.checkpoint.errors import DamagedCheckpoint
from moepp_ds.checkpoint.files import read_index, stored_kinds
from moepp_ds.checkpoint.fingerprints import Fingerprints, differences
from moepp_ds.checkpoint.tensors import StoredTensors


def find_damage(folder: Path) -> list[str]:
    """What is wrong, a line or more for each fault; empty for a checkpoint that is whole.

    1. The index, without which there is nothing to compare with.
    2. Every chunk of every file.
    3. Where these are as they should be, that every fragment is there, and the fingerprint of every weight.
    """
    try:
        index = read_index(folder)
        kinds = stored_kinds(index)
    except DamagedCheckpoint as error:
        return [str(error)]
    damage = []
    for name, note in index["files"].items():
        try:
            damage += ChunkReader(folder, {name: note}).damage(name)
        except DamagedCheckpoint as error:
            damage.append(str(error))
    if damage:
        return damage
    try:
        stored = StoredTensors(folder, index["files"])
        stored.check_whole(index["parameters"], kinds)
    except DamagedCheckpoint as error:
        return [str(error)]
    found = Fingerprints(index["parameters"])
    for _, name, start, values in stored.stream("weight"):
        found.add(name, start, values)
    return [f"the weights are not the ones that were saved: {line}" for line in _wrong(index, found)]


def _wrong(index: dict, found: Fingerprints) -> list[str]:
    return [line.strip() for line in differences(index["fingerprints"], found.facts())]
