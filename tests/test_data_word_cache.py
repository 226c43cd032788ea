"""The word cache gives SentencePiece's ids, whatever the text, and knows for which models it can."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_pipeline.word_cache import ModelProto, WordCache, objections
from data_pipeline.word_cache.borders import border_table, piece_widths
from data_pipeline.word_cache.table import PADDING_BYTES, UnitTable, unit_keys
from data_pipeline.word_cache.unbroken import encode_unbroken

LLAMA2 = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer" / "llama2.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

HARD = [
    *("", " ", "  ", "\n", "\n\n", " \n ", "   \n   x", "x", " x", "x ", "x  y", "\t\tx\t", "\r\n\r\nx\r\n"),
    *("a\x00b", "\x00", "th\x00", "th", "th\x00\x00", "\x1f \x1e\x1f", "\ufeffBOM", "\u2028\u2029\x85\u00a0x"),
    *("e\u0301\u0301o\u0308", "\U0001f600\U0001f468\u200d\U0001f469", "\ufffd\ufffd"),
    *("\u2581", "\u2581\u2581x", "x\u2581y", " \u2581 x\n\u2581"),
    *("<s>a</s>", "<unk><0x0A>", "<0x0A>\n<0x20>"),
    *("def f(x):\n    return  {'a': [1, 2.5],\n\t'b': x}", "the quick  brown\n\nfox", "CamelCase"),
    *("слово за словом", "漢字かな交じり文。한국어", "ประเทศไทย"),
    *("abcdefghijklmnopqrstuvwxyz"[:n] for n in (7, 8, 9, 13, 14, 15, 16)),  # about the size of a key
    *(" " * n + "x" for n in (13, 14, 15, 16, 17, 255, 256, 4_094, 4_095, 4_096, 4_097)),
    *("a" * 5_000, "=" * 300 + "\n" + "-" * 79, "ab" * 40_000, "é" * 40_000, "€" * 30_000),
    # about the size of a window
    *(" " * 65_535 + "x", " " * 70_000 + "x", "\n" * 70_000, "x" * 65_535 + " y", "x" * 65_536 + "\ny"),
]


def train(**options) -> ModelProto:
    """A model learnt from a few sentences: byte fallback, no normalising, digits by themselves, runs of spaces."""
    settings = {
        **dict(model_type="bpe", vocab_size=600, byte_fallback=True, minloglevel=2, num_threads=1),
        **dict(normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False),
        **dict(allow_whitespace_only_pieces=True, split_digits=True),
        **options,
    }
    sentences = ["the quick brown fox jumps over the lazy dog", "        return self.value_of(other)  # the same"]
    sentences += ["она сказала: слово за словом", "if (a == b) { c += 1; }", "aaaa aaaaaaaa ==== -----", "THE Theory"]
    writer = io.BytesIO()
    learn = sentencepiece.SentencePieceTrainer.train
    learn(sentence_iterator=iter(sentences * 20), model_writer=writer, **settings)
    return ModelProto.FromString(writer.getvalue())


def proto(pieces: dict[str, int], **normalizer) -> ModelProto:
    """A model of the given pieces and types, and the 256 byte pieces."""
    model = ModelProto()
    for text, kind in {**pieces, **{f"<0x{byte:02X}>": 6 for byte in range(256)}}.items():
        model.pieces.add(piece=text, score=0.0, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    settings = dict(name="identity", remove_extra_whitespaces=False, escape_whitespaces=True, **normalizer)
    for name, value in settings.items():
        setattr(model.normalizer_spec, name, value)
    return model


def letters_model() -> ModelProto:
    """All pairs of a..h are pieces, so that words have no borders; with the scores of BPE, the first merge highest."""
    letters = "abcdefgh"
    pieces = [first + second for first in letters for second in letters] + ["abab", "hgfe", "aaaa", "\u2581a"]
    model = proto({"<unk>": UNKNOWN, **dict.fromkeys([*pieces, *letters, "\u2581"], NORMAL)})
    order = random.Random(0).sample(range(len(model.pieces)), len(model.pieces))
    for piece, score in zip(model.pieces, order):
        piece.score = -score
    return model


def plain(model: ModelProto) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.fixture(scope="module", params=["trained", "no_prefix", "user_defined", "unsplit", "letters", "llama2"])
def model(request) -> ModelProto:
    """Models that qualify, unlike each other in what a piece may hold."""
    if request.param == "llama2":
        if not LLAMA2.is_file():
            pytest.skip("no ../shared/data with the LLaMA-2 tokenizer")
        return ModelProto.FromString(LLAMA2.read_bytes())
    if request.param == "letters":
        return letters_model()
    return train(
        **{
            "trained": {},
            "no_prefix": dict(add_dummy_prefix=False),
            "user_defined": dict(user_defined_symbols=["<x>", "==>", "\u2581\u2581\u2581\u2581", "=" * 40]),
            "unsplit": dict(split_by_unicode_script=False, split_digits=False, split_by_number=False, vocab_size=500),
        }[request.param]
    )


# --- the same ids ---


def assert_same(model: ModelProto, texts: list[str], cache: WordCache | None = None) -> WordCache:
    assert not objections(model)
    cache = cache or WordCache(model)
    assert_ids(texts, cache.encode(texts), plain(model).encode(texts))
    return cache


def assert_ids(texts: list[str], arrays: list[np.ndarray], expected: list[list[int]]) -> None:
    assert [array.dtype for array in arrays] == [np.int32] * len(texts)
    for text, ids, right in zip(texts, arrays, expected):
        assert ids.tolist() == right, repr(text[:200])


def test_hard_texts(model):
    expected = plain(model).encode(HARD)
    cache = WordCache(model)
    assert_ids(HARD, cache.encode(HARD), expected)
    assert_ids(HARD, [cache.encode([text])[0] for text in HARD], expected)  # one by one, and known by now
    assert cache.encode([]) == []


def fuzz_texts(model: ModelProto, count: int, seed: int) -> list[str]:
    """Texts of pieces of the vocabulary, hard strings, characters of all planes, and repetitions of all these."""
    rng = random.Random(seed)
    pieces = [piece.piece.replace("\u2581", rng.choice((" ", "\u2581"))) for piece in model.pieces]
    hard = [text for text in HARD if 0 < len(text) < 100]
    ascii_only = [chr(i) for i in range(128)]

    def part() -> str:
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(pieces)
        if kind < 0.7:
            return rng.choice(hard)
        if kind < 0.85:
            return rng.choice(ascii_only)
        if kind < 0.9:
            return rng.choice(" \n\t") * rng.randrange(1, 20)
        if kind < 0.95:
            return chr(rng.choice((rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000))))
        return rng.choice(pieces) * rng.randrange(2, 30)

    return ["".join(part() for _ in range(rng.randrange(1, 16))) for _ in range(count)]


@pytest.mark.parametrize("strings", [4_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_fuzz(model, strings):
    cache = WordCache(model, short_units=300, long_units=30)
    for seed in range(-(-strings // 1_000)):
        assert_same(model, fuzz_texts(model, min(strings, 1_000), seed), cache)
    assert cache.statistics().cleared > 0


def test_documents_are_encoded_apart_and_the_end_of_a_window_is_none():
    model = train()
    rng = random.Random(0)
    words = [piece.piece.replace("\u2581", " ") for piece in model.pieces if piece.type == NORMAL] + ["\n", "    "]
    texts = ["".join(rng.choices(words, k=rng.choice((0, 1, 3, 30_000)))) for _ in range(40)]
    assert sum(map(len, texts)) > 5 * 65_536
    assert_same(model, texts)


# --- statistics, bounds ---


def test_statistics_count_what_sentencepiece_was_asked_for():
    cache = WordCache(train())
    cache.encode(["fox 1\n", "fox 1"])
    # " fox", " ", "1", "\n", end; " fox", " ", "1", end, with a prefix and a mark for each document
    assert cache.statistics().units == 9
    assert cache.statistics().encoded_units == 3
    assert cache.statistics().encoded_bytes == len(" fox" + " " + "1")
    assert cache.statistics().text_bytes == len(" fox 1\n|" + " fox 1|")
    assert cache.statistics().entries == 3 + 2  # and the newline and the mark, known from the start
    assert cache.statistics().hit_rate == 1 - 3 / 9
    cache.encode(["fox 1"])
    assert cache.statistics().encoded_units == 3


@pytest.mark.parametrize("limits", [dict(short_units=50), dict(long_units=50), dict(pool_ids=200)])
def test_a_full_cache_begins_anew_and_ids_stay_right(limits):
    model = letters_model()
    cache = WordCache(model, **limits)
    rng = random.Random(1)
    for _ in range(20):
        words = ["".join(rng.choices("abcdefgh", k=rng.choice((5, 20)))) for _ in range(200)]
        assert_same(model, [" ".join(words)], cache)
        assert 150 < cache.statistics().entries < 250
    assert cache.statistics().cleared == 19


def test_very_long_units_are_not_remembered():
    model = letters_model()
    cache = assert_same(model, ["ab" * 31 + "c", "ab" * 32])  # 64 and 65 bytes with the prefix
    assert (cache.statistics().entries, cache.statistics().encoded_units) == (2 + 1, 2)
    assert_same(model, ["ab" * 32, "ab" * 31 + "c"], cache)
    assert (cache.statistics().entries, cache.statistics().encoded_units) == (2 + 1, 3)


# --- the parts ---


def test_borders_are_where_no_piece_holds_both_sides():
    pieces = {"ab": NORMAL, "\u2581a": NORMAL, "c\u00e9": USER_DEFINED, "d": NORMAL, "\u2581\u2581": NORMAL}
    table = border_table(proto({**pieces, "bd": CONTROL}))

    def is_border(left: bytes, right: bytes) -> bool:
        return bool(table[left[0] + 256 * right[0]])

    accented = "\u00e9".encode()
    assert not is_border(b"a", b"b") and is_border(b"b", b"a")
    assert not is_border(b" ", b"a") and is_border(b"a", b" ")
    assert not is_border(b"c", accented[:1]) and not is_border(accented[:1], accented[1:])
    assert is_border(b"d", b"d") and is_border(b"b", b"d") and is_border(b"\n", b"\n") and is_border(b"d", b"\n")
    assert not is_border(b" ", b" ")
    assert is_border(b"\xff", b" ") and is_border(b" ", b"\xff") and is_border(b"\xff", b"\xff")
    # every byte pair but a-b, space-a, c-e, within e, space-space, and those whose second byte continues a character
    assert table.sum() == 256 * (256 - 64) - 4 + 64  # the mark is a border before those 64 too: no text has that


def test_widths_are_the_bytes_that_ids_stand_for():
    model = proto({"<unk>": UNKNOWN, "\u2581a": NORMAL, "\u00e9": USER_DEFINED, "</s>": CONTROL})
    assert piece_widths(model)[:5].tolist() == [0, 2, 2, 0, 0]


def test_keys_are_the_bytes_behind_the_spaces_and_both_lengths():
    data = b"ab   cdefghijk xyz\xff"
    size = len(data)
    data += bytes(PADDING_BYTES + -size % 8)
    low, high = unit_keys(data, np.array([0, 5, 15]), np.array([2, 14, 18]), np.array([0, 3, 1]))
    assert low.tolist() == [int.from_bytes(text, "little") for text in (b"ab", b"cdefghij", b"xyz")]
    assert high.tolist() == [2 << 48, ord("k") | 9 << 48 | 3 << 52, 3 << 48 | 1 << 52]


def test_keys_differ_where_units_do():
    units = [bytes([97]) * size for size in range(1, 15)] + [b"a" + bytes(size) for size in range(1, 14)] + [bytes(3)]
    units += [b"abcdefgh" + bytes([byte]) for byte in (0, 1, 255)] + [b"abcdefghijklmn"]
    seen = set()
    for unit in units:
        for offset in range(8):  # wherever it begins in a word of memory
            data = b"\xaa" * offset + unit + b"\xbb" * 40
            data += bytes(-len(data) % 8)
            low, high = unit_keys(data, np.array([offset]), np.array([offset + len(unit)]), np.array([0]))
            seen.add((unit, int(low[0]), int(high[0])))
    assert len(seen) == len(units) == len({key[1:] for key in seen})


def test_table_finds_what_was_inserted_and_nothing_else():
    rng = np.random.default_rng(0)
    table = UnitTable(300)
    low = rng.permutation(4_000).astype(np.uint64)
    high = np.ones(4_000, dtype=np.uint64)
    for start in range(0, 300, 100):
        part = slice(start, start + 100)
        table.insert(low[part], high[part], np.arange(start, start + 100))
        values, missing = table.find(low, high)
        assert sorted(missing.tolist()) == list(range(start + 100, 4_000))
        assert values[: start + 100].tolist() == list(range(start + 100))
        assert table.entries == start + 100
    table.clear()
    assert table.find(low, high)[1].size == 4_000


def test_table_tells_units_of_one_slot_apart():
    table = UnitTable(2)  # 4 slots: keys meet
    low, high = np.array([1, 2, 3], dtype=np.uint64), np.array([7, 7, 7], dtype=np.uint64)
    table.insert(low, high, np.array([10, 20, 30]))
    values, missing = table.find(np.array([3, 1, 2], dtype=np.uint64), high)
    assert (values.tolist(), missing.tolist()) == ([30, 10, 20], [])
    assert table.find(np.array([1], dtype=np.uint64), np.array([8], dtype=np.uint64))[1].tolist() == [0]


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_spans_join_to_the_ids_of_one_call(model, count):
    unprefixed = ModelProto()
    unprefixed.CopyFrom(model)
    unprefixed.normalizer_spec.add_dummy_prefix = False
    processor = plain(unprefixed)
    width_V = piece_widths(model)
    calls: list[int] = []

    def encode(data: bytes) -> np.ndarray:
        calls.append(len(data))
        return np.array(processor.encode(data.decode()), dtype=np.int32)

    rng = random.Random(2)
    pieces = [piece.piece for piece in model.pieces if piece.type == NORMAL]
    span = 6 * max(100, int(width_V.max()))
    for _ in range(count):
        kind = rng.randrange(3)
        if kind == 0:
            text = "".join(rng.choices(pieces, k=500)).replace("\u2581", rng.choice(("", " ")))
        elif kind == 1:
            text = "".join(rng.choices("abcdef=", k=4_000))
        else:
            text = rng.choice(pieces).replace("\u2581", " ") * 1_500
        whole = encode(text.encode())
        calls.clear()
        assert encode_unbroken(text.encode(), encode, width_V, span=span, margin=100).tolist() == whole.tolist()
        assert max(calls) <= span


def test_a_text_without_seams_is_encoded_whole():
    processor = plain(letters_model())

    def encode(data: bytes) -> np.ndarray:
        return np.array(processor.encode(data.decode()), dtype=np.int32)

    data = ("\u6f22" * 1_000).encode()  # every id is a byte's
    ids = encode_unbroken(data, encode, piece_widths(letters_model()), span=200, margin=20)
    assert ids.tolist() == encode(data).tolist()


# --- models that do not qualify ---


def test_what_speaks_against_a_model():
    assert objections(proto({"ab": NORMAL, "\u2581\u2581ab": NORMAL, "\n": NORMAL})) == []
    assert objections(train(model_type="unigram", vocab_size=320)) == ["its type is UNIGRAM, not BPE"]
    assert objections(train(normalization_rule_name="nmt_nfkc")) == ["it normalises text (nmt_nfkc)"]
    assert objections(train(remove_extra_whitespaces=True)) == ["it removes repeated spaces"]
    assert objections(train(byte_fallback=False)) == ["it has no byte fallback"]
    suffix = objections(train(treat_whitespace_as_suffix=True))
    assert suffix[0] == "it puts the word mark behind words"
    assert "holds a word mark behind another character" in suffix[1]
    spaced = objections(train(user_defined_symbols=["a b", "x\n"]))
    assert spaced == [
        "its piece 'a b' holds a space that is no word mark",
        "its piece 'x\\n' holds a newline",
    ]
    crossing = proto({"a": NORMAL, "a\u2581": NORMAL, "\u2581a\u2581b": USER_DEFINED, "x": UNUSED})
    assert objections(crossing) == [
        "it has pieces marked unused",
        "its piece 'a\u2581' holds a word mark behind another character",
    ]
    unescaped = proto({"a": NORMAL})
    unescaped.normalizer_spec.escape_whitespaces = False
    assert objections(unescaped) == ["it does not escape spaces"]


def test_control_and_byte_pieces_are_never_in_a_text():
    assert objections(proto({"<a b\n>": CONTROL, "<unk> \u2581": UNKNOWN})) == []
