"""Which corpus a record certainly comes from, so that swapped locations are refused instead of trained on.

Only what no other corpus has counts: the fields as published, or a field that names the corpus. A record
without such a sign (a text alone, a corpus converted by its user) may be anything and is never refused.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import orjson

from data_pipeline.document import DataError

_MAX_META_CHARACTERS = 10_000
"""A longer `meta` is not looked into: evaluating a literal takes many times its size in memory."""

_REDPAJAMA_META = (
    {"timestamp", "url", "language", "source"},
    {"timestamp", "yymm", "arxiv_id", "language", "url"},
    {"title", "url", "language", "timestamp"},
    {"language", "url", "timestamp", "source", "question_score"},
)
_REDPAJAMA_FLAT = {"pred_label", "pred_label_prob", "wiki_prob"}
_DOLMA_FIELDS = {"id", "source", "added", "created", "metadata"}


def meta_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The field `meta` as a mapping: as it is, or from the JSON or the Python literal some hub forms made of it.

    Empty where there is none, or none that can be understood.
    """
    meta = record.get("meta")
    if isinstance(meta, str):
        meta = _parsed(meta) if len(meta) <= _MAX_META_CHARACTERS else None
    return meta if isinstance(meta, dict) else {}


@lru_cache(maxsize=1024)
def _parsed(meta: str) -> Any:
    try:
        return orjson.loads(meta)
    except orjson.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(meta)  # a literal only: nothing in it is run
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def pile_set_of(record: Mapping[str, Any]) -> str | None:
    """The set of the Pile a record names; None where it names none."""
    named = _named(record, "pile_set_name", "pile_set_name")
    return named if isinstance(named, str) else None


def redpajama_set_of(record: Mapping[str, Any]) -> str | None:
    """What a record of RedPajama's hub form or of SlimPajama calls its subset; None where it names none."""
    named = _named(record, "red_pajama_subset", "redpajama_set_name")
    return None if named is None else str(named)


def _named(record: Mapping[str, Any], field: str, meta_field: str) -> Any:
    if field in record:
        return record[field]
    meta = record.get("meta")
    if meta is None or (isinstance(meta, str) and meta_field not in meta):  # spares parsing it
        return None
    return meta_of(record).get(meta_field)


def look_of(record: Mapping[str, Any]) -> str | None:
    """`redpajama`, `dolma` or `pile` where that is certain."""
    if pile_set_of(record):
        return "pile"
    if redpajama_set_of(record):
        return "redpajama"
    fields = set(record)
    if "id" not in fields:
        meta = set(meta_of(record))
        return "redpajama" if meta in _REDPAJAMA_META or fields >= _REDPAJAMA_FLAT else None
    renamed = "pajama" in str(record.get("source")).lower() or "meta" in fields
    return "dolma" if fields >= _DOLMA_FIELDS and not renamed else None


def refuse_another_look(record: Mapping[str, Any], corpus: str, path: str) -> None:
    """Raise `DataError` where a record given as `corpus` is certainly of another one."""
    look = look_of(record)
    if look not in (None, corpus):
        fields = ", ".join(islice(map(repr, record), 10))
        raise DataError(
            f"{path} was given as {corpus}, but its first record is one of {look} (fields {fields}); give its"
            f" location as {look}"
        )
