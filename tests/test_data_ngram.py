"""N-gram baselines on counts small enough to be done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_pipeline.ngram import count_ngrams


def test_cross_entropy_by_hand() -> None:
    """Runs `0 1 0 1` and `1 1`, V = 3: counts 0:2 1:4; pairs 01:2 10:1 11:1; first of a pair 0:2 1:2."""
    model = count_ngrams([np.array([0, 1, 0, 1], dtype=np.uint16), np.array([1, 1], dtype=np.uint16)], vocab_size=3)
    assert model.count_V.tolist() == [2, 4, 0]
    assert model.first_V.tolist() == [2, 2, 0]
    tokens = np.array([[0, 1, 2]])  # targets 1 (after 0) and 2 (after 1, a pair never seen)
    unigram, bigram = model.cross_entropy(tokens, np.array([[True, True]]))
    assert unigram == pytest.approx(-(math.log(5 / 9) + math.log(1 / 9)) / 2)
    assert bigram == pytest.approx(-(math.log(3 / 5) + math.log(1 / 5)) / 2)


def test_targets_that_are_not_valid_do_not_count() -> None:
    """The last row of held-out text is filled up; what fills it is not scored."""
    model = count_ngrams([np.array([0, 1])], vocab_size=2)
    unigram, bigram = model.cross_entropy(np.array([[0, 1, 1]]), np.array([[True, False]]))
    assert unigram == pytest.approx(-math.log(2 / 4))
    assert bigram == pytest.approx(-math.log(2 / 3))


def test_both_are_distributions() -> None:
    """Probabilities over the next id sum to one, after an id that was seen and after one that was not."""
    model = count_ngrams([np.random.default_rng(0).integers(0, 5, 40)], vocab_size=7)
    for first in (0, 6):
        chances = [
            [math.exp(-nats) for nats in model.cross_entropy(np.array([[first, second]]), np.array([[True]]))]
            for second in range(7)
        ]
        assert np.sum(chances, axis=0) == pytest.approx([1.0, 1.0])
