"""Which stretches of the tokens are samples: consecutive sentences of one document, as many as fit.

A sample is (document, first token, last token), last exclusive, tokens counted over all shards. The table is computed once
with numpy and kept beside the shards; the directory never changes, so the file never grows stale.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from stackbert_kernels.config import ConfigError


def sample_table(directory: Path, split: str, budget: int, least: int) -> np.ndarray:
    """int64 [3, N]: document, first, last of the samples of `least` to `budget` tokens, in the order of the text."""
    file = directory / f"{split}.samples-{least}-{budget}.npy"
    if file.is_file():
        return np.load(file, mmap_mode="r")
    sentences, documents = (np.load(directory / f"{split}.{name}.npy") for name in ("sentences", "documents"))
    table = pack(sentences, documents, budget)
    table = table[:, table[2] - table[1] >= least]
    if table.shape[1] == 0:
        raise ConfigError(f"text is too small: no {split} document has {least} tokens")
    _keep(file, table)
    return table


def pack(sentences: np.ndarray, documents: np.ndarray, budget: int) -> np.ndarray:
    """sentences [S+1] first tokens, documents [D+1] first sentences -> int64 [3, N].

    Greedy from a document's start: sentences are added while they fit; one longer than `budget` is cut into pieces first.
    """
    lengths = np.diff(sentences)
    pieces = -(-lengths // budget)
    first_piece = np.concatenate([[0], pieces.cumsum()])
    number = np.arange(first_piece[-1]) - np.repeat(first_piece[:-1], pieces)
    starts = np.append(np.repeat(sentences[:-1], pieces) + number * budget, sentences[-1])
    document_end = np.repeat(first_piece[documents[1:]], np.diff(first_piece[documents]))
    # following[i]: the piece at which the next sample begins if one begins at piece i.
    following = np.minimum(np.searchsorted(starts, starts[:-1] + budget, side="right") - 1, document_end)

    # All documents advance together, a sample at a time: as many rounds as the longest document has samples.
    document = np.arange(len(documents) - 1)
    at, end = first_piece[documents[:-1]], first_piece[documents[1:]]
    rounds = []
    while len(document):
        after = following[at]
        rounds.append(np.stack([document, starts[at], starts[after]]))
        going = after < end
        document, at, end = document[going], after[going], end[going]
    table = np.concatenate(rounds, axis=1)
    return table[:, np.argsort(table[1], kind="stable")]


def _keep(file: Path, table: np.ndarray) -> None:
    """Written beside and renamed: processes that start together all find a whole file or none."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as handle:
            np.save(handle, table)
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(file)
    except OSError:  # a directory that cannot be written to still serves
        partial.unlink(missing_ok=True)
