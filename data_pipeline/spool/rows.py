"""The training stream of a run that reads raw files: the rows of `stream.RowStream`, from the spool's chunks.

    row index ─▶ mixture: which source, which of its rows ─▶ window: which stretch of its stream ─▶ chunks: gather

What has been released ends at a window of each source, since the rows of a window are drawn in random order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data_pipeline.document import DataError
from data_pipeline.manifest import TokenizerInfo
from data_pipeline.order import window_permutation
from data_pipeline.row_stream import order_hash
from data_pipeline.spool.plan import Known, SpoolPlan
from data_pipeline.spool.supply import Supply
from data_pipeline.stages import StagedMixture


class SpoolRows:
    """The stream of rows, made while training goes on; see `row_source.RowSource`. Open it with `open_spool`."""

    def __init__(
        self,
        plan: SpoolPlan,
        supply: Supply,
        *,
        mixture: StagedMixture,
        tokenizer: TokenizerInfo,
        order: Mapping[str, Any],
        drawn_by: Mapping[str, Any],
    ) -> None:
        self.seq_len = plan.seq_len
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.order = dict(order)
        self.fingerprint = order_hash(self.order)
        self.drawn_by = dict(drawn_by)
        self.source_names: list[str] = mixture.names
        self._plan, self._supply = plan, supply
        self._permutation = lru_cache(maxsize=2 * len(mixture.names))(self._permute)

    @property
    def rows_total(self) -> int | None:
        """Rows until the stream ends; None, since the length of its sources is not known."""
        return self.mixture.rows_total

    @property
    def rows_ahead(self) -> int:
        """Rows from the first that is not released on that the spool has room for, were they all of one source."""
        return self._plan.rows_ahead

    def rows(self, indices: np.ndarray | Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Tokens of the rows at `indices`: int64 [n, seq_len + 1], a new array, or `out`. Waits for it."""
        source, drawn = self._locate(indices)
        if not self._supply.begun:
            self._supply.begin(self._needed(0), {})
        window, place = np.divmod(drawn, self._plan.window)
        if out is None:
            out = np.empty((len(drawn), self.seq_len + 1), dtype=np.int64)
        for row, (number, own_window, own_place) in enumerate(zip(source.tolist(), window.tolist(), place.tolist())):
            own_row = own_window * self._plan.window + int(self._permutation(number, own_window)[own_place])
            self._supply.tokens(self.source_names[number], own_row * self.seq_len, out[row])
        return out

    def sources(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Index into `source_names` of each row: int64 [n]."""
        return self._locate(indices)[0]

    def epochs(self, rows: int) -> dict[str, float | None]:
        """Passes over each source that the first `rows` rows are; None while a source's first is not over."""
        lengths = self._supply.epoch_tokens
        return {
            name: drawn * self.seq_len / lengths[name] if name in lengths else None
            for name, drawn in self.mixture.drawn(rows).items()
        }

    def seek(self, row: int, position: Mapping[str, Any]) -> None:
        """Read from `row` on. With the position that a checkpoint has of it, nothing before it is made again."""
        self._supply.begin(self._needed(row), self._read_position(position) if position else {})

    def release(self, row: int) -> None:
        """Rows below `row` are not asked for again."""
        if self._supply.begun:
            self._supply.need(self._needed(row))

    def position(self, row: int) -> dict[str, Any]:
        """The state before the first chunk that rows from `row` on need of each source, in JSON values."""
        states = {
            name: asdict(Known(number, self._supply.state_before(name, number)))
            for name, number in self._needed(row).items()
        }
        return {"chunk_tokens": self._plan.chunk_tokens, "sources": states}

    def close(self) -> None:
        """End the builders this process has started, and let go of the spool."""
        self._supply.close()

    def _locate(self, indices: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1 or (len(wanted) and wanted.min() < 0):
            raise DataError(f"row indices must be a flat list of numbers >= 0, got {indices!r}")
        return self.mixture.locate(wanted)

    def _permute(self, source: int, window: int) -> np.ndarray:
        return window_permutation(self._plan.seed, self.source_names[source], window, self._plan.window)

    def _needed(self, row: int) -> dict[str, int]:
        return {name: self._plan.first_chunk(drawn) for name, drawn in self.mixture.drawn(row).items()}

    def _read_position(self, position: Mapping[str, Any]) -> dict[str, Known]:
        try:
            if position["chunk_tokens"] != self._plan.chunk_tokens:
                raise ValueError(f"chunks of {position['chunk_tokens']} tokens")
            known = TypeAdapter(dict[str, Known]).validate_python(position["sources"])
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise DataError(
                f"the checkpoint's position in the raw files is not one of this program ({error}); resume from another"
                " checkpoint"
            ) from None
        return known
