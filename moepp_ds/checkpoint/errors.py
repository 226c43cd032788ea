"""The one error of this package; apart, so that a command can name it without loading torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is missing or damaged, or is of another run."""
