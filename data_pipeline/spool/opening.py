"""Opening the raw files of a recipe with `mode: stream`: their rows, their held-out text, their tokenizer."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.manifest import TokenizerInfo
from data_pipeline.set_settings import tokenizer_info
from data_pipeline.spool.folder import enter
from data_pipeline.spool.held_out import held_out_text
from data_pipeline.spool.plan import claim_raw_files, encoding_of, files_order, plan_spool, raw_inputs
from data_pipeline.spool.rows import SpoolRows
from data_pipeline.spool.supply import Supply
from data_pipeline.stream import HeldOut, open_mixture, order_settings
from data_pipeline.tokenizer import load_tokenizer


def open_spool(config: DataConfig) -> SpoolRows:
    """Open the raw files for training. Nothing is read before the first row is asked for. Raises DataError."""
    raw = raw_inputs(config)
    mixture = open_mixture(config)
    claimed = claim_raw_files(config)
    tokenizer = load_tokenizer(raw.tokenizer, raw.eos)
    plan = plan_spool(config, tokenizer, claimed)
    order = {**files_order(raw, tokenizer, claimed), **order_settings(config, mixture)}
    reader = enter(Path(config.path), {**order, "identity": plan.identity})
    return SpoolRows(
        plan,
        Supply(plan, reader),
        mixture=mixture,
        tokenizer=tokenizer_info(tokenizer, raw.tokenizer),
        order=order,
        drawn_by=config.drawn_by,
    )


def open_spool_held_out(config: DataConfig, *, rows: int) -> dict[str, HeldOut]:
    """Enough held-out text of each source for `rows` rows, by mixture key; a source that has none is left out."""
    raw = raw_inputs(config)
    if raw.held_out == 0:
        return {}
    tokenizer = load_tokenizer(raw.tokenizer, raw.eos)
    encoding = encoding_of(raw, tokenizer, Path(config.path))
    split = {}
    for name, files in claim_raw_files(config).items():
        found = held_out_text(
            Path(config.path) / "held_out" / name,
            files,
            encoding,
            tokens=rows * config.seq_len + 1,
            depends_on=files_order(raw, tokenizer, {name: files}),
        )
        if found is not None:
            split[name] = found
    return split


def read_tokenizer(config: DataConfig) -> tuple[Path, TokenizerInfo]:
    """The tokenizer's file, and what a prepared set would say of it."""
    raw = raw_inputs(config)
    return Path(raw.tokenizer), tokenizer_info(load_tokenizer(raw.tokenizer, raw.eos), raw.tokenizer)
