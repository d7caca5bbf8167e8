"""Results as the benchmarks write them, with times that a test chooses."""

from __future__ import annotations

from benchmarks.table import OURS

MACHINE = {
    "device": "cuda", "gpu": "NVIDIA H200", "cpu": "some CPU", "cores": 16, "threads": 16, "python": "3.12.1",
    "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-22", "commit": "0123456789abcdef", "dirty": False,
}  # fmt: skip


def stats(seconds: float, spread: float = 0.02) -> dict:
    return {"median": seconds, "p20": seconds * (1 - spread), "p80": seconds * (1 + spread), "samples": 30}


def op_row(
    op="layer_norm", case="65536 x 768", dtype="bf16", p=0.1, direction="forward", *, times=None, spread=0.02,
    nbytes=400_000_000, flops=0, copy=4e12, matmul=8e14, wrong=None, options=None,
) -> dict:  # fmt: skip
    """A row of ops.json with these seconds by contender; those of ours come first, as the harness has it."""
    times = {"native": 106e-6, "torch": 212e-6} if times is None else times
    ours = next((name for name in times if name in OURS), None)
    ceilings = ({"copy": copy} if nbytes else {}) | ({"matmul": matmul} if flops else {})
    amounts = {"copy": nbytes, "matmul": flops}
    row = {
        "op": op, "case": case, "sizes": {}, "dtype": dtype, "p": p, "options": options or {}, "direction": direction,
        "bytes": nbytes, "flops": flops, "ours": ours, "absent": {}, "wrong": wrong or {}, "ceilings": ceilings,
        "seconds": {name: stats(t, spread) for name, t in times.items()}
        | {name: stats(amounts[name] / rate) for name, rate in ceilings.items()},
    }  # fmt: skip
    if ours is None:
        return row
    shares = {name: amounts[name] / rate / times[ours] for name, rate in ceilings.items()}
    bound = max(shares, key=shares.get, default=None)
    return row | {
        "bound": bound, "share": shares.get(bound), "gb_per_s": nbytes / times[ours] / 1e9,
        "tflop_per_s": flops / times[ours] / 1e12,
        "ratios": {name: stats(t / times[ours]) for name, t in times.items() if name != ours},
    }  # fmt: skip
