"""What a run asks of its data: prepared shards or raw files, and the mixture of sources it draws from.

It is all checked here, before anything is opened; how weights are written is said in `weights`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data_pipeline.document import DataError
from data_pipeline.weights import (
    LARGEST_WEIGHT,
    PRESETS,
    FlatMixture,
    as_written,
    flatten_mixture,
    leaves,
    nearest,
    refuse_overlap,
    slot_quotas,
)


def _sound_mixture(value: Any) -> Any:
    if not isinstance(value, (str, dict)):
        raise DataError(
            f"mixture is {as_written(value)}; name a preset ({', '.join(PRESETS)}) or give weights by source"
        )
    slot_quotas(flatten_mixture(value).weights)  # so that a weight too small for a slot is refused here
    return value


def _whole(value: Any) -> Any:
    """1e11 as 100000000000: token counts are written that way, and YAML reads them as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at_home(path: str) -> str:
    """`~` and `~name` are home folders, as in a shell; everything else stays as it was written."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise DataError(f"{path} begins with ~ and there is no such home folder; write the folder out")
    return found


AnyMixture = Annotated[str | dict[str, Any], BeforeValidator(_sound_mixture)]
Location = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]
TokenCount = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**16)]
_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RawInputs(BaseModel):
    """The raw files of a run that reads them as it trains, and what `moepp-data build` would be told of them."""

    model_config = _STRICT

    redpajama: Location | None = None
    """Folder, file, glob or URL of RedPajama."""
    dolma: Location | None = None
    """Folder, file, glob or URL of Dolma."""
    pile: Location | None = None
    """Folder, file, glob or URL of the Pile."""
    pile_exclude: list[str] = []
    """Names of the Pile's sets (`pile_set_name`) that are left out."""
    tokenizer: Location
    """SentencePiece .model or Hugging Face tokenizer.json."""
    eos: str | None = None
    """End-of-document token, where the tokenizer leaves a choice."""
    held_out: float = Field(default=0.005, ge=0.0, lt=1.0)
    """Share of documents kept for validation."""
    max_bad_share: float = Field(default=0.001, ge=0.0, le=1.0)
    """Share of a file's lines that may be bad before the run stops."""
    split_bytes: TokenCount = 1 << 30
    """Plain raw files above this size are read in pieces. Bytes."""
    part_tokens: TokenCount = 262_144
    """Length after which the next document end cuts a part, the unit in which files are interleaved. Tokens."""
    disk_bytes: TokenCount = 4 << 30
    """Most that the spool may hold, all sources together. Bytes."""
    builders: int = Field(default=1, ge=1)
    """Processes that read and encode ahead of training."""

    @model_validator(mode="after")
    def _names_a_corpus(self) -> RawInputs:
        if not self.corpora:
            raise DataError("raw names no files; give at least one of redpajama, dolma and pile (data.raw)")
        return self

    @property
    def corpora(self) -> dict[str, str]:
        """Corpus name -> location, of those that are given."""
        given = {"redpajama": self.redpajama, "dolma": self.dolma, "pile": self.pile}
        return {name: location for name, location in given.items() if location is not None}


class MixtureStage(BaseModel):
    """A mixture and how long it holds."""

    model_config = _STRICT

    mixture: AnyMixture
    """Name of a preset, or nested weights by source."""
    tokens: TokenCount | None = None
    """Length of the stage, a multiple of seq_len; null, the rest of the run, is the last stage's. Tokens."""


@dataclass(frozen=True)
class FlatStage:
    """A stage as the stream counts it."""

    mixture: FlatMixture
    rows: int | None
    """Rows of seq_len tokens; None is without end."""


def _sound_limits(value: Any) -> Any:
    """`max_epochs`: null, one number for every source, or numbers by source, nested as a mixture may be."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return float(_limit("", value))
    limits: dict[str, float] = {}
    for key, limit in leaves(value, (), "max_epochs"):
        if key in limits:
            raise DataError(f"max_epochs gives a limit to {key!r} twice; keep one of them (data.max_epochs)")
        limits[key] = float(_limit(key, limit))
    return limits


def _limit(key: str, value: Any) -> float:
    place = f"max_epochs of {key!r}" if key else "max_epochs"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < LARGEST_WEIGHT:
        raise DataError(
            f"{place} is {as_written(value)}; give a positive number of passes over the source (data.max_epochs)"
        )
    return value


class DataConfig(BaseModel):
    """The `data` section of a recipe: everything the order of training rows depends on, beside the files."""

    model_config = _STRICT

    mode: Literal["prepared", "stream"] = "prepared"
    """`prepared`: read the shards of `moepp-data build`. `stream`: read and encode raw files while training."""
    path: Location
    """Folder of the shard set; with `stream`, the folder that holds what was encoded ahead."""
    raw: RawInputs | None = None
    """Where the raw files are, with `stream`."""
    stages: list[MixtureStage] | None = Field(default=None, min_length=1)
    """Mixtures that follow one another, instead of `mixture`."""
    mixture: str | dict[str, Any] | None = "strategy_1"
    """Name of a preset, or nested weights by source, in shares of sampled tokens; null where `stages` are given."""
    max_epochs: Annotated[float | dict[str, float] | None, BeforeValidator(_sound_limits)] = None
    """Passes over a source that a run may make, one number for all or by source; null is without limit. Epochs."""
    on_max_epochs: Literal["stop", "reweight"] = "stop"
    """When a source has given its epochs: end the run, or go on with the other sources at the same proportions."""
    seq_len: int = Field(default=2048, ge=1)
    """Targets per row; a row holds seq_len + 1 tokens."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys the order of files and of rows; the shards do not depend on it."""
    shuffle_window: int = Field(default=16384, ge=1, le=2**20)
    """Rows of one source that are permuted among themselves."""
    interleave: int = Field(default=64, ge=1)
    """Files of one source that are read side by side, part by part."""
    sampling: Literal["exact", "random"] = "exact"
    """`exact`: every prefix within a row of its shares. `random`: the same slots permuted per 10,000 rows."""
    token_dtype: Literal["int64", "int32"] = "int64"
    """Type in which token ids are handed to training; the model gets the same numbers from either."""

    @model_validator(mode="before")
    @classmethod
    def _stages_replace_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("stages") is not None:
            return {"mixture": None, **values}
        return values

    @field_validator("mixture", mode="before")
    @classmethod
    def _mixture_or_stages(cls, value: Any, info: ValidationInfo) -> Any:
        if "stages" not in info.data:  # they were refused themselves
            return None
        if info.data["stages"] is None:
            return _sound_mixture(value)
        if value is not None:
            raise DataError(
                f"mixture is {value!r} and stages are given too; set one of them to null (data.mixture, data.stages)"
            )
        return None

    @model_validator(mode="after")
    def _keys_agree(self) -> DataConfig:
        if (self.mode == "stream") != (self.raw is not None):
            raise DataError(
                "mode: stream needs data.raw, which says where the raw files are"
                if self.raw is None
                else "raw is given and mode is prepared; set data.mode to stream, or leave data.raw out"
            )
        if self.mode == "stream" and self.max_epochs is not None:
            raise DataError(
                "max_epochs needs the length of every source, which mode: stream does not know; prepare the corpora"
                " with moepp-data build, or set data.max_epochs to null"
            )
        self._check_stages(self.stages or [])
        refuse_overlap(self.source_names)
        if isinstance(self.max_epochs, dict):
            for name in self.max_epochs.keys() - set(self.source_names):
                raise DataError(
                    f"max_epochs names {name!r}, which has no weight{nearest(name, self.source_names)}; the sources"
                    f" are {', '.join(self.source_names)} (data.max_epochs)"
                )
        return self

    def _check_stages(self, stages: list[MixtureStage]) -> None:
        for number, stage in enumerate(stages, start=1):
            if (stage.tokens is None) != (number == len(stages)):
                raise DataError(
                    f"stage {number} of {len(stages)} has tokens: {as_written(stage.tokens)}; every stage but"
                    " the last needs its tokens, and the last one (null) lasts to the end of the run (data.stages)"
                )
            if stage.tokens is not None and stage.tokens % self.seq_len:
                below = stage.tokens // self.seq_len * self.seq_len
                fits = " or ".join(f"{tokens:,}" for tokens in (below, below + self.seq_len) if tokens)
                raise DataError(
                    f"stage {number} has {stage.tokens:,} tokens, no multiple of seq_len {self.seq_len}; use {fits}"
                    " (data.stages)"
                )

    @property
    def flat_stages(self) -> tuple[FlatStage, ...]:
        """The mixture as stages; a recipe without stages has one without end."""
        stages = self.stages or [MixtureStage(mixture=self.mixture if self.mixture is not None else {})]
        return tuple(
            FlatStage(flatten_mixture(one.mixture), None if one.tokens is None else one.tokens // self.seq_len)
            for one in stages
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Flat keys of every source that some stage draws from, sorted."""
        return tuple(sorted({name for stage in self.flat_stages for name in stage.mixture.weights}))

    @property
    def notices(self) -> list[str]:
        """What was made of the recipe's weights that its writer may not expect, a sentence each."""
        said = [stage.mixture.notice for stage in self.flat_stages]
        places = [f"stage {n}: " if len(said) > 1 else "" for n in range(1, len(said) + 1)]
        return [place + notice for place, notice in zip(places, said) if notice]

    @property
    def drawn_by(self) -> dict[str, Any]:
        """What the recipe says of which source comes when, by key, as JSON values."""
        keys = ("mixture", "stages", "max_epochs", "on_max_epochs")
        dumped = json.loads(as_written(self.model_dump(include=set(keys))))
        return {f"data.{key}": dumped[key] for key in keys}

    def epoch_limit(self, source: str) -> Fraction | None:
        """Passes that `source` may make, exactly as written; None is without limit."""
        limit = self.max_epochs.get(source) if isinstance(self.max_epochs, dict) else self.max_epochs
        return None if limit is None else Fraction(repr(limit))
