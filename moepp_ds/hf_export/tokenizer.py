"""The tokenizer of an exported folder: what `AutoTokenizer` makes of it must give the ids that training saw.

1. Hugging Face's kind   tokenizer.json as it is. If the file would also cut, pad or frame a text (BOS), a copy
                         without that, because training never did.
2. SentencePiece's kind  its vocabulary, scores and normalisation rewritten as a tokenizer.json; the .model beside it.
3. tokenizer_config.json says that special tokens written in a text are text.
4. Proof                 AutoTokenizer loads the result from a scratch folder and encodes probe texts. If ids differ,
                         nothing that would mislead is written: the file alone, under a name that nobody loads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_format
from tokenizers import decoders, models, normalizers

from data_pipeline.tokenizer import Tokenizer

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

NEVER = -1e4
"""Score of a piece that no text may become, in a Unigram model that has no other way to say so."""

PROBES = (
    "Hello, world!",
    "  two spaces before, two after  ",
    "tab\there\nnew line\r\n\n   indented\n",
    "",
    " ",
    "\n",
    "3.14159 is 1/2 of 6.28318; 007, 1e-5 and 0xFF",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # comment\n",
    "na\u00efve caf\u00e9 \u2014 \u00abgr\u00fc\u00dfe\u00bb, \u0141\u00f3d\u017a; e\u0301 is e and an accent",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f642 \U0001f469\u200d\U0001f52c \u2211\u2081\u207f x\u00b2 \u2260 \u221e \u00a0 \u3000 \ufeff",
    "<s> </s> <unk> <pad> <0x0A> <|endoftext|> <|im_start|> [INST] [CLS] <eos>",
    f"{SPACE}{SPACE}x{SPACE} \x00 \x7f",
    "aaaaaaaaaaaaaaaa bbbbbbbbbbb ---------------- ================ ......... !!!!!!!",
    "The quick brown fox jumps over the lazy dog; \"it's\" over-the-top, isn't it? (Yes & no.) " * 4,
)
"""Texts in which tokenizers that are not quite the same are known to differ."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Files for the exported folder by name, and what a user should know of them, if anything."""

    files: Mapping[str, bytes]
    notice: str | None = None


def tokenizer_files(tokenizer: Tokenizer, data: bytes, *, max_length: int) -> TokenizerFiles:
    """The files that declare `tokenizer`, whose own file is `data`, to transformers.

    max_length: longest row that the model was trained on. Tokens.
    """
    sentencepiece = tokenizer.kind == "sentencepiece"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    try:
        converted = convert_sentencepiece(data) if sentencepiece else without_frames(data)
    except NotImplementedError as error:
        reason: str | None = str(error)
    else:
        files = {
            "tokenizer.json": converted,
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }
        reason = _difference(tokenizer, files)
        if reason is None:
            return TokenizerFiles({**files, "tokenizer.model": data} if sentencepiece else files)
    name = "sentencepiece.model" if sentencepiece else "training_tokenizer.json"
    return TokenizerFiles(
        {name: data},
        f"AutoTokenizer cannot give this tokenizer's ids ({reason}), so the folder has no tokenizer.json; encode with "
        f"{name} and the {'sentencepiece' if sentencepiece else 'tokenizers'} library",
    )


def without_frames(data: bytes) -> bytes:
    """A tokenizer.json that adds nothing to a text and takes nothing away; `data` itself where it is one."""
    content = json.loads(data)
    kept = _keeps_ids(content.get("post_processor"))
    if content.get("truncation") is None and content.get("padding") is None and kept == content.get("post_processor"):
        return data
    changed = {**content, "truncation": None, "padding": None, "post_processor": kept}
    return (json.dumps(changed, ensure_ascii=False, indent=2) + "\n").encode()


def _keeps_ids(processor: Any) -> Any:
    """A post-processor without its steps that add tokens: byte-level BPE has one that only moves offsets."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        steps = [step for step in map(_keeps_ids, processor["processors"]) if step is not None]
        return {**processor, "processors": steps} if steps else None
    return None


def convert_sentencepiece(data: bytes) -> bytes:
    """A SentencePiece model as a tokenizer.json; NotImplementedError for kinds that have no counterpart."""
    model: Any = sentencepiece_format.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    model.ParseFromString(data)
    trainer, normal = model.trainer_spec, model.normalizer_spec
    if trainer.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        raise NotImplementedError("its spaces stand after words, or are not marked")
    converted = tokenizers.Tokenizer(_model(model))
    converted.normalizer = normalizers.Sequence(list(_normalizers(normal)))
    strip = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = (model.SentencePiece.UNKNOWN, model.SentencePiece.CONTROL)
    converted.add_special_tokens([piece.piece for piece in model.pieces if piece.type in special])
    return (converted.to_str(pretty=True) + "\n").encode()


def _model(model: Any) -> Any:
    """The pieces and how a text is cut into them."""
    kinds, trainer = model.SentencePiece, model.trainer_spec
    plain = [piece.type in (kinds.NORMAL, kinds.USER_DEFINED) for piece in model.pieces]
    if trainer.model_type == trainer.BPE:
        return models.BPE(
            vocab={piece.piece: number for number, piece in enumerate(model.pieces)},
            merges=list(_merges([(piece.piece, piece.score) for piece, one in zip(model.pieces, plain) if one])),
            unk_token=model.pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    if trainer.model_type == trainer.UNIGRAM:
        scored = [(piece.piece, piece.score if one else NEVER) for piece, one in zip(model.pieces, plain)]
        return models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    raise NotImplementedError("it is neither BPE nor Unigram")


def _merges(pieces: list[tuple[str, float]]) -> Iterator[tuple[str, str]]:
    """What two pieces join to a third, those with the best score first: SentencePiece's order of joining."""
    known = {piece for piece, _ in pieces}
    for piece, _ in sorted(pieces, key=lambda scored: -scored[1]):
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield piece[:cut], piece[cut:]


def _normalizers(spec: Any) -> Iterator[Any]:
    """The steps before cutting, in SentencePiece's order."""
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(tokenizers.Regex("^ +| +$"), "")
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _difference(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> str | None:
    """What AutoTokenizer gets wrong with these files; None if nothing."""
    from transformers import AutoTokenizer  # heavy, and needed by nothing else here

    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, "config.json": b"{}"}.items():
            (Path(folder) / name).write_bytes(content)
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if loaded.eos_token_id != tokenizer.eos_id:
        return f"its end of a document comes out as {loaded.eos_token_id}, not {tokenizer.eos_id}"
    for text, ids_N in zip(PROBES, tokenizer.encode_batch(PROBES)):
        if loaded(text, verbose=False)["input_ids"] != ids_N.tolist():
            return f"{text[:40]!r} comes out with other ids"
    return None
