"""Text -> token ids, with the two kinds of tokenizer file people have: SentencePiece's and Hugging Face's.

    1. `load_tokenizer` reads the file once and tells the kind from its first byte, not from its name.
    2. It settles the one id the data path needs, the end of a document, and probes that writing this token in
       a text does not produce that id: a document that merely mentions `</s>` must not be cut in two.
    3. `encode_batch` turns texts into ids. Nothing is added (no BOS, no EOS: document ends come later) and
       special tokens written in a text stay text.

SentencePiece models of LLaMA-2's kind are encoded through `word_cache`, which gives the same ids several times
faster; `plain_because` says why a tokenizer is not.

`fingerprint` is the SHA-256 over kind, end-of-document id and the file's bytes. Shards carry it, so that
tokens are never read with another tokenizer than the one that made them.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
import tokenizers

from data_pipeline.document import GIT_LFS_POINTER, DataError
from data_pipeline.word_cache import CacheStatistics, ModelProto, WordCache, objections

Kind = Literal["sentencepiece", "huggingface"]

EOS_CANDIDATES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
"""End-of-document tokens of the common tokenizer families: LLaMA-2; GPT-NeoX, Qwen, OLMo; LLaMA-3; Gemma."""

CHECKED_CHARACTERS = 1 << 16
"""Text that `encode_batch(..., check=True)` also encodes without the word cache: some 25 ms."""
CACHED_CHARACTERS = 1_000
"""Batches of less text are not worth the word cache's few hundred microseconds a call."""


class Tokenizer(ABC):
    """What the data path knows of a tokenizer. Build one with `load_tokenizer`."""

    kind: Kind
    vocab_size: int
    """One more than the largest id, so every id is below it (Hugging Face vocabularies may have holes)."""
    eos_id: int
    """The id that stands after every document; `encode_batch` never returns it."""
    eos_token: str
    """How that id is written, such as `</s>`."""
    fingerprint: str
    """64 hexadecimal digits; equal exactly when kind, file and end-of-document id are."""
    plain_because: tuple[str, ...]
    """Why texts are encoded by the library alone, at its own speed; empty when the word cache is used."""

    @abstractmethod
    def _plain(self, texts: list[str]) -> list[np.ndarray]:
        """What the library makes of the texts, without checks: one 1-D int32 array for each."""

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """The same ids, by the fastest way there is."""
        return self._plain(texts)

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`, each in [0, vocab_size). SentencePiece shows control pieces (EOS) as nothing."""

    def cache_statistics(self) -> CacheStatistics | None:
        """What the word cache did since the tokenizer was loaded; None without one."""
        return None

    def encode_batch(self, texts: Sequence[str], *, check: bool = False) -> list[np.ndarray]:
        """Encode each text by itself.

        check: encode the first `CHECKED_CHARACTERS` without the word cache too, and raise `DataError` if an id
            differs. For the first batch of every file.
        Returns one 1-D int32 array per text, possibly read-only, possibly empty. Raises `DataError` when one
        of them would hold `eos_id`. Texts must be encodable as UTF-8 (readers let no lone surrogate through).
        """
        if check:
            self._check(texts)
        arrays = self._encode(list(texts))
        for text, ids_N in zip(texts, arrays):
            if (ids_N == self.eos_id).any():
                raise DataError(
                    f"the text {_excerpt(text)} encodes to the end-of-document id {self.eos_id}, which "
                    "may only stand at a document's end (data_pipeline.tokenizer); pass another with --eos"
                )
        return arrays

    def _check(self, texts: Sequence[str]) -> None:
        sample: list[str] = []
        left = 0 if self.plain_because else CHECKED_CHARACTERS
        for text in texts:
            if left <= 0:
                break
            sample.append(text[:left])
            left -= len(text)
        for text, ids_N, plain_N in zip(sample, self._encode(sample), self._plain(sample)):
            if not np.array_equal(ids_N, plain_N):
                raise DataError(
                    f"the word cache encodes the text {_excerpt(text)} otherwise than the tokenizer's own library"
                    f" does (tokenizer {self.fingerprint[:12]}, data_pipeline.word_cache), which must never be;"
                    " please report it with the tokenizer, and until then encode without the cache:"
                    " load_tokenizer(..., word_cache=False)"
                )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, run on the calling thread (workers are processes: threads would contend)."""

    kind: Kind = "sentencepiece"

    def __init__(self, data: bytes, *, path: str, eos: str | None = None, word_cache: bool = True) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise DataError(
                f"{path} is neither a SentencePiece model nor a Hugging Face tokenizer.json ({error}); "
                "pass the tokenizer.model or tokenizer.json file itself"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._find_eos(path, eos)
        self.eos_token = self._processor.id_to_piece(self.eos_id)
        self.fingerprint = _fingerprint(self.kind, self.eos_id, data)
        self._model = ModelProto.FromString(data)
        self.plain_because = tuple(objections(self._model)) if word_cache else ("the word cache is switched off",)
        self._cache: WordCache | None = None

    def _find_eos(self, path: str, eos: str | None) -> int:
        if eos is None:
            if self._processor.eos_id() < 0:
                raise DataError(
                    f"{path} defines no end-of-sentence piece, and every document needs an end; "
                    f"pass --eos with one of its control pieces: {_listed(self._control_pieces())}"
                )
            return self._processor.eos_id()
        eos_id = self._processor.piece_to_id(eos)
        if self._processor.id_to_piece(eos_id) != eos:
            control = _listed(self._control_pieces())
            raise DataError(f"--eos {eos!r} is no piece of {path}; its control pieces are {control}")
        return eos_id

    def _control_pieces(self) -> list[str]:
        ids = range(self._processor.vocab_size())
        return [self._processor.id_to_piece(i) for i in ids if self._processor.is_control(i)]

    def cache_statistics(self) -> CacheStatistics | None:
        """See `Tokenizer`."""
        return None if self._cache is None else self._cache.statistics()

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if self.plain_because or sum(map(len, texts)) < CACHED_CHARACTERS:
            return self._plain(texts)
        if self._cache is None:  # made when it is needed: many who load a tokenizer only decode
            self._cache = WordCache(self._model)
        return self._cache.encode(texts)

    def _plain(self, texts: list[str]) -> list[np.ndarray]:
        return self._processor.encode(
            texts,
            out_type="numpy",
            add_bos=False,
            add_eos=False,
            reverse=False,
            enable_sampling=False,
            num_threads=1,
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode(_checked(ids, self.vocab_size))


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face fast tokenizer, stripped of everything that would change the text's own ids.

    A `tokenizer.json` may carry a truncation length, a padding length and a template that adds BOS; all are
    switched off. Special tokens are encoded as the text they are (`encode_special_tokens`).
    """

    kind: Kind = "huggingface"
    plain_because = ("it is a Hugging Face tokenizer",)

    def __init__(self, data: bytes, *, path: str, eos: str | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception, and decode a UnicodeDecodeError
            raise DataError(
                f"{path} is JSON but no Hugging Face tokenizer ({error}); pass the file named tokenizer.json "
                "(not tokenizer_config.json or vocab.json)"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        self.eos_token = _usual_eos(path, special) if eos is None else eos
        eos_id = self._tokenizer.token_to_id(self.eos_token)
        if eos_id is None:
            raise DataError(f"--eos {eos!r} is no token of {path}; its special tokens are {_listed(special)}")
        self.eos_id = eos_id
        self.fingerprint = _fingerprint(self.kind, self.eos_id, data)

    def _plain(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, such as for a vocabulary without [UNK]
            raise DataError(
                f"the tokenizer cannot encode a text ({error}); use one whose vocabulary covers every text, such"
                " as byte-level BPE"
            ) from error
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)


def _usual_eos(path: str, special: Sequence[str]) -> str:
    """The one of `EOS_CANDIDATES` among the special tokens.

    Only special tokens count: Gemma's vocabulary, say, also holds "</s>" as the HTML tag it is there.
    """
    found = [token for token in EOS_CANDIDATES if token in special]
    if len(found) != 1:
        raise DataError(
            f"{path} has {'several' if found else 'none'} of the usual end-of-document tokens "
            f"{_listed(found or EOS_CANDIDATES)} among its special tokens; pass --eos with the right one "
            f"of {_listed(special)}"
        )
    return found[0]


def load_tokenizer(path: str | os.PathLike[str], eos: str | None = None, *, word_cache: bool = True) -> Tokenizer:
    """Load a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

    eos: the end-of-document token. None takes the model's own end-of-sentence piece (SentencePiece), or the
        one of `EOS_CANDIDATES` that the file has as a special token (Hugging Face).
    word_cache: False encodes with the library alone; for comparisons.
    Raises `DataError` when the file is missing, empty, a Git-LFS pointer or no tokenizer, and when the
    end-of-document token is missing, ambiguous, or comes out of a text that mentions it.

    Loaded again with nothing changed, it is the same object: a worker that builds many files keeps its words.
    """
    return _loaded(_read(Path(path)), str(path), eos, word_cache)


@lru_cache(maxsize=1)
def _loaded(data: bytes, path: str, eos: str | None, word_cache: bool) -> Tokenizer:
    tokenizer: Tokenizer
    if data.lstrip()[:1] == b"{":
        tokenizer = HuggingFaceTokenizer(data, path=path, eos=eos)
    else:
        tokenizer = SentencePieceTokenizer(data, path=path, eos=eos, word_cache=word_cache)
    _prove_eos_is_no_text(tokenizer, path)
    return tokenizer


def _read(path: Path) -> bytes:
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        inside = [str(path / name) for name in names if (path / name).is_file()]
        raise DataError(
            f"{path} is a folder; pass the tokenizer file itself, a tokenizer.model or tokenizer.json "
            f"(in this folder: {_listed(inside)})"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"cannot read the tokenizer {path}: {error.strerror}; pass an existing file"
        raise DataError(message) from error
    if not data:
        raise DataError(f"the tokenizer {path} is empty (0 bytes); download it again")
    if data.startswith(GIT_LFS_POINTER):
        raise DataError(
            f"the tokenizer {path} is a Git-LFS pointer, not the file; run `git lfs pull` where it lies"
        )
    return data


def _prove_eos_is_no_text(tokenizer: Tokenizer, path: str) -> None:
    """Refuse a tokenizer that turns the written form of its end-of-document token into that token's id."""
    eos = tokenizer.eos_token
    probes = [eos, f"a {eos} b", f"a{eos}b", eos + eos]
    if any((ids_N == tokenizer.eos_id).any() for ids_N in tokenizer._plain(probes)):
        raise DataError(
            f"{path} reads the text {eos!r} as the end-of-document id {tokenizer.eos_id}, so a document "
            "that mentions it would be cut in two (data_pipeline.tokenizer); mark the token as special "
            "(tokenizer.json) or as a control piece (SentencePiece), or pass another with --eos"
        )


def _fingerprint(kind: Kind, eos_id: int, data: bytes) -> str:
    return hashlib.sha256(f"{kind}\0{eos_id}\0".encode() + data).hexdigest()


def _checked(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    """`ids` as the plain list both libraries want, after a range check neither of them words well."""
    ids_N = np.asarray(ids, dtype=np.int64)
    outside = ids_N[(ids_N < 0) | (ids_N >= vocab_size)]
    if outside.size:
        raise DataError(
            f"token id {outside[0]} is outside this tokenizer's 0..{vocab_size - 1}; "
            "the tokens were made with another tokenizer"
        )
    return ids_N.tolist()


def _excerpt(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(repr(name) for name in names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
