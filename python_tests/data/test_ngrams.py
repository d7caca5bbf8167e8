"""n-gram masking: lengths as ALBERT draws them, never more than wanted, never over an edge, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stackbert_kernels.config import DataConfig
from stackbert_kernels.data import draws, masking
from stackbert_kernels.data.batches import Batches, heldout


def sequences(lengths, candidates=None, seed: int = 0):
    """(draws, candidate, sequence, cu) of sequences whose first and last tokens are special."""
    cu = np.concatenate([[0], np.cumsum(lengths)])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(cu[-1]) - cu[sequence]
    candidate = (position > 0) & (position < np.asarray(lengths)[sequence] - 1)
    if candidates is not None:
        candidate &= candidates(position)
    keys = draws.sample_keys(seed, np.zeros(len(lengths)), np.arange(len(lengths)), draws.MASK)[sequence]
    return draws.token_draws(keys, position), candidate, sequence, cu


def runs(chosen: np.ndarray) -> np.ndarray:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize(("longest", "shares"), [(1, [1.0]), (2, [2 / 3, 1 / 3]), (3, [6 / 11, 3 / 11, 2 / 11])])
def test_lengths_are_drawn_in_proportion_to_one_over_n(longest, shares):
    """.545 / .273 / .182 for three. 100,000 draws: 5 standard errors of a share are 0.008."""
    drawn = draws.token_draws(np.full(100_000, 7, dtype=np.uint64), np.arange(100_000))
    lengths = masking.ngram_lengths(drawn, longest)
    assert lengths.min() == 1 and lengths.max() == longest
    assert np.bincount(lengths, minlength=longest + 1)[1:] / len(drawn) == pytest.approx(shares, abs=0.008)


def test_runs_of_a_thinly_masked_text_have_these_lengths():
    """At 1% two runs seldom meet: of 400 in each of 20 sequences, some 1 in 50."""
    parts = sequences([40_000] * 20)
    chosen = masking.choose_ngrams(parts[0], parts[1], None, *parts[2:], 0.01, 3)
    found = np.bincount(runs(chosen), minlength=4)[1:4]
    assert found / found.sum() == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.03)


@pytest.mark.parametrize("rate", [0.15, 0.4, 0.9])
def test_as_many_tokens_as_wanted_and_only_candidates(rate):
    lengths = [3, 4, 9, 40, 128, 128, 17]
    drawn, candidate, sequence, cu = sequences(lengths, lambda position: position % 5 != 2)
    chosen = masking.choose_ngrams(drawn, candidate, None, sequence, cu, rate, 3)
    assert not (chosen & ~candidate).any()
    wanted = masking.wanted(np.add.reduceat(candidate, cu[:-1], dtype=np.int64), rate)
    assert np.add.reduceat(chosen, cu[:-1], dtype=np.int64).tolist() == wanted.tolist()


def test_whole_words_count_as_one():
    """Pieces 2, 5, 8, ... go on with the word before: every word is masked whole or not at all."""
    drawn, candidate, sequence, cu = sequences([62] * 30)
    position = np.arange(len(drawn)) - cu[sequence]
    continues = (position % 3 == 2) & candidate
    chosen = masking.choose_ngrams(drawn, candidate, continues, sequence, cu, 0.3, 3)
    after = np.flatnonzero(continues)
    assert (chosen[after] == chosen[after - 1]).all()
    lengths = runs(chosen)
    assert (lengths >= 4).any()  # two words and more
    wanted = masking.wanted(np.add.reduceat(candidate, cu[:-1], dtype=np.int64), 0.3)
    found = np.add.reduceat(chosen, cu[:-1], dtype=np.int64)
    assert (found <= wanted).all() and (found >= wanted - 1).all()


def test_a_run_does_not_reach_into_the_next_sequence():
    drawn, candidate, sequence, cu = sequences([5] * 200)
    chosen = masking.choose_ngrams(drawn, candidate, None, sequence, cu, 0.99, 3)
    assert np.add.reduceat(chosen, cu[:-1], dtype=np.int64).tolist() == [3] * 200 and runs(chosen).tolist() == [3] * 200


def test_held_out_text_is_masked_as_ever(shards):
    """So that a recipe with n-grams is measured by what measures the others."""
    data = DataConfig(train_vocab_size=120, seq_len=16, batch_tokens=2048, eval_tokens=200, heldout=0.1)
    alone, together = (heldout(shards, replace(data, max_ngram=n), "mlm", seed=0) for n in (1, 3))
    assert all(torch.equal(a.masked, b.masked) for a, b in zip(alone, together, strict=True))
    training = [Batches(shards, replace(data, max_ngram=n), "mlm", seed=0)[0] for n in (1, 3)]
    assert torch.equal(training[0].sample_ids, training[1].sample_ids)
    assert not torch.equal(training[0].masked, training[1].masked)


def test_no_tokens_at_all():
    empty = np.zeros(0, dtype=np.uint64)
    assert masking.ngram_lengths(empty, 3).tolist() == []
