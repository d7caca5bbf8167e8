"""Masked-LM loss in Triton: the cross entropy of a chunk of logits, its gradient written in their place. Matrix products are torch's.

R rows, V words of the padded vocabulary. Ignored rows stay in, with weight 0: leaving them out would take the host waiting for the GPU. A
label that is no word and not ignored makes its row's loss and gradient NaN; nothing outside of the logits is ever read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import _triton
from stackbert_kernels.ops._triton_column_sums import column_sums
from stackbert_kernels.ops._triton_column_sums import compilation as column_sums_compilation
from stackbert_kernels.ops.masked_lm_loss import padded

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where a maximum starts: -inf would give inf - inf


@triton.jit
def _absorb(top, total, z, EXACT: tl.constexpr):
    """Takes the words z [THREADS, PER] into the running maximum and sum of exponentials [THREADS] of each thread.

    top is the maximum of z; but where 16 bits round the logits anyway (not EXACT), of z log2(e), which saves an operation a word.
    """
    z = z.to(tl.float32)
    highest = tl.max(z, 1)
    if EXACT:
        new = tl.maximum(top, highest)
        return new, total * tl.exp2((top - new) * LOG2E) + tl.sum(tl.exp2((z - new[:, None]) * LOG2E), 1)
    new = tl.maximum(top, highest * LOG2E)
    return new, total * tl.exp2(top - new) + tl.sum(tl.exp2(z * LOG2E - new[:, None]), 1)


@triton.jit
def _finished(top, total, EXACT: tl.constexpr):
    """(maximum over the threads, sum of exponentials relative to it, log of the sum of exp(z))"""
    high = tl.max(top, 0)
    if EXACT:
        total = tl.sum(total * tl.exp2((top - high) * LOG2E), 0)
        return high, total, high + LN2 * tl.log2(total)
    total = tl.sum(total * tl.exp2(top - high), 0)
    return high, total, LN2 * (high + tl.log2(total))


@triton.jit
def _gradient(z, high, denominator, weight, is_label, EXACT: tl.constexpr):
    """weight (softmax(z) - 1 at the label); all of it is 0 where weight is 0, NaN where that is NaN."""
    if EXACT:
        dz = tl.exp2((z.to(tl.float32) - high) * LOG2E) * (weight / denominator)
    else:
        dz = tl.exp2(z.to(tl.float32) * LOG2E - (high + tl.log2(denominator) - tl.log2(weight)))
    return tl.where(is_label, dz - weight, dz)


@triton.jit
def _label(row_ptr, label, words, ignore_index, share):
    """(logit of the label, whether the row counts, its weight)"""
    kept = label != ignore_index
    known = (label >= 0) & (label < words)
    z = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    return z, kept, tl.where(kept, tl.where(known, share, float("nan")), 0.0)


@triton.jit(do_not_specialize=["rows", "words", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr, labels_ptr, count_ptr, losses_ptr, sums_ptr, rows, words, ignore_index, V: tl.constexpr,
    THREADS: tl.constexpr, PER: tl.constexpr, AHEAD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # A program takes every programs-th row and keeps the sums of its gradients over rows in registers: half of what a multiprocessor
    # has, so that it is alone there and must hide its own latency. While it writes the gradient of a row it therefore reads the next
    # one, AHEAD blocks of words before their turn, into the running maximum and sum. The row's second reading comes from the L1 cache.
    BLOCK: tl.constexpr = THREADS * PER
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    v = tl.arange(0, THREADS)[:, None] * PER + tl.arange(0, PER)[None, :]
    share = 1.0 / tl.load(count_ptr)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)

    sums = ()
    top, total = tl.full((THREADS,), LOWEST, tl.float32), tl.zeros((THREADS,), tl.float32)
    for first in tl.static_range(0, V, BLOCK):
        sums = sums + (tl.zeros((THREADS, PER), tl.float32),)  # noqa: RUF005  Triton unpacks no tuple
        inside = (first + v < V) & (program < rows)
        top, total = _absorb(
            top, total, tl.load(logits_ptr + program * V + first + v, mask=inside, other=-float("inf")), EXACT
        )

    for row in tl.range(program, rows, programs):
        here = logits_ptr + row * V
        there, more = here + programs * V, row + programs < rows
        ahead = ()
        for first in tl.static_range(0, min(V, AHEAD * BLOCK), BLOCK):
            block = tl.load(there + first + v, mask=(first + v < V) & more, other=-float("inf"))
            ahead = ahead + (block,)  # noqa: RUF005
        z = tl.load(here + v, mask=v < V, other=-float("inf"))

        label = tl.load(labels_ptr + row)
        z_label, kept, weight = _label(here, label, words, ignore_index, share)
        label = label.to(tl.int32)
        high, denominator, logsumexp = _finished(top, total, EXACT)
        tl.store(losses_ptr + row, tl.where(kept, logsumexp - z_label, 0.0))

        top, total = tl.full((THREADS,), LOWEST, tl.float32), tl.zeros((THREADS,), tl.float32)
        new = ()
        for first in tl.static_range(0, V, BLOCK):
            current = z
            if first + BLOCK < V:
                z = tl.load(here + first + BLOCK + v, mask=first + BLOCK + v < V, other=-float("inf"))
            if first + AHEAD * BLOCK < V:
                inside = (first + AHEAD * BLOCK + v < V) & more
                block = tl.load(there + first + AHEAD * BLOCK + v, mask=inside, other=-float("inf"))
                ahead = ahead + (block,)  # noqa: RUF005
            dz = _gradient(current, high, denominator, weight, first + v == label, EXACT)
            tl.store(here + first + v, dz, mask=first + v < V)
            new = new + (sums[first // BLOCK] + dz,)  # noqa: RUF005
            top, total = _absorb(top, total, ahead[first // BLOCK], EXACT)
        sums = new

    for first in tl.static_range(0, V, BLOCK):
        part = sums[first // BLOCK]
        if ADD:  # to those of the chunks before
            part += tl.load(sums_ptr + program * V + first + v, mask=first + v < V, other=0.0)
        tl.store(sums_ptr + program * V + first + v, part, mask=first + v < V)


@triton.jit(do_not_specialize=["words", "ignore_index"])
def cross_entropy_row_kernel(
    logits_ptr, labels_ptr, count_ptr, losses_ptr, correct_ptr, words, ignore_index, V: tl.constexpr,
    THREADS: tl.constexpr, PER: tl.constexpr, GRADIENT: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    # A row a program, any V. Several programs of a multiprocessor hide each other's latency.
    BLOCK: tl.constexpr = THREADS * PER
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    v = tl.arange(0, THREADS)[:, None] * PER + tl.arange(0, PER)[None, :]
    row = tl.program_id(0).to(tl.int64)
    here = logits_ptr + row * V
    label = tl.load(labels_ptr + row)
    z_label, kept, weight = _label(here, label, words, ignore_index, 1.0 / tl.load(count_ptr))
    label = label.to(tl.int32)

    top, total = tl.full((THREADS,), LOWEST, tl.float32), tl.zeros((THREADS,), tl.float32)
    better = tl.zeros((THREADS,), tl.int32)  # how many words are ahead of the label
    for first in range(0, V, BLOCK):
        z = tl.load(here + first + v, mask=first + v < V, other=-float("inf"))
        top, total = _absorb(top, total, z, EXACT)
        if CORRECT:
            z = z.to(tl.float32)
            better += tl.sum(((z > z_label) | ((z == z_label) & (first + v < label))).to(tl.int32), 1)
    high, denominator, logsumexp = _finished(top, total, EXACT)
    tl.store(losses_ptr + row, tl.where(kept, logsumexp - z_label, 0.0))
    if CORRECT:
        tl.store(correct_ptr + row, kept & (z_label == z_label) & (tl.sum(better, 0) == 0))

    if GRADIENT:
        for first in range(0, V, BLOCK):
            z = tl.load(here + first + v, mask=first + v < V, other=-float("inf"))
            dz = _gradient(z, high, denominator, weight, first + v == label, EXACT)
            tl.store(here + first + v, dz, mask=first + v < V)


@dataclass(frozen=True)
class Configuration:
    words: int  # of the gradient's sums that a thread keeps, at most
    num_warps: int  # at most; they keep the sums of words * 32 num_warps columns, the largest vocabulary
    ahead: int  # blocks of 16 bytes a thread
    row_warps: int  # of the kernel with a row a program
    row_bytes: int  # that a thread reads at a time there

    @property
    def registers(self) -> int:
        return _triton.registers_of(self.num_warps)


CANDIDATES = (
    Configuration(128, 8, 6, 8, 32),
    Configuration(64, 16, 3, 8, 32),
    Configuration(128, 8, 8, 4, 32),
    Configuration(64, 16, 2, 16, 16),
)
CONFIGURATIONS = {80: CANDIDATES[0], 90: CANDIDATES[0], 100: CANDIDATES[0]}


def _lanes(vocabulary: int, itemsize: int, configuration: Configuration) -> tuple[dict[str, int], int]:
    """Constants of cross_entropy_kernel and its warps: as few, from 4 on, as keep the sums of all words."""
    warps = 4
    while 32 * warps * configuration.words < vocabulary:
        warps *= 2
    return {"V": vocabulary, "THREADS": 32 * warps, "PER": 16 // itemsize, "AHEAD": configuration.ahead}, warps


def _row_lanes(vocabulary: int, itemsize: int, configuration: Configuration) -> dict[str, int]:
    return {"V": vocabulary, "THREADS": 32 * configuration.row_warps, "PER": configuration.row_bytes // itemsize}


class _CrossEntropy:
    """What the chunks of a call have in common."""

    def __init__(self, labels: Tensor, words: int, ignore_index: int, count: Tensor):
        self.labels, self.words, self.ignore_index, self.count = labels, words, ignore_index, count
        self.chosen = _triton.configuration(CONFIGURATIONS, labels.device)
        self.sums: Tensor | None = None  # of the gradient over the rows that each program had, in all chunks

    def __call__(
        self, logits: Tensor, rows: slice, losses: Tensor, need_dlogits: bool, need_bias: bool
    ) -> Tensor | None:
        chosen, labels = self.chosen, self.labels[rows]
        if not need_bias or logits.shape[1] > 32 * chosen.num_warps * chosen.words:
            self.row_by_row(logits, rows, losses, None, need_dlogits)
            return logits.sum(0, dtype=torch.float32) if need_bias else None
        constants, warps = _lanes(logits.shape[1], logits.element_size(), chosen)
        first = self.sums is None
        if first:
            programs = min(_triton.multiprocessors(logits.device) * (chosen.num_warps // warps), logits.shape[0])
            self.sums = logits.new_empty(programs, logits.shape[1], dtype=torch.float32)
        with _triton.on(logits.device):
            cross_entropy_kernel[(self.sums.shape[0],)](
                logits, labels, self.count, losses, self.sums, logits.shape[0], self.words, self.ignore_index, ADD=not first, **constants,
                num_warps=warps, maxnreg=chosen.registers,
            )  # fmt: skip
        return None

    def rows_of_sums(self, hidden: Tensor, vocabulary: int) -> int:
        return _triton.multiprocessors(hidden.device)

    def dbias(self) -> Tensor | None:
        return None if self.sums is None else column_sums(self.sums, torch.float32)

    def predictions(self, logits: Tensor, rows: slice, losses: Tensor, correct: Tensor) -> None:
        self.row_by_row(logits, rows, losses, correct, False)

    def row_by_row(
        self, logits: Tensor, rows: slice, losses: Tensor, correct: Tensor | None, need_dlogits: bool
    ) -> None:
        constants = _row_lanes(logits.shape[1], logits.element_size(), self.chosen)
        with _triton.on(logits.device):
            cross_entropy_row_kernel[(logits.shape[0],)](
                logits, self.labels[rows], self.count, losses, correct, self.words, self.ignore_index,
                GRADIENT=need_dlogits, CORRECT=correct is not None, **constants, num_warps=self.chosen.row_warps,
            )  # fmt: skip


masked_lm_loss_fwd = partial(padded.masked_lm_loss_fwd, _CrossEntropy)
masked_lm_predictions = partial(padded.masked_lm_predictions, _CrossEntropy)


def compilations(arch: int) -> list[_triton.Compilation]:
    chosen = CONFIGURATIONS[arch]
    found = [column_sums_compilation("masked_lm_loss dbias")]
    for vocabulary, dtype, itemsize in ((30528, "bf16", 2), (8192, "bf16", 2), (30528, "fp32", 4), (30528, "fp16", 2)):
        types = {"logits_ptr": f"*{dtype}:16", "labels_ptr": "*i64", "count_ptr": "*fp32:16", "losses_ptr": "*fp32"}
        types |= {"sums_ptr": "*fp32:16", "correct_ptr": "*i1", "rows": "i32", "words": "i32", "ignore_index": "i32"}
        constants, warps = _lanes(vocabulary, itemsize, chosen)
        row_constants = _row_lanes(vocabulary, itemsize, chosen)
        for name, kernel, values, num_warps in (
            ("gradients", cross_entropy_kernel, constants | {"ADD": True}, warps),
            ("gradient, bias frozen", cross_entropy_row_kernel, row_constants | {"GRADIENT": True, "CORRECT": False, "correct_ptr": None}, chosen.row_warps),
            ("predictions", cross_entropy_row_kernel, row_constants | {"GRADIENT": False, "CORRECT": True}, chosen.row_warps),
        ):  # fmt: skip
            found.append(
                _triton.Compilation(
                    name=f"masked_lm_loss {name} {vocabulary} {dtype}",
                    kernel=kernel,
                    signature={a: types[a] for a in kernel.arg_names if a in types and a not in values},
                    constants=values,
                    num_warps=num_warps,
                    maxnreg=chosen.registers if kernel is cross_entropy_kernel else None,
                    max_registers=chosen.registers if kernel is cross_entropy_kernel else 64,
                    max_narrow=5,  # count; a row's label, logit of the label, loss, hit
                )
            )
    return found
