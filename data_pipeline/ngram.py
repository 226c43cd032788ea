"""Unigram and bigram models of the training tokens: what a trained model has to beat to have learned anything.

    unigram   p(b)     = (count of b + 1)  / (N + V)
    bigram    p(b | a) = (count of ab + 1) / (count of a + V)      add-one smoothing over the V ids of the vocabulary

Counts are of all training tokens of the mixture's sources, each token once, pairs within a shard. They are held as
sorted pair keys with a count, so memory grows with distinct pairs: meant for corpora of up to some 100 M tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.manifest import read_manifest, shard_path
from data_pipeline.shards import Shard
from data_pipeline.stream import claim_files


@dataclass(frozen=True)
class NgramModel:
    """Counts of single ids and of pairs; make one with `count_ngrams`."""

    vocab_size: int
    count_V: np.ndarray
    """int64: how often each id occurs."""
    first_V: np.ndarray
    """int64: how often each id is the first of a pair."""
    pair_P: np.ndarray
    """int64, ascending: a * vocab_size + b of every pair that occurs."""
    pair_count_P: np.ndarray
    """int64: how often it occurs."""

    def cross_entropy(self, tokens_BS1: np.ndarray, valid_BS: np.ndarray) -> tuple[float, float]:
        """(unigram, bigram) nats per token over the valid targets of rows of S+1 ids."""
        first, second = tokens_BS1[:, :-1][valid_BS], tokens_BS1[:, 1:][valid_BS]
        unigram = np.log(self.count_V.sum() + self.vocab_size) - np.log(self.count_V[second] + 1)
        key = first * self.vocab_size + second
        place = np.minimum(np.searchsorted(self.pair_P, key), len(self.pair_P) - 1)
        seen = np.where(self.pair_P[place] == key, self.pair_count_P[place], 0)
        bigram = np.log(self.first_V[first] + self.vocab_size) - np.log(seen + 1)
        return float(unigram.mean()), float(bigram.mean())


def count_ngrams(token_runs: Iterable[np.ndarray], *, vocab_size: int) -> NgramModel:
    """Count ids and adjacent pairs in each run of tokens (1-D, any integer dtype); runs do not touch."""
    count_V = np.zeros(vocab_size, dtype=np.int64)
    pair_P, pair_count_P = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for run in token_runs:
        ids = np.asarray(run, dtype=np.int64)
        count_V += np.bincount(ids, minlength=vocab_size)
        keys, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
        merged, place = np.unique(np.concatenate([pair_P, keys]), return_inverse=True)
        total = np.zeros(len(merged), dtype=np.int64)
        np.add.at(total, place, np.concatenate([pair_count_P, counts]))
        pair_P, pair_count_P = merged, total
    first_V = np.zeros(vocab_size, dtype=np.int64)
    np.add.at(first_V, pair_P // vocab_size, pair_count_P)
    return NgramModel(vocab_size, count_V, first_V, pair_P, pair_count_P)


def training_ngrams(config: DataConfig) -> NgramModel:
    """Count the training tokens of every source of the mixture at `config.path`."""
    root = Path(config.path)
    manifest = read_manifest(root)
    claimed = claim_files(manifest, config.source_names)
    paths = [shard_path(root, file.key, "train") for files in claimed.values() for file in files if file.train.tokens]
    return count_ngrams((Shard(path).tokens for path in paths), vocab_size=manifest.settings.tokenizer.vocab_size)
