"""Fingerprints of tensors that add up: what ranks find of their own ranges is the fingerprint of the whole.

The fingerprint of elements with the bits b_0, b_1, ... is the sum of b_i (2 i + 1) modulo 2^64. It finds a changed
bit, since odd factors lose nothing, and elements that changed places; it is no protection against intent.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements taken at once, so that the widened copy stays in the processor's caches."""
_MODULUS = 1 << 64
_BITS = {4: torch.int32, 2: torch.int16}


def partial_fingerprint(values_N: Tensor, start: int = 0) -> int:
    """The part that elements start, start + 1, ... have in the fingerprint of what they belong to, in [0, 2^64).

    values_N: 1-D, of 2 or 4 bytes an element, on any device. Parts of ranges that do not overlap add up modulo 2^64.
    """
    bits_N = values_N.detach().view(_BITS[values_N.element_size()])
    odd_C = torch.arange(1, 2 * CHUNK, 2, device=values_N.device)
    total = 0
    for first in range(0, len(bits_N), CHUNK):
        wide_C = bits_N[first : first + CHUNK].long()
        weighted, plain = (wide_C * odd_C[: len(wide_C)]).sum(), wide_C.sum()
        total += int(weighted) + 2 * (start + first) * int(plain)
    return total % _MODULUS


def add_fingerprints(*parts: int) -> int:
    """The fingerprint of what the parts together are."""
    return sum(parts) % _MODULUS
