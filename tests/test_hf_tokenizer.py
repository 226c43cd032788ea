"""Tokenizers of exported folders: the same ids as in training, or no claim to be that tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from conftest import ROOT
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data_pipeline.tokenizer import load_tokenizer
from moepp_ds.hf_export.tokenizer import TokenizerFiles, tokenizer_files

TEXTS = [file.read_text() for file in sorted((ROOT / "tests").glob("test_data_*.py"))[:6]]
LINES = [line for text in TEXTS for line in text.splitlines() if line]
LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}

KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, **LOSSLESS},
    "bpe_normalised": {"model_type": "bpe"},
    "bpe_no_prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, **LOSSLESS},
    "unigram": {"model_type": "unigram"},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, **LOSSLESS},
}


def sentencepiece_files(path: Path, **options: Any) -> tuple[TokenizerFiles, Any, bytes]:
    """What is exported of a SentencePiece model trained with these options; the tokenizer; its file."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, vocab_size=700, minloglevel=2, num_threads=1, **options
    )
    path.write_bytes(written.getvalue())
    tokenizer = load_tokenizer(path)
    return tokenizer_files(tokenizer, written.getvalue(), max_length=64), tokenizer, written.getvalue()


def ids(content: bytes, texts: Sequence[str]) -> list[list[int]]:
    """By a tokenizer.json, special tokens in the texts being text."""
    loaded = tokenizers.Tokenizer.from_str(content.decode())
    loaded.encode_special_tokens = True
    return [encoding.ids for encoding in loaded.encode_batch(list(texts))]


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_becomes_a_tokenizer_json(tmp_path: Path, kind: str) -> None:
    done, tokenizer, data = sentencepiece_files(tmp_path / "m.model", **KINDS[kind])
    assert done.notice is None
    assert done.files["tokenizer.model"] == data
    ours = [ids_N.tolist() for ids_N in tokenizer.encode_batch(TEXTS)]
    assert ids(done.files["tokenizer.json"], TEXTS) == ours
    if KINDS[kind].get("byte_fallback"):  # without it, each library has its own sign for what it cannot say
        decoded = tokenizers.Tokenizer.from_str(done.files["tokenizer.json"].decode()).decode(ours[0])
        assert decoded == tokenizer.decode(ours[0])
    assert json.loads(done.files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word", "hard_vocab_limit": False}, "it is neither BPE nor Unigram"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "its spaces stand after words"),
        ({"user_defined_symbols": ["<|im_start|>"], **KINDS["bpe"]}, "comes out with other ids"),
    ],
)
def test_what_has_no_counterpart_is_not_passed_off_as_one(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    done, _, data = sentencepiece_files(tmp_path / "m.model", **options)
    assert dict(done.files) == {"sentencepiece.model": data}
    assert done.notice is not None and reason in done.notice and "sentencepiece library" in done.notice


def byte_level(path: Path, **parts: Any) -> tuple[TokenizerFiles, Any, bytes]:
    """What is exported of a byte-level BPE tokenizer.json; the tokenizer; its file. parts: attributes of it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    for name, part in parts.items():
        setattr(made, name, part)
    data = made.to_str().encode()
    path.write_bytes(data)
    return tokenizer_files(load_tokenizer(path), data, max_length=64), load_tokenizer(path), data


FRAME = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def test_a_plain_tokenizer_json_is_copied(tmp_path: Path) -> None:
    done, _, data = byte_level(tmp_path / "tokenizer.json", post_processor=processors.ByteLevel(trim_offsets=True))
    assert done.notice is None and done.files["tokenizer.json"] == data
    assert done.files.keys() == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("post_processor", [FRAME, processors.Sequence([processors.ByteLevel(), FRAME])])
def test_a_tokenizer_json_that_frames_texts_does_not_do_so_any_more(tmp_path: Path, post_processor: Any) -> None:
    done, tokenizer, data = byte_level(tmp_path / "tokenizer.json", post_processor=post_processor)
    assert done.notice is None and done.files["tokenizer.json"] != data
    assert ids(data, ["one"])[0][0] == 0  # what its own file would have put before every text
    assert ids(done.files["tokenizer.json"], TEXTS) == [ids_N.tolist() for ids_N in tokenizer.encode_batch(TEXTS)]


def test_a_tokenizer_json_that_cuts_texts_does_not_do_so_any_more(tmp_path: Path) -> None:
    made = byte_level(tmp_path / "tokenizer.json")[2]
    cutting = tokenizers.Tokenizer.from_str(made.decode())
    cutting.enable_truncation(5)
    cutting.enable_padding(length=9)
    data = cutting.to_str().encode()
    (tmp_path / "tokenizer.json").write_bytes(data)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    done = tokenizer_files(tokenizer, data, max_length=64)
    assert done.notice is None
    assert ids(done.files["tokenizer.json"], TEXTS) == [ids_N.tolist() for ids_N in tokenizer.encode_batch(TEXTS)]
