"""Encoding a text without any border, however long, in bounded memory: overlapping spans with proven seams.

SentencePiece needs about 40 bytes for every character of one call, so a 16-million-letter text would take 600 MB.
Instead spans of 16 KiB are encoded, which stay in the processor's own caches, and each next span begins where, some
way before the end of the last, a token ended. The ids of the two are joined there if the new span begins with the
token that the last one had there.

Why that is exact. Let BPE of a symbol sequence end in tokens T1 ... Tn. No merge crossed a token's end, so BPE of
any run of these tokens' symbols alone ends in the same tokens; in particular every two neighbours are stable: BPE
of Ti Ti+1 is Ti Ti+1. Conversely, a sequence of tokens with stable neighbours is the result of BPE of the whole:
look at the first merge ever to cross the end of a token, say of Ti into Ti+1. Until then merges were inside tokens,
and those inside Ti and Ti+1, and then the crossing one, came in the order in which they come in BPE of Ti Ti+1
alone, which has no crossing merge. Neighbours of one span are stable, and those at a seam were neighbours in the
earlier span.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SPAN_BYTES = 1 << 14
MARGIN_BYTES = 1 << 10
"""At least so far before its end a span is trusted; twice the longest piece if that is more, since a user-defined
piece cut in two at the end of a span is not found."""
SEAMS_TRIED = 16


def encode_unbroken(
    data: bytes,
    encode: Callable[[bytes], np.ndarray],
    width_V: np.ndarray,
    *,
    span: int = SPAN_BYTES,
    margin: int = MARGIN_BYTES,
) -> np.ndarray:
    """Ids of `data`, UTF-8, as encoding it in one call gives them.

    width_V: bytes of text that an id stands for, 0 for the pieces of single bytes. `span` must be several times
    `margin` and the longest piece.
    """
    margin = max(margin, 2 * int(width_V.max()))
    done: list[np.ndarray] = []
    start, ids = 0, encode(_span(data, 0, span))
    while start + span < len(data):
        for seam in _seams(ids, width_V, margin):
            later = start + int(np.where(width_V[ids[:seam]], width_V[ids[:seam]], 1).sum())
            following = encode(_span(data, later, span))
            if following[0] == ids[seam]:
                break
        else:
            return np.concatenate([*done, encode(data[start:])])
        done.append(ids[:seam])
        start, ids = later, following
    return np.concatenate([*done, ids])


def _span(data: bytes, start: int, size: int) -> bytes:
    """`size` bytes from `start`, less the first bytes of a character that does not end in them."""
    stop = min(start + size, len(data))
    while stop < len(data) and 0x80 <= data[stop] < 0xC0:
        stop -= 1
    return data[start:stop]


def _seams(ids: np.ndarray, width_V: np.ndarray, margin: int) -> list[int]:
    """The last places in `ids` with `margin` bytes behind them and no byte piece beside them; not the first id.

    A byte piece is only a part of a character, which is what BPE's symbols are.
    """
    width = width_V[ids]
    behind = np.cumsum(np.where(width, width, 1)[::-1])[::-1]
    seams = np.flatnonzero((width[1:] > 0) & (width[:-1] > 0) & (behind[1:] >= margin)) + 1
    return seams[::-1][:SEAMS_TRIED].tolist()
