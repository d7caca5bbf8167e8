"""specs/compound_grow.md: which tokens share a row of the pooled stream."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stackbert_kernels.data.windows import windows
from stackbert_kernels.plan import pooled_length


def cu(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def drawn(lengths, seed: int = 0) -> torch.Tensor:
    """Predicted tokens, sorted, none of them first in its sequence."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(sum(lengths), generator=generator) < 0.3
    chosen[cu(lengths)[:-1].long()] = False
    return chosen.nonzero().flatten()


def rows(w) -> list[list[int]]:
    """The tokens of each row of the stream."""
    return [w.sources[:count, row].tolist() for row, count in enumerate(w.counts.tolist())]


def test_by_hand():
    w = windows(cu([7, 1, 5]), torch.tensor([2, 5, 9]), 2)
    assert rows(w) == [[0], [1, 3], [4, 6], [2], [5], [7], [8], [10, 11], [12], [9]]
    assert w.cu_seqlens.tolist() == [0, 5, 6, 10] and w.max_seqlen == 5
    assert w.masked.tolist() == [3, 4, 9]
    assert w.rows.tolist() == [0, 1, 3, 1, 2, 4, 2, 5, 6, 9, 7, 7, 8]
    assert w.places.tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert w.sources.tolist() == [[0, 1, 4, 2, 5, 7, 8, 10, 12, 9], [0, 3, 6, 2, 5, 7, 8, 11, 12, 9]]
    assert (w.cu_seqlens.dtype, w.kind) == (torch.int32, "mean")


def test_nothing_to_pool_and_no_sequence():
    w = windows(cu([3]), torch.tensor([1, 2]), 4)
    assert rows(w) == [[0], [1], [2]]
    empty = windows(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), 2)
    assert empty.cu_seqlens.tolist() == [0] and empty.sources.shape == (2, 0) and empty.max_seqlen == 0


LENGTHS = [9, 1, 24, 13, 2, 40]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_every_token_is_in_one_row_of_its_sequence(size):
    masked = drawn(LENGTHS)
    w = windows(cu(LENGTHS), masked, size)
    found = rows(w)
    assert sorted(t for row in found for t in row) == list(range(sum(LENGTHS)))
    assert all(token in found[row] for token, row in enumerate(w.rows.tolist()))
    assert all(found[w.rows[t]][w.places[t]] == t for t in range(sum(LENGTHS)))
    starts, first = w.cu_seqlens.tolist(), cu(LENGTHS).tolist()
    predicted = set(masked.tolist())
    for b, n in enumerate(LENGTHS):
        own = found[starts[b] : starts[b + 1]]
        tokens = range(first[b], first[b + 1])
        u = len(predicted & set(tokens))
        assert len(own) == pooled_length(n, u, size) == 1 + -(-(n - 1 - u) // size) + u
        inside = own[1 : len(own) - u]
        between = [t for t in tokens[1:] if t not in predicted]
        assert own[0] == [tokens[0]]
        assert inside == [between[i : i + size] for i in range(0, len(between), size)]
        assert own[len(own) - u :] == [[t] for t in tokens if t in predicted]
    assert [found[row] for row in w.masked.tolist()] == [[t] for t in masked.tolist()]


def test_a_batch_is_its_sequences_one_behind_the_other():
    masked, first = drawn(LENGTHS), cu(LENGTHS).tolist()
    whole, alone = rows(windows(cu(LENGTHS), masked, 3)), []
    for b, n in enumerate(LENGTHS):
        own = masked[(masked >= first[b]) & (masked < first[b + 1])] - first[b]
        alone += [[t + first[b] for t in row] for row in rows(windows(cu([n]), own, 3))]
    assert whole == alone


@pytest.mark.parametrize("size", [2, 3])
def test_a_window_is_there_where_any_of_its_tokens_is(size):
    """As with padding: pooled by max in the same way, the mask has as many ones as the sequence has windows, and they come first."""
    masked = drawn(LENGTHS)
    w = windows(cu(LENGTHS), masked, size)
    first, predicted = cu(LENGTHS).tolist(), set(masked.tolist())
    for b, n in enumerate(LENGTHS):
        u = len(predicted & set(range(first[b], first[b + 1])))
        mask = torch.zeros(1, max(LENGTHS))
        mask[0, : n - 1 - u] = 1
        pooled = F.max_pool1d(mask, size, ceil_mode=True)[0]
        there = int(w.cu_seqlens[b + 1] - w.cu_seqlens[b]) - 1 - u
        assert pooled.tolist() == [1.0] * there + [0.0] * (len(pooled) - there)


def test_moves_with_its_batch():
    w = windows(cu([5]), torch.tensor([2]), 2, "max").to("meta")
    assert w.kind == "max" and w.max_seqlen == 4 and w.sources.is_meta and w.cu_seqlens.is_meta


@pytest.mark.parametrize(("lengths", "masked"), [([3, 0, 2], [1]), ([3, 2], [3])])
def test_refuses(lengths, masked):
    with pytest.raises(ValueError, match="windows: each sequence must begin with a token that is not predicted"):
        windows(cu(lengths), torch.tensor(masked), 2)
