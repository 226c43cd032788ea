"""Both kinds of tokenizer file: exact ids, document ends that no text can forge, files that are none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from data_pipeline.document import DataError, Document
from data_pipeline.readers import read_documents, reader_for
from data_pipeline.tokenizer import SentencePieceTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with the real files")
HARD = ["", " ", "\n", "  x   y ", "a</s>b </s>", "<s><unk><0x0A>", "a\x00b", "\u2028\x85\r\n\t"]
HARD += ["\U0001f600\ufffd\u0301"]


def sentencepiece_model(folder: Path, **options) -> Path:
    """A model of 300 pieces: unk, bos, eos, 256 bytes, the rest learnt from one sentence."""
    settings = {
        **dict(model_type="bpe", vocab_size=300, byte_fallback=True, minloglevel=2, num_threads=1),
        **dict(normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False),
        **options,
    }
    writer = io.BytesIO()
    sentences = iter(["the quick brown fox jumps over the lazy dog"] * 3)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=writer, **settings)
    path = folder / "tokenizer.model"
    path.write_bytes(writer.getvalue())
    return path


def huggingface_file(folder: Path, *special: str, ordinary=(), vocab: dict[str, int] | None = None) -> Path:
    """Byte-level BPE with one merge: ids 0..255 are bytes, 256 is `ab`, then come the added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = vocab or {token: i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(base, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(ordinary))
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# --- SentencePiece ---


def test_sentencepiece_adds_nothing_and_keeps_special_tokens_as_text(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path))
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece", 300)
    assert (tokenizer.eos_id, tokenizer.eos_token) == (2, "</s>")
    arrays = tokenizer.encode_batch(HARD)
    assert [ids.dtype for ids in arrays] == [np.int32] * len(HARD)
    assert [ids.ndim for ids in arrays] == [1] * len(HARD)
    assert len(arrays[0]) == 0
    assert all((ids > 2).all() for ids in arrays)  # no unk, bos, eos
    assert [tokenizer.decode(ids) for ids in arrays] == HARD
    assert tokenizer.encode_batch([]) == []


def test_sentencepiece_ids_are_those_of_plain_encoding(tmp_path):
    path = sentencepiece_model(tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*HARD, "the lazy fox", "the quick brown fox " * 500]
    arrays = load_tokenizer(path).encode_batch(texts)
    assert [ids.tolist() for ids in arrays] == [plain.encode(text) for text in texts]


def test_sentencepiece_without_end_of_sentence_needs_eos(tmp_path):
    path = sentencepiece_model(tmp_path, eos_id=-1, control_symbols=["<end>"])
    with pytest.raises(DataError, match="defines no end-of-sentence piece, .* --eos .*: '<s>', '<end>'"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, eos="<end>")
    assert (tokenizer.eos_id, tokenizer.eos_token) == (2, "<end>")
    with pytest.raises(DataError, match="--eos 'nope' is no piece of .*; its control pieces are"):
        load_tokenizer(path, eos="nope")


def test_sentencepiece_end_that_a_text_could_forge_is_refused(tmp_path):
    path = sentencepiece_model(tmp_path, user_defined_symbols=["<end>"])
    with pytest.raises(DataError, match="reads the text '<end>' as the end-of-document id 3, .* cut in two"):
        load_tokenizer(path, eos="<end>")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(model_type="unigram", vocab_size=290), "its type is UNIGRAM, not BPE"),
        (dict(normalization_rule_name="nmt_nfkc"), r"it normalises text (nmt_nfkc)"),
        (dict(user_defined_symbols=["a b"]), "its piece 'a b' holds a space that is no word mark"),
    ],
)
def test_sentencepiece_models_that_the_word_cache_is_not_for_are_encoded_plainly(tmp_path, options, reason):
    path = sentencepiece_model(tmp_path, **options)
    tokenizer = load_tokenizer(path)
    assert tokenizer.plain_because == (reason,)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*HARD, "a b  c", "\uff21 \ufb01"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts, check=True)] == plain.encode(texts)
    assert tokenizer.cache_statistics() is None


def test_word_cache_is_made_when_it_is_needed_and_can_be_switched_off(tmp_path):
    path = sentencepiece_model(tmp_path)
    cached, plain = load_tokenizer(path), load_tokenizer(path, word_cache=False)
    assert (cached.plain_because, plain.plain_because) == ((), ("the word cache is switched off",))
    assert cached.fingerprint == plain.fingerprint
    assert cached.cache_statistics() is None
    for texts in (HARD, HARD * 50):  # little text is encoded plainly in any case
        assert cached.cache_statistics() is None
        for ids, expected in zip(cached.encode_batch(texts, check=True), plain.encode_batch(texts, check=True)):
            assert ids.tolist() == expected.tolist()
    statistics = cached.cache_statistics()
    assert statistics is not None and statistics.units > statistics.encoded_units > 0
    assert plain.cache_statistics() is None


def test_check_finds_ids_that_are_not_the_librarys_own(tmp_path):
    class Damaged(SentencePieceTokenizer):
        def _encode(self, texts):
            return [ids[:-1] if "fox" in text else ids for text, ids in zip(texts, self._plain(texts))]

    data = sentencepiece_model(tmp_path).read_bytes()
    tokenizer = Damaged(data, path="some.model")
    assert len(tokenizer.encode_batch(["the dog", "the lazy"], check=True)) == 2
    with pytest.raises(DataError, match="the word cache encodes the text 'the fox' otherwise .* word_cache=False"):
        tokenizer.encode_batch(["the dog", "the fox"], check=True)
    far = ["the dog " * 10_000, "the fox"]  # only the beginning of a batch is checked
    assert len(tokenizer.encode_batch(far, check=True)) == 2


# --- Hugging Face ---


def test_huggingface_adds_nothing_and_keeps_special_tokens_as_text(tmp_path):
    tokenizer = load_tokenizer(huggingface_file(tmp_path, "<|bos|>", "<|endoftext|>"))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("huggingface", 259, 258)
    arrays = tokenizer.encode_batch(["ab", "aab<|endoftext|>", "<|bos|>", ""])
    a = sorted(pre_tokenizers.ByteLevel.alphabet()).index("a")
    assert arrays[0].tolist() == [256]
    assert arrays[1].tolist()[:2] == [a, 256]
    assert [len(ids) for ids in arrays] == [1, 2 + len("<|endoftext|>"), len("<|bos|>"), 0]
    assert all(ids.dtype == np.int32 and (ids < 257).all() for ids in arrays)
    texts = [*HARD, "<|bos|><|endoftext|>"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert tokenizer.decode([256, 258, 256]) == "ab<|endoftext|>ab"


def test_huggingface_truncation_padding_and_templates_are_switched_off(tmp_path):
    path = huggingface_file(tmp_path, "<|bos|>", "<|endoftext|>")
    full = tokenizers.Tokenizer.from_file(str(path))
    full.enable_truncation(4)
    full.enable_padding(length=8, pad_id=258, pad_token="<|endoftext|>")
    full.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 257)])
    assert full.encode("ab" * 9).ids == [257, 256, 256, 256, 258, 258, 258, 258]
    full.save(str(path))
    assert [ids.tolist() for ids in load_tokenizer(path).encode_batch(["ab" * 9, "ab"])] == [[256] * 9, [256]]


def test_huggingface_end_is_the_one_usual_special_token(tmp_path):
    gemma_like = huggingface_file(tmp_path, "<bos>", "<eos>", ordinary=("</s>",))
    assert load_tokenizer(gemma_like).eos_token == "<eos>"
    with pytest.raises(DataError, match="has none of the usual .* '</s>', .*--eos with .* of '<pad>', '<x>'"):
        load_tokenizer(huggingface_file(tmp_path, "<pad>", "<x>"))
    several = huggingface_file(tmp_path, "<|endoftext|>", "</s>")
    with pytest.raises(DataError, match=r"has several of the usual .* '</s>', '<\|endoftext\|>' among"):
        load_tokenizer(several)
    assert load_tokenizer(several, eos="</s>").eos_id == 258
    with pytest.raises(DataError, match=r"--eos '<eos>' is no token of .*; its special tokens are '<\|end"):
        load_tokenizer(several, eos="<eos>")


def test_huggingface_end_that_a_text_could_forge_is_refused(tmp_path):
    path = huggingface_file(tmp_path, ordinary=("<|end|>",))
    with pytest.raises(DataError, match=r"reads the text '<\|end\|>' as the end-of-document id 257"):
        load_tokenizer(path, eos="<|end|>")
    with pytest.raises(DataError, match="reads the text 'ab' as the end-of-document id 256"):
        load_tokenizer(path, eos="ab")


def test_huggingface_text_outside_the_vocabulary_is_an_error(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"cannot encode a text \(.*UNK.*\); use one whose vocabulary covers"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_huggingface_vocabulary_with_holes_counts_to_its_largest_id(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: 10 * i for i, token in enumerate([*alphabet, "ab"])}
    tokenizer = load_tokenizer(huggingface_file(tmp_path, "</s>", vocab=vocab))
    assert tokenizer.encode_batch(["ab"])[0].tolist() == [2560]
    assert tokenizer.vocab_size == 2561


# --- both ---


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer_file(request, tmp_path) -> Path:
    if request.param == "sentencepiece":
        return sentencepiece_model(tmp_path)
    return huggingface_file(tmp_path, "</s>", "<x>")


def test_fingerprint_tells_file_and_end_apart_but_not_place(tokenizer_file, tmp_path):
    original = load_tokenizer(tokenizer_file)
    assert len(original.fingerprint) == 64
    moved = tmp_path / "moved"
    moved.write_bytes(tokenizer_file.read_bytes())
    assert load_tokenizer(moved).fingerprint == original.fingerprint
    other_end = "<s>" if original.kind == "sentencepiece" else "<x>"
    assert load_tokenizer(moved, eos=other_end).fingerprint != original.fingerprint
    if original.kind == "huggingface":
        moved.write_bytes(tokenizer_file.read_bytes() + b"\n")
        assert load_tokenizer(moved).fingerprint != original.fingerprint


def test_a_tokenizer_loaded_again_is_the_same_object_until_its_file_changes(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    assert load_tokenizer(tokenizer_file) is tokenizer
    if tokenizer.kind == "huggingface":
        tokenizer_file.write_bytes(tokenizer_file.read_bytes() + b"\n")
        assert load_tokenizer(tokenizer_file) is not tokenizer


@pytest.mark.parametrize("bad", [-1, 100_000])
def test_ids_out_of_range_are_another_tokenizers(tokenizer_file, bad):
    tokenizer = load_tokenizer(tokenizer_file)
    with pytest.raises(DataError, match=rf"token id {bad} is outside .* 0\.\.{tokenizer.vocab_size - 1};"):
        tokenizer.decode(np.array([5, bad]))


def test_the_kind_is_told_by_the_content_not_by_the_name(tokenizer_file, tmp_path):
    original = load_tokenizer(tokenizer_file)
    other_name = tmp_path / ("other.json" if original.kind == "sentencepiece" else "other.model")
    other_name.write_bytes(tokenizer_file.read_bytes())
    assert load_tokenizer(other_name).kind == original.kind


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(DataError, match="cannot read the tokenizer .*tokenizer.model: No such file"):
        load_tokenizer(path)
    for content, message in {
        b"": r"is empty \(0 bytes\); download it again",
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git-LFS pointer, .*; run `git lfs pull`",
        b"\x1f\x8b something else": "is neither a SentencePiece model nor a Hugging Face tokenizer.json",
        b'{"bos_token": "<s>"}': "is JSON but no Hugging Face tokenizer .*not tokenizer_config.json",
        b'{"text": "\xff"}': "is JSON but no Hugging Face tokenizer",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    with pytest.raises(DataError, match=r"is a folder; .* \(in this folder: '.*tokenizer\.model'\)"):
        load_tokenizer(tmp_path)


@needs_real_files
def test_llama2_encodes_real_documents_as_plain_sentencepiece_does():
    path = SHARED / "tokenizer" / "llama2.model"
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_token) == (32_000, 2, "</s>")
    assert tokenizer.encode_batch(["Hello world</s>"])[0].tolist() == [15043, 3186, 829, 29879, 29958]
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for corpus in ("dolma", "pile"):
        for file in reader_for(corpus).find_files(SHARED / corpus, split_bytes=1 << 30):
            texts = [item.text for item in read_documents(file, corpus) if isinstance(item, Document)]
            arrays = tokenizer.encode_batch(texts)
            assert [ids.tolist() for ids in arrays] == plain.encode(texts)
            # A word mark U+2581 written in a text reads back as the space it stands for.
            spaced = [text.replace("\u2581", " ") for text in texts]
            assert [tokenizer.decode(ids) for ids in arrays] == spaced
