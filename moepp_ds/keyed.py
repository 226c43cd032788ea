"""Random numbers that follow from a key alone: not from what was drawn before, by whom, or on how many ranks."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for `key`, such as "seed/name". The same key gives other numbers on a GPU than on a CPU."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
