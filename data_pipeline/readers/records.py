"""One line of a raw file -> a JSON object -> a text that can be tokenised, or a reason why not.

The fields beside the text differ from corpus to corpus and from version to version, so only the text must be
sound: NaN or a lone surrogate somewhere in the metadata does not cost the document. Where a key is given
twice the last one counts, as with every common JSON parser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import orjson

from data_pipeline.document import DataError, RawFile
from data_pipeline.readers.opener import read_lines
from data_pipeline.readers.tables import is_table, read_rows

_FIRST_RECORDS = 1_000
_FIRST_BYTES = 1 << 18


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object on `line`. Raises `DataError` with the reason when there is not exactly one."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = _parse_leniently(line)
    if not isinstance(value, dict):
        raise DataError(f"not a JSON object but {_kind(value)}")
    return value


def _parse_leniently(line: bytes) -> Any:
    """A line orjson refuses, by the standard library: it takes NaN and words its errors better."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x}"
        raise DataError(f"not valid UTF-8: {byte} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        several = ": several objects on one line" if error.msg == "Extra data" else ""
        raise DataError(f"not valid JSON: {error.msg} (character {error.pos + 1}){several}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        raise DataError(f"not usable JSON: {error}") from error


def first_records(raw_file: RawFile) -> Iterator[Mapping[str, Any]]:
    """The records at the start of a file (256 KiB, at most 1,000), to tell what it holds; bad lines left out."""
    if is_table(raw_file.path):
        yield from islice(read_rows(raw_file.path, 0), _FIRST_RECORDS)
        return
    for line, end in islice(read_lines(raw_file.path, span=raw_file.span), _FIRST_RECORDS):
        try:
            yield parse_object(line)
        except DataError:
            pass  # a blank or a bad line: it is counted when the file is read
        if end > _FIRST_BYTES:
            return


def text_of(record: Mapping[str, Any]) -> str:
    """The field `text` of `record`: a non-empty string, encodable as UTF-8. Raises `DataError` otherwise."""
    if "text" not in record:
        raise DataError(f"no field 'text' (fields: {', '.join(map(repr, list(record)[:10])) or 'none'})")
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f"field 'text' is {_kind(text)}, not a string")
    if not text:
        raise DataError("field 'text' is empty")
    place = None if text.isascii() else lone_surrogate(text)
    if place is not None:
        raise DataError(f"text holds the lone surrogate U+{ord(text[place]):04X} at character {place + 1}")
    return text


def lone_surrogate(text: str) -> int | None:
    """Index of the first lone surrogate, which JSON can spell but UTF-8 cannot encode; None without one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]
