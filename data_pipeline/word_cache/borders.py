"""Where a text may be cut without changing its ids, and for which SentencePiece models that is certain.

Two symbols merge only when their joined text is a piece, and a symbol of user-defined pieces is found only where
such a piece stands. If no piece holds the characters a and b side by side, in this order, nothing that happens left
of a border a|b depends on what stands right of it. Merges go by score, then from left to right; both orders are
those of the whole text on either side. So encode(left + right) = encode(left) + encode(right).

Borders are told from the last byte of a and the first byte of b in UTF-8. Different characters may share these
bytes, so some borders are missed and none is invented.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

DOCUMENT_MARK = 0xFF
"""Stands between documents; UTF-8 has no such byte."""
SPACE = 0x20
WORD_MARK = "\u2581"
"""How SentencePiece writes a space within pieces. In a text it means a space too."""

_Piece = ModelProto.SentencePiece
_FOUND = (_Piece.NORMAL, _Piece.USER_DEFINED)


def objections(model: ModelProto) -> list[str]:
    """Why the ids of `model` cannot be had from units of the text; empty when they can.

    Each is a clause about the model, such as "its type is UNIGRAM, not BPE".
    """
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = Counter(piece.type for piece in model.pieces)
    reasons = {
        f"its type is {TrainerSpec.ModelType.Name(trainer.model_type)}, not BPE": trainer.model_type != TrainerSpec.BPE,
        f"it normalises text ({normalizer.name or 'by rules of its own'})": bool(
            normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv
        ),
        "it removes repeated spaces": normalizer.remove_extra_whitespaces,
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it puts the word mark behind words": trainer.treat_whitespace_as_suffix,
        "it has no byte fallback": not trainer.byte_fallback or kinds[_Piece.BYTE] != 256,
        "it has pieces marked unused": kinds[_Piece.UNUSED] > 0,
    }
    texts = _texts(model)
    wrong_pieces = {
        "holds a space that is no word mark": [text for text in texts if " " in text],
        "holds a newline": [text for text in texts if "\n" in text and text != "\n"],
        "holds a word mark behind another character": [text for text in texts if WORD_MARK in text.lstrip(WORD_MARK)],
    }
    return [
        *(reason for reason, holds in reasons.items() if holds),
        *(f"its piece {pieces[0]!r} {what}" for what, pieces in wrong_pieces.items() if pieces),
    ]


def _texts(model: ModelProto) -> list[str]:
    """The pieces that are found in texts; control, unknown and byte pieces are not, however they are written."""
    return [piece.piece for piece in model.pieces if piece.type in _FOUND]


def piece_widths(model: ModelProto) -> np.ndarray:
    """int64 [V]: bytes of text that each id stands for; 0 for the pieces of single bytes and those of no text."""
    return np.array(
        [len(piece.piece.replace(WORD_MARK, " ").encode()) if piece.type in _FOUND else 0 for piece in model.pieces]
    )


def border_table(model: ModelProto) -> np.ndarray:
    """bool [65536]: whether a text may be cut between two bytes; the index is first + 256 * second.

    True beside `DOCUMENT_MARK` on either side. False within a run of spaces, whether or not a piece holds two.
    """
    joined = "\n\n".join(_texts(model))
    bytes_N = np.frombuffer(joined.replace(WORD_MARK, " ").encode(), np.uint8)
    inside_256x256 = np.zeros((256, 256), dtype=bool)
    inside_256x256[bytes_N[1:], bytes_N[:-1]] = True
    inside_256x256[SPACE, SPACE] = True
    inside_256x256[:, 0x0A] = inside_256x256[0x0A, :] = False  # newlines stood between the pieces
    inside_256x256[0x80:0xC0, :] = True  # the later bytes of a character
    inside_256x256[:, DOCUMENT_MARK] = inside_256x256[DOCUMENT_MARK, :] = False
    return ~inside_256x256.ravel()
