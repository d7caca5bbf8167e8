"""The table at the end: fewer than 60 lines, what failed first to be seen."""

from __future__ import annotations

from collections.abc import Mapping

from .. import table

MOST_LINES = 58
WIDTH = 160
IMPLEMENTATIONS = ("native", "triton", "reference")
TIME_WAS_UP = "the time was up"
FAILURES = 4  # shown of a phase; all are in gpu.json


def text(result: Mapping) -> str:
    """The summary of a gpu.json, of a run that was cut off too."""
    lines = [
        table.header(result["machine"]) + (" - PRETEND: no GPU, nothing here is a result" if result["pretend"] else "")
    ]
    room = MOST_LINES - 2 - len(result["phases"])
    wanted = {name: _details(phase) for name, phase in result["phases"].items()}
    kept = _fair(wanted, room)
    for name, phase in result["phases"].items():
        state = phase["state"].upper() if phase["state"] in ("failed", "cut off") else phase["state"]
        lines.append(
            f"{name:11} {state:8} {phase['seconds']:5.0f} s of {phase['limit']:3.0f}  {phase.get('reason', '')}".rstrip()
        )
        lines += [f"    {line}" for line in kept[name]]
    lines.append(verdict(result))
    return "\n".join(line[:WIDTH] for line in lines)


def verdict(result: Mapping) -> str:
    bad = [name for name, phase in result["phases"].items() if phase["state"] not in ("passed", "skipped")]
    missing = [name for name in result["planned"] if name not in result["phases"]]
    if bad or missing:
        parts = [f"failed: {', '.join(bad)}"] * bool(bad) + [f"not run: {', '.join(missing)}"] * bool(missing)
        return "; ".join(parts)
    skipped = [name for name, phase in result["phases"].items() if phase["state"] == "skipped"]
    return "everything passed" + (f"; skipped: {', '.join(skipped)}" if skipped else "")


def _details(phase: Mapping) -> list[str]:
    failures, lines = phase.get("failures", []), phase.get("lines", [])
    more = [f"{len(failures) - FAILURES} more failures in gpu.json"] if len(failures) > FAILURES else []
    told = [f for f in failures if f not in lines][:FAILURES]
    return [*(f"FAILED {line}" if line in failures else line for line in lines[:1]), *(f"FAILED {f}" for f in told), *more,
            *(f"FAILED {line}" if line in failures else line for line in lines[1:])]  # fmt: skip


def _fair(wanted: dict[str, list[str]], room: int) -> dict[str, list[str]]:
    """As many lines of each as fit: short ones are whole, the longest lose most."""
    limit = max(map(len, wanted.values()), default=0)
    while sum(min(limit, len(lines)) for lines in wanted.values()) > room:
        limit -= 1
    return {
        name: lines
        if len(lines) <= limit
        else [*lines[: limit - 1], f"... {len(lines) - limit + 1} lines more in gpu.json"]
        for name, lines in wanted.items()
    }


# What the benchmarks wrote, as lines.


def op_lines(result: Mapping) -> tuple[list[str], list[str]]:
    """A line a row, training's own dtype first: time, share of the ceiling, and the fastest peer; then what was wrong."""
    failures, missed = _failures(result)
    rows = sorted((r for r in result["rows"] if r["ours"]), key=lambda r: (r["dtype"] != "bf16", r["p"] == 0))
    return [f"{len(rows)} rows{missed}", *table.text([_compact(row) for row in rows]).splitlines()], failures


def step_lines(result: Mapping) -> tuple[list[str], list[str]]:
    """A line for each candidate of each setting, then the cost of each MSLT stage."""
    failures, missed = _failures(result)
    lines = [
        {
            "setting": row["case"], "dtype": row["dtype"], "step by": name, "ms": 1e3 * row["seconds"][name]["median"],
            "tokens/s": speed, "MFU": row["mfu"][name], "x HF eager": row["speed_up"].get(name, {}).get("median"),
        }
        for row in result["rows"] if row["op"] == "train_step"
        for name, speed in row["tokens_per_second"].items()
    ]  # fmt: skip
    stages = [row for row in result["rows"] if row["op"] == "mslt_stage"]
    costs = ", ".join(f"{row['of_full_step']['median']:.2f} ({row['predicted']:.2f})" for row in stages)
    told = [f"MSLT stages, of a full step, measured (predicted): {costs}"] if stages else []
    return [f"{len(lines)} rows{missed}", *told, *table.text(lines).splitlines()], failures


def dropin_lines(result: Mapping) -> tuple[list[str], list[str]]:
    """A line for each candidate of each setting: models of transformers, patched and not."""
    from ..bench_dropin import table_rows

    failures, missed = _failures(result)
    lines = table_rows(result["rows"])
    return [f"{len(lines)} rows{missed}", *table.text(lines).splitlines()], failures


def _failures(result: Mapping) -> tuple[list[str], str]:
    """What of ours was wrong or broke (a peer's trouble is not ours), and how much the time did not allow."""
    problems = [line for line in result["problems"] if not line.endswith(TIME_WAS_UP)]
    missed = len(result["problems"]) - len(problems)
    ours = [
        f"{row['op']} {row['case']} {row['dtype']} {name}: {reason}"
        for row in result["rows"]
        for name, reason in row["wrong"].items()
        if name in IMPLEMENTATIONS or name.startswith("ours")
    ]
    return ours + problems, f", {missed} cases left out: {TIME_WAS_UP}" if missed else ""


def _compact(row: Mapping) -> dict[str, object]:
    peers = {name: ratio["median"] for name, ratio in row["ratios"].items() if name not in IMPLEMENTATIONS}
    best = min(peers, key=peers.get, default=None)
    options = "".join(f" {value}" for value in row["options"].values())
    return {
        "op": row["op"],
        "case": row["case"] + options,
        "dtype": row["dtype"],
        "p": row["p"],
        "pass": row["direction"],
        "impl": row["ours"],
        "us": 1e6 * row["seconds"][row["ours"]]["median"],
        "of ceiling": row["share"],
        "fastest peer": best,
        "x": peers.get(best),
        "x torch": peers.get("torch"),
    }
