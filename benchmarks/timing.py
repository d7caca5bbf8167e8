"""Timing on the CPU that stands other people using the machine: candidates take turns, and what is reported is medians.

Every script checks its results first and times only what is right:

    torch.testing.assert_close(ours(), torchs())
    stats = compare({"ours": ours, "torch": torchs})
    print_table([{"shape": "8192 x 768", "ours ms": 1e3 * stats["ours"].median, "speed-up": speedup(stats, "torch", "ours").median}])
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import torch


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


def compare(candidates: Mapping[str, Callable[[], object]], *, repeats: int = 30, warmup: int = 3) -> dict[str, Stats]:
    """Seconds of one call of each candidate. They are called in turn, in alternating order, so that a slow moment of the machine hits all."""
    for _ in range(warmup):
        for function in candidates.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for _ in range(max(repeats, 2)):
        for name in order:
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return {name: Stats.of(samples) for name, samples in seconds.items()}


def speedup(stats: Mapping[str, Stats], slow: str, fast: str) -> Stats:
    """How many times faster `fast` is: the ratio within each round, where both saw the same machine."""
    return Stats.of([a / b for a, b in zip(stats[slow].samples, stats[fast].samples, strict=True)])


def copy_bandwidth(nbytes: int = 1 << 28, *, repeats: int = 15) -> float:
    """Bytes a second of torch's copy_ between two buffers of `nbytes`, counting what is read and what is written."""
    source, target = torch.ones(nbytes // 4), torch.zeros(nbytes // 4)
    return 2 * nbytes / compare({"copy": lambda: target.copy_(source)}, repeats=repeats)["copy"].median


def machine() -> dict[str, str | int]:
    """What a table of timings has to be read with."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": (commit or "unknown") + (" + changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Columns are the keys of the first row; floats get three digits."""

    def text(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    columns = list(rows[0])
    cells = [columns] + [[text(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def arguments(description: str) -> argparse.Namespace:
    """The options of every benchmark script; sets the threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def report(rows: Sequence[Mapping[str, object]], json_path: Path | None = None) -> None:
    """Prints the machine and the rows; writes both where asked."""
    header = machine()
    print("  ".join(f"{name} {value}" for name, value in header.items()))
    print_table(rows)
    if json_path:
        json_path.write_text(json.dumps({"machine": header, "rows": list(rows)}, indent=1) + "\n")
