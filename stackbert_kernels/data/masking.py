"""Which tokens a sample has to predict, and what stands in their place (Devlin et al. 2018: 80% [MASK], 10% random, 10% kept)."""

from __future__ import annotations

import numpy as np

RANDOM_BITS = np.uint64(
    24
)  # 2^40 values to rank tokens by; with the sequence's number above them, up to 2^23 sequences fit a sort key


def wanted(candidates: np.ndarray, rate: float) -> np.ndarray:
    """Predicted tokens for each number of candidates: rounded, at least 1 where there is a candidate."""
    return np.where(candidates > 0, np.maximum(1, np.rint(rate * candidates)), 0).astype(np.int64)


def choose_tokens(
    draws: np.ndarray, candidate: np.ndarray, sequence: np.ndarray, cu: np.ndarray, rate: float
) -> np.ndarray:
    """bool [T]: in each sequence the `wanted` candidates of smallest draw.

    draws uint64 [T], candidate bool [T], sequence int64 [T] non-decreasing, cu int64 [B+1].
    """
    count = wanted(np.add.reduceat(candidate, cu[:-1], dtype=np.int64), rate)
    rank = draws >> RANDOM_BITS
    rank[~candidate] = np.uint64(2**40 - 1)
    order = np.argsort((sequence.astype(np.uint64) << np.uint64(40)) | rank, kind="stable")
    chosen = np.zeros(len(draws), dtype=bool)
    chosen[order[np.arange(len(draws)) < (cu[:-1] + count)[sequence]]] = True
    return chosen & candidate


def choose_words(
    draws: np.ndarray, candidate: np.ndarray, continues: np.ndarray, sequence: np.ndarray, cu: np.ndarray, rate: float
) -> np.ndarray:
    """bool [T]: whole words, in the order of their first piece's draw, each taken if it fits what is left of `wanted`.

    Where no word fits, the shortest is taken: every sample predicts something. `continues` bool [T]: pieces that go on with a word.
    """
    starts, ends = _words(candidate, continues)
    return _choose_runs(draws, candidate, starts, ends, np.ones(len(starts), dtype=np.int64), sequence, cu, rate)


def choose_ngrams(
    draws: np.ndarray,
    candidate: np.ndarray,
    continues: np.ndarray | None,
    sequence: np.ndarray,
    cu: np.ndarray,
    rate: float,
    longest: int,
) -> np.ndarray:
    """bool [T]: runs of up to `longest` tokens, or words where `continues` is given, in the order of their first token's draw.

    A run's length is `ngram_lengths` of the same draw; it is shortened to what fits what is left of `wanted`, and where a token that cannot
    be masked, the sequence's end or a token already taken follows.
    """
    alone = np.zeros_like(candidate) if continues is None else continues
    starts, ends = _words(candidate, alone)
    return _choose_runs(draws, candidate, starts, ends, ngram_lengths(draws[starts], longest), sequence, cu, rate)


def ngram_lengths(draws: np.ndarray, longest: int) -> np.ndarray:
    """n in [1, longest] with p(n) = (1/n) / (1 + 1/2 + ... + 1/longest) (ALBERT, Lan et al. 2020), from the lower 24 bits, which decide no order."""
    edges = np.cumsum(1 / np.arange(1, longest + 1))
    uniform = (draws & np.uint64(2**24 - 1)).astype(np.float64) / 2**24
    return np.searchsorted(edges[:-1] / edges[-1], uniform, side="right") + 1


def _words(candidate: np.ndarray, continues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last tokens of the words that may be masked."""
    before = np.concatenate([[False], candidate[:-1]])
    starts = np.flatnonzero(candidate & ~(continues & before))
    ends = np.flatnonzero(candidate & ~np.append(candidate[1:] & continues[1:], False)) + 1
    return starts, ends


def _choose_runs(
    draws: np.ndarray,
    candidate: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    lengths: np.ndarray,
    sequence: np.ndarray,
    cu: np.ndarray,
    rate: float,
) -> np.ndarray:
    """bool [T]: words [starts, ends), each drawn one with those after it that touch it, `lengths` together."""
    count = wanted(np.add.reduceat(candidate, cu[:-1], dtype=np.int64), rate)
    order = np.argsort(
        (sequence[starts].astype(np.uint64) << np.uint64(40)) | (draws[starts] >> RANDOM_BITS), kind="stable"
    )
    first_word = np.searchsorted(sequence[starts], np.arange(len(cu))).tolist()
    chosen = np.zeros(len(draws), dtype=bool)
    begin, end, length, left = starts.tolist(), ends.tolist(), lengths.tolist(), count.tolist()
    order = order.tolist()
    for b, room in enumerate(left):
        words = range(first_word[b], first_word[b + 1])
        if not words:
            continue
        shortest = min(end[word] - begin[word] for word in words)
        room = max(room, shortest)
        for word in order[words.start : words.stop]:
            for following in range(word, min(word + length[word], words.stop)):
                size = end[following] - begin[following]
                apart = following > word and begin[following] != end[following - 1]
                if size > room or apart or chosen[begin[following]]:
                    break
                chosen[begin[following] : end[following]] = True
                room -= size
            if room < shortest:
                break
    return chosen


def replacements(draws: np.ndarray, original: np.ndarray, mask_id: int, ordinary: np.ndarray) -> np.ndarray:
    """What the model sees at predicted tokens: [MASK] in 80%, a random one of `ordinary` in 10%, the original in 10%."""
    action = (draws & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    random = ordinary[((draws >> np.uint64(32)) * np.uint64(len(ordinary)) >> np.uint64(32)).astype(np.int64)]
    return np.where(action < 0.8, mask_id, np.where(action < 0.9, random, original))
