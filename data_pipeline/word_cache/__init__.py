"""SentencePiece BPE at several times its speed: the same ids, because no merge can cross where text is cut.

BPE joins neighbouring symbols whenever the joined string is a piece. Where two characters stand side by side in no
piece of the vocabulary, no merge can ever reach across, so both sides may be encoded apart (`borders`). Cut there,
real text falls into units of three bytes in the mean, and nearly all of them have been seen before (`table`). So

    1. texts are laid end to end as UTF-8, with a byte between them that occurs in no UTF-8 text;
    2. 64 KiB at a time, borders are found by a table of byte pairs;
    3. all units of a window are looked up at once, by their bytes (not by a hash of them alone);
    4. the few that are new are encoded by SentencePiece and remembered;
    5. the ids of all units, one behind the other, are the ids of the texts.

Steps 2, 3 and 5 are numpy operations on whole windows: no Python object is made for a unit that is known.
A unit too long for a window, such as a megabyte of one letter, is encoded in overlapping spans (`unbroken`).

`objections` tells which models this is proven for; all others must be encoded plainly.
"""

from __future__ import annotations

from data_pipeline.word_cache.borders import ModelProto, objections
from data_pipeline.word_cache.cache import CacheStatistics, WordCache

__all__ = ["CacheStatistics", "ModelProto", "WordCache", "objections"]
