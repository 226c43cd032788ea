"""Standard-library text -> records in the schemas of RedPajama, Dolma and the Pile, each with its own look.

    1. Modules and topics come in the order of a keyed hash, so that any prefix is a fair mixture of them.
    2. A topic becomes book chapters. A module belongs to the Pile (one in five) or to Dolma and RedPajama:
       Dolma gets its code, RedPajama's subsets share out its docstrings and comments.
    3. It ends when there is text enough and every label has documents.

    book            chapters of pydoc's topics
    arxiv           LaTeX: a section on a module, items for its briefly documented functions
    wikipedia       encyclopedic entries on classes
    stackexchange   "Q: ... A: ..." about the longer function docstrings
    c4              comments as unwrapped paragraphs
    common_crawl    comments as they stand, among a page's navigation
    dolma/*         whole source files without their prose: modules, network, packages
    pile            single definitions (Github), docstrings and comments (Pile-CC)
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.document import DataError
from data_pipeline.sample.texts import (
    Definition,
    Module,
    Topic,
    library_folder,
    module_files,
    read_module,
    topics,
)

LABELS = (
    *("redpajama/book", "redpajama/arxiv", "redpajama/wikipedia", "redpajama/stackexchange"),
    *("redpajama/c4", "redpajama/common_crawl"),
    *("dolma/modules", "dolma/network", "dolma/packages", "pile"),
)
"""Every source label of the sample."""

MIN_DOCUMENTS = 4
"""Documents each label has at least, however small the sample."""

_MIN_CHARACTERS = 80
_LONG_DOCSTRING = 160
_CHAPTER_CHARACTERS = 4000
_NETWORK = frozenset(
    # packages and modules that no distribution of Python splits off
    ("asyncio", "email", "ftplib", "html", "http", "imaplib", "mailbox", "poplib", "selectors", "smtplib")
    + ("socket", "socketserver", "ssl", "urllib", "wsgiref", "xml", "xmlrpc")
)
_DATE = "2023-01-01T00:00:00"
_LIBRARY_URL = f"https://docs.python.org/{sys.version_info.major}.{sys.version_info.minor}/library"

Record = dict[str, Any]


def compose(megabytes: float) -> dict[str, list[Record]]:
    """Label of `LABELS` -> its records, together about `megabytes` million bytes of text, or all there is.

    Raises `DataError` when this installation has too little source text, as embedded ones without sources do.
    """
    limit = int(megabytes * 1e6)
    corpora: dict[str, list[Record]] = {label: [] for label in LABELS}
    seen: set[bytes] = set()
    size = 0
    for unit in _units():
        if size >= limit and all(len(records) >= MIN_DOCUMENTS for records in corpora.values()):
            return corpora
        new = [(label, record) for label, record in _records(unit) if _is_new(record["text"], seen)]
        text_bytes = sum(len(record["text"].encode()) for _, record in new)
        if text_bytes > limit / 8:
            continue  # one huge file would be most of a small sample
        size += text_bytes
        for label, record in new:
            corpora[label].append(record)
    poor = [label for label, records in corpora.items() if len(records) < MIN_DOCUMENTS]
    if poor:
        raise DataError(
            f"the standard library in {library_folder()} has too little source text for {', '.join(poor)} "
            "(data_pipeline.sample); use a Python installation that has the library's .py files"
        )
    return corpora


def _units() -> Iterator[Module | Topic]:
    named: list[tuple[str, Path | Topic]] = [(f"topic {topic.name}", topic) for topic in topics()]
    named += module_files(library_folder())
    for name, unit in sorted(named, key=lambda pair: _hash(pair[0])):
        module = unit if isinstance(unit, Topic) else read_module(name, unit)
        if module is not None:
            yield module


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"moepp sample").digest()
    return int.from_bytes(digest, "big")


def _is_new(text: str, seen: set[bytes]) -> bool:
    """False for texts too short to be a document and for repetitions, such as licence notices."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if len(text) < _MIN_CHARACTERS or digest in seen:
        return False
    seen.add(digest)
    return True


def _records(unit: Module | Topic) -> Iterator[tuple[str, Record]]:
    if isinstance(unit, Topic):
        yield from _book(unit)
    elif _hash(f"owner {unit.name}") % 5 == 0:
        yield from _pile(unit)
    else:
        yield from _arxiv(unit)
        yield from _wikipedia(unit)
        yield from _stackexchange(unit)
        yield from _web(unit)
        yield from _dolma(unit)


def _book(topic: Topic) -> Iterator[tuple[str, Record]]:
    chapters = _cut(topic.text, _CHAPTER_CHARACTERS)
    for number, chapter in enumerate(chapters, start=1):
        meta = {
            "short_book_title": f"The Python Language Reference: {topic.name}",
            "publication_date": int(_DATE[:4]),
            "url": f"https://docs.python.org/3/reference/{topic.name.lower()}.html#{number}",
        }
        yield "redpajama/book", {"meta": meta, "text": chapter}


def _cut(text: str, characters: int) -> list[str]:
    """`text` in pieces of at least `characters`, cut between paragraphs; the last piece may be shorter."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) >= characters:
            pieces.append("")
        pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
    return pieces


def _arxiv(module: Module) -> Iterator[tuple[str, Record]]:
    brief = [d for d in module.definitions if 0 < len(d.docstring) < _LONG_DOCSTRING and not d.is_class]
    label = module.name.replace(".", "-")
    parts = [f"\\section{{The module {_texttt(module.name)}}}\\label{{sec:{label}}}"]
    if module.docstring:
        parts.append(_latex(module.docstring))
    if brief:
        items = [f"\\item {_texttt(d.signature)}. {_latex(_unwrapped(d.docstring))}" for d in brief]
        parts += ["\\subsection{Definitions}\n\\begin{itemize}", *items, "\\end{itemize}"]
    if len(parts) > 1:
        meta = {"timestamp": _DATE, "yymm": "2301", "arxiv_id": module.name, "language": "en"}
        meta["url"] = f"{_LIBRARY_URL}/{module.name}.html"
        yield "redpajama/arxiv", {"text": "\n".join(parts) + "\n", "meta": meta}


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "\\backslash "))


def _texttt(text: str) -> str:
    return f"\\texttt{{{_latex(text)}}}"


def _wikipedia(module: Module) -> Iterator[tuple[str, Record]]:
    for definition in module.definitions:
        if definition.is_class and definition.docstring:
            title = f"{definition.name} ({module.name})"
            text = f"{title}\n\n{_unwrapped(definition.docstring)}\n\nDefinition\n{definition.signature}\n"
            url = f"{_LIBRARY_URL}/{module.name}.html#{definition.name}"
            yield "redpajama/wikipedia", {"text": text, "meta": _meta(url, title=title)}


def _stackexchange(module: Module) -> Iterator[tuple[str, Record]]:
    for definition in module.definitions:
        if not definition.is_class and len(definition.docstring) >= _LONG_DOCSTRING:
            what = "method" if definition.is_nested else "function"
            question = f"Q: What does the {what} {definition.name} of {module.name} do?"
            text = f"{question}\n{definition.signature}\n\nA: {definition.docstring}"
            url = f"{_LIBRARY_URL}/{module.name}.html#{definition.name}"
            meta = _meta(url, source="stackexchange", question_score=str(len(definition.docstring) % 100))
            yield "redpajama/stackexchange", {"text": text, "meta": meta}


def _web(module: Module) -> Iterator[tuple[str, Record]]:
    """c4 for two modules of three, common_crawl for the third."""
    url = f"{_LIBRARY_URL}/{module.name}.html"
    if not module.comments:
        return
    if _hash(f"web {module.name}") % 3:
        text = "\n".join(_unwrapped(comment) for comment in module.comments)
        yield "redpajama/c4", {"text": text, "meta": _meta(url, source="c4")}
        return
    names = [d.name for d in module.definitions if not d.is_nested and not d.name.startswith("_")]
    navigation = " | ".join(["Home", *module.name.split("."), *names[:8], "Index", "Contact"])
    yield "redpajama/common_crawl", {
        "pred_label": "__label__cc",
        "pred_label_prob": 0.5,
        "wiki_prob": 0.5,
        "text": f"{navigation}\n" + "\n".join(module.comments),
        "source": f"cc/2023-06/en_head_0000.json.gz/line{_hash(module.name) % 10**6}",
    }


def _meta(url: str, **more: str) -> Mapping[str, str]:
    return {"timestamp": _DATE, "url": url, "language": "en", **more}


def _dolma(module: Module) -> Iterator[tuple[str, Record]]:
    package, dot, _ = module.name.partition(".")
    folder = "network" if package in _NETWORK else "packages" if dot else "modules"
    yield f"dolma/{folder}", {
        "id": f"python-{module.name}",
        "text": module.code,
        "source": f"python-{folder}",
        "added": f"{_DATE}.000Z",
        "created": f"{_DATE}.000Z",
        "metadata": {"module": module.name, "length": len(module.code)},
    }


def _pile(module: Module) -> Iterator[tuple[str, Record]]:
    prose = "\n\n".join(part for part in (module.docstring, *module.comments) if part)
    if prose:
        yield "pile", {"text": f"{module.name}\n\n{prose}", "meta": {"pile_set_name": "Pile-CC"}}
    for definition in _outermost(module.definitions):
        yield "pile", {"text": definition.source, "meta": {"pile_set_name": "Github"}}


def _outermost(definitions: tuple[Definition, ...]) -> Iterator[Definition]:
    return (definition for definition in definitions if not definition.is_nested)


def _unwrapped(text: str) -> str:
    """Each paragraph on one line; indented paragraphs are code and keep their lines."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n".join(p if p[:1].isspace() else " ".join(p.split()) for p in paragraphs)


def as_line(record: Record) -> bytes:
    """One line of a JSON lines file, with its newline."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
