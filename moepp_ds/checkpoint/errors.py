"""The errors of this package; apart, so that a command can name them without loading torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is missing or damaged, or is of another run."""


class DamagedCheckpoint(CheckpointError):
    """One checkpoint that cannot be used where another of the same run, an older one, may well be."""
