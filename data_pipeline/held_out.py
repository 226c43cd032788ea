"""Which documents are held out of training for validation.

A document is held out when the hash of its text, under a fixed salt, falls below the share asked for. The
text alone decides, so the same text in two corpora lies on the same side, and neither the tokenizer, the
file, the order nor any seed moves a document from one side to the other.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

from data_pipeline.document import DataError

_SALT = b"moepp held-out"


class HeldOutRule:
    """Decides which texts are held out; `share` is a number in [0, 1)."""

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise DataError(f"held-out share {share} is not in [0, 1); 0.005 holds out one document in 200")
        self._limit = int(Fraction(repr(share)) * 2**64)

    def __call__(self, text: bytes) -> bool:
        """Whether a document whose text is `text` (UTF-8) is held out."""
        digest = hashlib.blake2b(text, digest_size=8, salt=_SALT).digest()
        return int.from_bytes(digest, "little") < self._limit
