"""What training may ask of the rows it is fed, wherever they come from: prepared shards or raw files.

A source of rows is a pure function of the row's index. Where rows are made while training goes on, three calls
let it work ahead and clean up behind: `seek` before the first rows of a resumed run, `release` of rows that are
not asked for again, and `position`, what a checkpoint has to carry for `seek`. A prepared set needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from data_pipeline.manifest import TokenizerInfo
from data_pipeline.stages import StagedMixture


class Rows(Protocol):
    """What a `Loader` needs."""

    seq_len: int
    """S: targets of a row, which holds one token more."""
    fingerprint: str
    """Equal exactly when `order` is."""
    order: dict[str, Any]
    """Everything the order of rows depends on, by name, as JSON values."""
    drawn_by: dict[str, Any]
    """The keys of the recipe that the mixture in `order` was made of, as the recipe has them."""

    @property
    def rows_total(self) -> int | None:
        """Rows until a source's `max_epochs` ends the stream; None is without end."""

    @property
    def rows_ahead(self) -> int | None:
        """So many rows from the first that is not released on may surely be asked for; None is without end."""

    def rows(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens of rows, int64 [n, S + 1]: a new array, or `out`, of that shape and any type that holds the ids."""

    def sources(self, indices: np.ndarray) -> np.ndarray:
        """Source of each row, int64 [n]."""

    def seek(self, row: int, position: Mapping[str, Any]) -> None:
        """Get ready for rows from `row` on; `position` is that of the checkpoint. Before the first `rows`."""

    def release(self, row: int) -> None:
        """Rows below `row` are not asked for again. May be called while another thread waits in `rows`."""

    def position(self, row: int) -> dict[str, Any]:
        """What a checkpoint after row `row` has to carry beside the index, in JSON values."""


class RowSource(Rows, Protocol):
    """What a training program needs."""

    tokenizer: TokenizerInfo
    source_names: list[str]
    """Mixture keys; `sources` gives indices into them."""

    @property
    def mixture(self) -> StagedMixture:
        """Which source each row comes from."""

    def epochs(self, rows: int) -> dict[str, float | None]:
        """Passes over each source that the first `rows` rows are; None while a source's length is unknown."""

    def close(self) -> None:
        """Let go of files and processes."""
