"""Random order as a pure function of names and numbers: no generator, no state, nothing to replay.

    key          = blake2b of the parts, 8 bytes             such as ("window", seed, source, 3)
    hash_i       = splitmix64 of counter i under that key    a bijection of i, so no two hashes are equal
    permutation  = argsort of the hashes

Everything is integer arithmetic modulo 2**64 on little-endian numbers, so the order is the same on every
machine and with every version of numpy (numpy's own generators make no such promise across versions).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: str | int) -> int:
    """A 64-bit key of `parts`; lengths are hashed too, so ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = str(part).encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little")


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64 that mixes every bit."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLY_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLY_2
    return values ^ (values >> np.uint64(31))


def permutation(key: int, size: int) -> np.ndarray:
    """A permutation of 0..size-1, int64 [size], keyed by a 64-bit `key`."""
    counters = np.arange(1, size + 1, dtype=np.uint64) * _GAMMA + np.uint64(key)
    return np.argsort(mix64(counters), kind="stable")


def window_permutation(seed: int, source: str, window: int, size: int) -> np.ndarray:
    """Order of the rows inside window number `window` of `source`: int64 [size], a permutation."""
    return permutation(derive_key("window", seed, source, window), size)


def name_keys(names: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of each file name, uint64 [files]: hashed once, mixed anew for every epoch."""
    return np.array([derive_key("file", name) for name in names], dtype=np.uint64)


def file_orders(seed: int, source: str, epochs: range, keys: np.ndarray) -> np.ndarray:
    """Order of a source's files in each of `epochs`: int64 [epochs, files], indices into `keys` (from `name_keys`).

    A file's place depends on its name, not on its index; of equal hashes the one given first comes first.
    """
    epoch_keys = np.array([derive_key("epoch", seed, source, epoch) for epoch in epochs], dtype=np.uint64)[:, None]
    return np.argsort(mix64(mix64(keys ^ epoch_keys) + epoch_keys), axis=1, kind="stable")


def file_order(seed: int, source: str, epoch: int, keys: np.ndarray) -> np.ndarray:
    """Order of a source's files in one epoch: int64 [files]; see `file_orders`."""
    return file_orders(seed, source, range(epoch, epoch + 1), keys)[0]
