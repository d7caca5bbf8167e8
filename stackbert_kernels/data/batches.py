"""Token shards -> unpadded batches (contract 3.8).

Sample i of an epoch stands at a place of one endless line of tokens: epoch e's samples in the order `permutation(seed, e)`,
after all those of epoch e - 1. Step s takes the samples that end in tokens (s * batch_tokens, (s + 1) * batch_tokens] of the
line. So a step's mean size is exactly the budget, every sample comes once an epoch, and step s can be asked for at any time,
in any process: nothing is remembered from one step to the next. Ranks and accumulated parts cut the same step.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stackbert_kernels.config import OBJECTIVES, ConfigError, DataConfig
from stackbert_kernels.data import draws, masking, prepare
from stackbert_kernels.data.samples import sample_table
from stackbert_kernels.data.tokenizer import continuations
from stackbert_kernels.data.windows import Windows


@dataclass(frozen=True)
class Batch:
    """B sequences, T packed tokens, R predicted tokens."""

    input_ids: Tensor  # [T] int64, masks applied
    token_types: Tensor  # [T] int64
    positions: Tensor  # [T] int64, inside the sequence
    cu_seqlens: Tensor  # [B+1] int32
    max_seqlen: int
    masked: Tensor  # [R] int64, indices into T, sorted
    labels: Tensor  # [R] int64, the original ids there
    pair_labels: Tensor | None  # [B] int64: 1 = the second part does not follow (nsp), is swapped with the first (sop)
    sample_ids: Tensor  # [B] int64
    windows: Windows | None = None  # how embeddings are pooled, where they are

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: v.to(device) if isinstance(v, Tensor | Windows) else v for name, v in moved.items()})

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1


def cut(lengths: np.ndarray, n: int) -> list[slice]:
    """n consecutive slices of near-equal sums; none is empty unless there are fewer than n entries."""
    ends = lengths.cumsum()
    total = ends[-1] if len(ends) else 0
    at = np.searchsorted(ends - lengths / 2, total * np.arange(1, n) / n)
    if len(lengths) >= n:
        k = np.arange(1, n)
        at = np.minimum(np.maximum.accumulate(np.maximum(at, k) - k) + k, len(lengths) - n + k)
    edges = [0, *at.tolist(), len(lengths)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


class Batches:
    """The batches of one split; `batches[step]` is a pure function of (seed, step).

    Samples of the first `short_steps` steps have at most data.short_seq_len tokens; both lengths have their own line of tokens, which
    each enters at its place `step * batch_tokens`.
    `unigram_entropy` (nats) and `unigram_accuracy` are what the training tokens' distribution alone reaches on held-out tokens:
    a model that uses context must be below the one and above the other.
    """

    def __init__(
        self,
        directory: Path | str,
        data: DataConfig,
        objective: str,
        seed: int,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        short_steps: int = 0,
    ):
        if objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if split not in prepare.SPLITS:
            raise ValueError(f"split must be one of {', '.join(prepare.SPLITS)}, got {split!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed must be in [0, 2^63), got {seed}")
        self._arguments = (directory, data, objective, seed, split, rank, world_size, short_steps)
        directory = Path(directory)
        manifest = prepare.load_manifest(directory)
        prepare.require_tokens(manifest, data.seq_len)
        self.data, self.objective, self.seed, self.rank, self.world_size = data, objective, seed, rank, world_size
        self.vocab_size: int = manifest["vocab_size"]
        self.unigram_entropy: float = manifest["unigram"]["entropy"]
        self.unigram_accuracy: float = manifest["unigram"]["accuracy"]
        self._special = manifest["special_ids"]
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[list(self._special.values())] = True
        self._ordinary = np.flatnonzero(~self._is_special)
        self._continues = _continuation_table(directory, self.vocab_size) if data.whole_word else None

        pair = objective != "mlm"
        self._extra = 3 if pair else 2  # [CLS] A [SEP], and B [SEP]
        table = sample_table(directory, split, data.seq_len - self._extra, 2 if pair else 1)
        self._document, self._first, self._last = table
        self._lengths = self._last - self._first + self._extra
        self.tokens = int(self._lengths.sum())
        """Of one epoch, [CLS] and [SEP] included."""
        self.samples = len(self._lengths)
        self.steps_per_epoch = self.tokens / data.batch_tokens
        if objective == "mlm+nsp" and self._document[0] == self._document[-1]:
            raise ConfigError(f"objective mlm+nsp needs at least 2 {split} documents, got 1")

        shards = manifest["splits"][split]["shards"]
        self._shards = [
            np.memmap(directory / s["file"], dtype=manifest["dtype"], mode="r").view(np.ndarray) for s in shards
        ]
        self._shard_starts = np.cumsum([0] + [s["tokens"] for s in shards])
        self._sentences = np.load(directory / f"{split}.sentences.npy", mmap_mode="r").view(np.ndarray)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._short_steps, self._short = short_steps, None
        if short_steps:
            shorter = replace(data, seq_len=data.short_seq_len, short_seq_len=0, short_share=DataConfig.short_share)
            self._short = Batches(directory, shorter, objective, seed, split, rank, world_size)

    def __reduce__(self):
        return Batches, self._arguments

    def __getitem__(self, step: int) -> Batch:
        if 0 <= step < self._short_steps:
            return self._short[step]
        epochs, samples = self._mine(step)
        return self._build(epochs, samples)

    def parts(self, step: int, n: int) -> list[Batch]:
        """The samples of `self[step]` in n batches of near-equal tokens; fewer where there are fewer than n samples."""
        if 0 <= step < self._short_steps:
            return self._short.parts(step, n)
        epochs, samples = self._mine(step)
        return [self._build(epochs[s], samples[s]) for s in cut(self._lengths[samples], n) if s.start < s.stop]

    def prefetch(
        self, start: int, n: int = 1, change: Callable[[int, Batch], Batch] | None = None
    ) -> Iterator[list[Batch]]:
        """`parts(start, n)`, `parts(start + 1, n)`, ... without end, each built by a thread while the one before is used; `change`, of the
        step and a part, is applied there, too."""
        ready: queue.Queue = queue.Queue(maxsize=1)
        stop = threading.Event()

        def offer(item: list[Batch] | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            step = start
            try:
                while not stop.is_set():
                    parts = self.parts(step, n)
                    offer(parts if change is None else [change(step, part) for part in parts])
                    step += 1
            except BaseException as error:
                offer(error)

        thread = threading.Thread(target=work, name="stackbert-batches", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch in their order, and the token of the epoch at which each ends."""
        if epoch not in self._orders:
            order = draws.permutation(self.seed, epoch, self.samples)
            kept = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
            self._orders = kept | {epoch: (order, self._lengths[order].cumsum())}
        return self._orders[epoch]

    def _global(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, sample) of every sample of a step, over all ranks."""
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}")
        low, high = step * self.data.batch_tokens, (step + 1) * self.data.batch_tokens
        epochs, samples = [], []
        for epoch in range(low // self.tokens, high // self.tokens + 1):
            order, ends = self._order(epoch)
            first, last = np.searchsorted(ends, [low - epoch * self.tokens, high - epoch * self.tokens], side="right")
            samples.append(order[first:last])
            epochs.append(np.full(last - first, epoch))
        return np.concatenate(epochs), np.concatenate(samples)

    def _mine(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, samples = self._global(step)
        mine = cut(self._lengths[samples], self.world_size)[self.rank]
        return epochs[mine], samples[mine]

    def _pairs(self, epochs: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """First token and length of both parts of each sample, and the pair labels."""
        first, last = self._first[samples], self._last[samples]
        label = draws.sample_keys(self.seed, epochs, samples, draws.PAIR) >> np.uint64(63)
        label = label.astype(np.int64)
        middle = self._split(epochs, samples)
        a, a_length, b, b_length = first, middle - first, middle, last - middle
        if self.objective == "mlm+sop":
            swap = label == 1
            a, b = np.where(swap, b, a), np.where(swap, a, b)
            return a, np.where(swap, b_length, a_length), b, np.where(swap, a_length, b_length), label

        # nsp: the second part of a sample of any other document, whole sentences of it where the room allows.
        own = np.searchsorted(self._document, self._document[samples], side="left")
        after = np.searchsorted(self._document, self._document[samples], side="right")
        partner = draws.below(
            draws.sample_keys(self.seed, epochs, samples, draws.PARTNER), self.samples - (after - own)
        )
        partner += np.where(partner >= own, after - own, 0)
        start, end = self._split(epochs, partner), self._last[partner]
        room = self.data.seq_len - self._extra - a_length
        whole = self._sentences[np.searchsorted(self._sentences, start + room, side="right") - 1]
        end = np.where(end - start <= room, end, np.where(whole > start, whole, start + room))
        return a, a_length, np.where(label == 1, start, b), np.where(label == 1, end - start, b_length), label

    def _split(self, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Where the second part begins: at one of the sentences inside the sample, or in the middle of the only one."""
        first, last = self._first[samples], self._last[samples]
        inside = np.searchsorted(self._sentences, first, side="right")
        count = np.searchsorted(self._sentences, last, side="left") - inside
        drawn = draws.below(draws.sample_keys(self.seed, epochs, samples, draws.SPLIT), np.maximum(count, 1))
        return np.where(count > 0, self._sentences[inside + drawn], (first + last) // 2)

    def _gather(self, where: np.ndarray) -> np.ndarray:
        """Tokens at places counted over all shards."""
        if len(self._shards) == 1:
            return self._shards[0][where].astype(np.int64)
        shard = np.searchsorted(self._shard_starts, where, side="right") - 1
        tokens = np.empty(len(where), dtype=np.int64)
        for s in np.unique(shard):
            here = shard == s
            tokens[here] = self._shards[s][where[here] - self._shard_starts[s]]
        return tokens

    def _build(self, epochs: np.ndarray, samples: np.ndarray) -> Batch:
        count = len(samples)
        pair = self.objective != "mlm"
        if pair:
            a, a_length, b, b_length, label = self._pairs(epochs, samples)
        else:
            a, a_length, label = self._first[samples], self._last[samples] - self._first[samples], None
            b, b_length = a, np.zeros(count, dtype=np.int64)
        lengths = a_length + b_length + self._extra
        cu = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
        sequence = np.repeat(np.arange(count), lengths)
        position = np.arange(cu[-1]) - cu[sequence]

        # [CLS] a [SEP] b [SEP]; without b the first [SEP] is the last token.
        middle = (a_length + 1)[sequence]
        second = position > middle
        special = (position == 0) | (position == middle) | (position == (lengths - 1)[sequence])
        where = np.where(second, (b - a_length - 2)[sequence], (a - 1)[sequence]) + position
        original = np.empty(len(position), dtype=np.int64)
        original[~special] = self._gather(where[~special])
        original[special] = self._special["[SEP]"]
        original[cu[:-1]] = self._special["[CLS]"]

        candidate = ~self._is_special[original]
        keys = draws.sample_keys(self.seed, epochs, samples, draws.MASK)[sequence]
        order = draws.token_draws(keys, position)
        if count == 0:
            chosen = candidate
        elif self.data.max_ngram > 1:
            continues = None if self._continues is None else self._continues[original]
            chosen = masking.choose_ngrams(
                order, candidate, continues, sequence, cu, self.data.mask_rate, self.data.max_ngram
            )
        elif self._continues is None:
            chosen = masking.choose_tokens(order, candidate, sequence, cu, self.data.mask_rate)
        else:
            chosen = masking.choose_words(
                order, candidate, self._continues[original], sequence, cu, self.data.mask_rate
            )
        masked = np.flatnonzero(chosen)
        keys = draws.sample_keys(self.seed, epochs, samples, draws.REPLACEMENT)[sequence[masked]]
        labels = original[masked]
        shown = original.copy()
        shown[masked] = masking.replacements(
            draws.token_draws(keys, position[masked]), labels, self._special["[MASK]"], self._ordinary
        )
        return Batch(
            input_ids=torch.from_numpy(shown),
            token_types=torch.from_numpy(second.astype(np.int64)),
            positions=torch.from_numpy(position),
            cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
            max_seqlen=int(lengths.max(initial=0)),
            masked=torch.from_numpy(masked),
            labels=torch.from_numpy(labels),
            pair_labels=torch.from_numpy(label) if pair else None,
            sample_ids=torch.from_numpy(samples),
        )


def _continuation_table(directory: Path, vocab_size: int) -> np.ndarray:
    ids = continuations(prepare.tokenizer(directory))
    if ids is None:
        raise ConfigError(
            "whole_word needs a tokenizer that marks pieces inside words (WordPiece's ##), got one without"
        )
    table = np.zeros(vocab_size, dtype=bool)
    table[ids] = True
    return table


def heldout(directory: Path | str, data: DataConfig, objective: str, seed: int) -> list[Batch]:
    """Held-out batches of about batch_tokens with fixed samples and masks: a fair draw of at most eval_tokens tokens (at least
    one sample)."""
    batches = Batches(directory, replace(data, max_ngram=1), objective, seed, "heldout")  # one measure for all recipes
    order, ends = batches._order(0)
    samples = order[: max(1, np.searchsorted(ends, data.eval_tokens, side="right"))]
    lengths = batches._lengths[samples]
    pieces = min(len(samples), -(-int(lengths.sum()) // data.batch_tokens))
    epochs = np.zeros(len(samples), dtype=np.int64)
    return [batches._build(epochs[s], samples[s]) for s in cut(lengths, pieces)]
