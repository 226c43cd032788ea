"""Ways in which raw files go wrong: in their bytes as stored, in their content, and in one of their lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import zstandard

LONG_LINE_BYTES = 50_000_000

Mutation = Callable[[Random, bytes], bytes]


def unpacked(path: Path) -> bytes:
    """The content of a raw file, by nothing that the readers use. Whatever its library raises where it is damaged."""
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    if path.suffix == ".zst":
        with open(path, "rb") as stored:
            unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            return unpacker.stream_reader(stored, read_across_frames=True).read()
    return path.read_bytes()


# --- bytes as stored ---


def _flip_bits(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def _cut_out(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data))
    return data[:start] + data[start + random.randint(1, 100) :]


def _overwrite_with_zeros(random: Random, data: bytes) -> bytes:
    start, length = random.randrange(len(data)), random.randint(1, 1000)
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]


def _append(random: Random, data: bytes) -> bytes:
    return data + random.choice([random.randbytes(random.randint(1, 50)), bytes(random.randint(1, 600)), data])


STORED: dict[str, Mutation] = {
    "bits flipped": _flip_bits,
    "truncated": _truncate,
    "bytes cut out": _cut_out,
    "a block of zeros": _overwrite_with_zeros,
    "bytes appended": _append,
}

# --- content ---


def _encode_otherwise(random: Random, content: bytes) -> bytes:
    encoding = random.choice(["utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp1252", "shift_jis"])
    return content.decode(errors="replace").encode(encoding, errors="replace")


def _end_lines_otherwise(random: Random, content: bytes) -> bytes:
    return content.replace(b"\n", random.choice([b"\r\n", b"\r", b"\n\n \n", b"\xe2\x80\xa8", b"\x0c\n", b" "]))


CONTENT: dict[str, Mutation] = {
    "another encoding": _encode_otherwise,
    "other line ends": _end_lines_otherwise,
    "content truncated": _truncate,
    "content packed twice": lambda random, content: random.choice([gzip.compress, zstandard.compress])(content),
}

# --- one line ---


def _insert(*choices: bytes) -> Mutation:
    def mutate(random: Random, line: bytes) -> bytes:
        place = random.randint(0, len(line))
        return line[:place] + random.choice(choices) * random.randint(1, 3) + line[place:]

    return mutate


def _with_text(*choices: bytes) -> Mutation:
    return lambda random, line: b'{"id": "x", "text": %s, "meta": {}}' % random.choice(choices)


def _without_a_field(random: Random, line: bytes) -> bytes:
    try:
        record = json.loads(line)
        del record[random.choice(list(record))]
    except (ValueError, TypeError, IndexError, LookupError):
        return b"{}"
    return json.dumps(record, ensure_ascii=random.random() < 0.5).encode()


def _nest(random: Random, line: bytes) -> bytes:
    depth = random.choice([3, 50, 100_000])
    return random.choice(
        [
            b'{"text": ' + b"[" * depth + b"]" * depth + b"}",
            b'{"text": "a", "meta": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
            b'{"record": ' + line + b"}",
            b"[" + line + b"]",
            json.dumps({"text": line.decode(errors="replace")}).encode(),
            json.dumps(line.decode(errors="replace")).encode(),
        ]
    )


def _double_keys(random: Random, line: bytes) -> bytes:
    extra = random.choice([b'"text": "first"', b'"text": null', b'"text": ""', b'"meta": 1, "meta": 2', b'"id": 7'])
    inside = line.strip()[1:-1]
    return b"{" + b", ".join(random.sample([extra, inside], 2)) + b"}"


_ODD_NUMBERS = (b"1" * 5000, b"1e999", b"-Infinity", b"NaN", b"01")
LINE: dict[str, Mutation] = {
    "NUL bytes": _insert(b"\0", b"\0\0\0", b"\\u0000"),
    "lone surrogates": _insert(b"\\ud800", b"\\udfff", b"\xed\xa0\x80", b"\\udc00\\ud800"),
    "bytes that are no UTF-8": _insert(b"\xff", b"\xc3", b"\xe2\x28\xa1", b"\xf4\x90\x80\x80"),
    "an empty or wrong text": _with_text(b'""', b"null", b"0", b"[]", b"{}", b"true", b"NaN", b'"\\ud83d"', b""),
    "a missing field": _without_a_field,
    "nested JSON": _nest,
    "keys twice": _double_keys,
    "line broken or joined": _insert(b"\n", b"} {", b"\r", b"\n\n"),
    "odd numbers": lambda random, line: b'{"n": %s, ' % random.choice(_ODD_NUMBERS) + line[1:],
}


def _lengthen(random: Random, line: bytes) -> bytes:
    pair = random.choice([b"xx", b"x ", b"\xc3\xa9"])
    filler = pair * (LONG_LINE_BYTES // 2)
    return random.choice([b'{"text": "%s"}' % filler, b'{"text": "a", "meta": "%s"}' % filler, filler])


KINDS = [*STORED, *CONTENT, *LINE]
LONG_LINE = "a line of 50 MB"


def mutate(path: Path, kind: str, random: Random) -> None:
    """Change the file at `path` in place; all choices are `random`'s."""
    if kind in STORED:
        path.write_bytes(STORED[kind](random, path.read_bytes()))
        return
    content = unpacked(path)
    if kind in CONTENT:
        content = CONTENT[kind](random, content)
    else:
        lines = content.rstrip(b"\n").split(b"\n")
        count = 1 if kind == LONG_LINE else min(len(lines), random.randint(1, 3))
        for place in random.sample(range(len(lines)), count):
            lines[place] = (_lengthen if kind == LONG_LINE else LINE[kind])(random, lines[place])
        content = b"\n".join(lines) + b"\n" * random.randint(0, 1)
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(content)
    path.write_bytes(packed)
