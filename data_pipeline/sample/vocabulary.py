"""Train a SentencePiece BPE vocabulary with the settings LLaMA-2's was trained with.

Identity normalisation, kept white space and byte fallback make encoding lossless: any text decodes to itself.
Lines are trained on one by one, so no piece holds a newline, and no piece spans two words.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from data_pipeline.document import DataError


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of a `tokenizer.model` of exactly `vocab_size` pieces: unk 0, bos 1, eos 2, 256 bytes, words.

    Deterministic for a SentencePiece version: one thread, no shuffling, no sampling of `texts`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise DataError(
            f"no vocabulary of {vocab_size} pieces can be trained on the sample's text ({reason}); "
            "choose another --vocab-size (default 4096) or a larger sample"
        ) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    return (line for text in texts for line in text.split("\n") if line)
