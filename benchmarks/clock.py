"""Timing that stands other people using the machine: candidates take turns, and what is reported is medians.

On a GPU a candidate is timed by events on the stream. In front of each call the stream sleeps long enough for the host to queue the
call, so that launch and autograd overhead stay out of the figure, and a large buffer is read, so that nothing of the inputs is left in
the L2 cache (read, not written: the write-back of dirty lines would run into the timed call).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import torch

SLEEP_CYCLES = 1_500_000  # about 0.8 ms at 1.8 GHz: more than the host time of most candidates
CYCLES_PER_SECOND = 2e9  # of the fastest clocks: a sleep is rather too long than too short
FLUSH_BYTES = 1 << 28  # several times the L2 of any GPU so far


@dataclass(frozen=True)
class Stats:
    """Middle and spread of what was measured: seconds, or ratios of seconds."""

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Stats:
        deciles = quantiles(samples, n=10, method="inclusive")
        return cls(deciles[4], deciles[1], deciles[7], tuple(samples))

    def as_dict(self) -> dict[str, float | int]:
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "samples": len(self.samples)}


Calls = Mapping[str, Callable[[int], object]]  # name -> call(round); the round chooses the set of inputs


def interleave(
    calls: Calls, device: str, *, repeats: int = 30, warmup: int = 3, seconds: float = 1e9
) -> dict[str, Stats]:
    """Seconds of one call of each candidate. They are called in turn, in alternating order, so that a slow moment of the machine hits all.

    After `seconds` no new round begins, but two are always run. Warming up takes at most half as long, or one round.
    """
    cuda = device == "cuda"
    cycles = {}
    end = time.perf_counter() + seconds / 2
    for i in range(warmup):
        if i and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            cycles[name] = max(SLEEP_CYCLES, int(1.5 * CYCLES_PER_SECOND * (time.perf_counter() - start)))
            if cuda:
                torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + seconds
    for i in range(max(repeats, 2)):
        if i >= 2 and time.perf_counter() > end:
            break
        for name, taken in (_cuda_round(calls, order, i, cycles) if cuda else _cpu_round(calls, order, i)).items():
            samples[name].append(taken)
        order.reverse()
    return {name: Stats.of(taken) for name, taken in samples.items()}


def ratio(stats: Mapping[str, Stats], slow: str, fast: str) -> Stats:
    """How many times faster `fast` is: the ratio within each round, where both saw the same machine."""
    return Stats.of([a / b for a, b in zip(stats[slow].samples, stats[fast].samples, strict=True)])


def _cpu_round(calls: Calls, order: Sequence[str], i: int) -> dict[str, float]:
    taken = {}
    for name in order:
        start = time.perf_counter()
        calls[name](i)
        taken[name] = time.perf_counter() - start
    return taken


def _cuda_round(calls: Calls, order: Sequence[str], i: int, cycles: Mapping[str, int]) -> dict[str, float]:
    flush = _buffer("cuda", FLUSH_BYTES // 4, torch.float32)
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    for name in order:
        torch.cuda._sleep(cycles[name])
        flush.sum()
        events[name][0].record()
        calls[name](i)
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


_BUFFERS: dict[tuple, torch.Tensor] = {}


def _buffer(device: str, numel: int, dtype: torch.dtype, copy: int = 0) -> torch.Tensor:
    """Random, and kept: matrix units run faster on zeros, and a fresh buffer costs page faults."""
    key = (device, numel, dtype, copy)
    if key not in _BUFFERS:
        _BUFFERS[key] = torch.randn(numel, device=device, dtype=torch.float32).to(dtype)
    return _BUFFERS[key]


COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # past every cache
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def copy_ceiling(device: str) -> tuple[Callable[[int], object], int]:
    """A large copy, and the bytes that it reads and writes."""
    nbytes = COPY_BYTES[device]
    source, target = (_buffer(device, nbytes // 4, torch.float32, i) for i in range(2))
    return lambda _: target.copy_(source), 2 * nbytes


def matmul_ceiling(device: str, dtype: torch.dtype) -> tuple[Callable[[int], object], int]:
    """A large matrix product, and its FLOPs."""
    n = MATMUL_SIZE[device]
    a, b = (_buffer(device, n * n, dtype, i).view(n, n) for i in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out), 2 * n**3
