"""Counter-based random numbers: a draw is a pure function of (seed, epoch, sample, purpose, token), never of what was drawn before."""

from __future__ import annotations

import numpy as np

MASK, REPLACEMENT, PAIR, PARTNER, SPLIT = range(5)
GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of uint64 in which every bit moves every other."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_keys(seed: int, epoch: np.ndarray, sample: np.ndarray, purpose: int) -> np.ndarray:
    """uint64, one for each (epoch, sample)."""
    base = _mix(np.array([(seed * 8 + purpose + 1) * GOLDEN % 2**64], dtype=np.uint64))
    base = _mix(base ^ (epoch.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    return _mix(base ^ (sample.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def token_draws(keys: np.ndarray, position: np.ndarray) -> np.ndarray:
    """uint64, one for each token: `keys` and `position` have one entry a token. SplitMix64's stream, entered at `position`."""
    return _mix(keys + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def below(draws: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """int64, uniform in [0, bound), from the upper 32 bits; bound < 2^31."""
    return ((draws >> np.uint64(32)) * np.asarray(bound).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch. Sorted raw Philox words: numpy promises these, and not the streams of its Generator, across versions."""
    words = np.random.Philox(key=[seed, epoch]).random_raw(count)
    return np.argsort(words, kind="stable")
