"""The comparison as a person reads it on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from stackbert_kernels.train.run_facts import magnitude

COUNTED = {
    "executed": "matrix products as executed",
    "b1": "layer forwards, a backward costing one of them (b = 1)",
    "b2": "layer forwards, a backward costing two of them (b = 2)",
}


SECONDS = {"passed": "training as measured", "timed": "steps, at what a step of their stage took when it was timed"}


def text(result: dict) -> str:
    """Two tables, losses and costs, best method first; below them what keeps the figures from being taken at face value."""
    methods, target, equal = result["methods"], result["target"], result["equal"]
    several = any(len(m["runs"]) > 1 for m in methods)
    starred = any(at and at["mid_decay"] for m in methods for at in m["at_equal"].values())
    rates = any(m["tuning"] for m in methods) or len({m["lr"] for m in methods}) > 1
    losses = [["", "method", "runs", "steps", *["rate"] * rates, "final loss", "vs baseline", "accuracy", f"at {magnitude(equal['flops'])}FLOP",
               f"at {magnitude(equal['tokens'])} tokens", f"at {_seconds(equal['seconds'])} s"]]  # fmt: skip
    costs = [["", "method", "FLOPs", "tokens", "seconds", "of the runs", "spent in all"]]
    for rank, m in enumerate(methods, 1):
        at, cost, spent = m["at_equal"], m["to_target"], m["spent"]
        losses.append([str(rank), m["name"], str(len(m["runs"])), f"{m['steps']:,}", *[f"{m['lr']:g}"] * rates, _loss(m["final_loss"]),
                       _difference(m, target["method"]), _loss(m["final_accuracy"]),
                       *(_loss(at[measure]) for measure in ("flops", "tokens", "seconds"))])  # fmt: skip
        of_all = f"{magnitude(spent['flops']['mean'])}FLOP, {magnitude(spent['tokens']['mean'])} tokens, {_seconds(spent['seconds']['mean'])} s"
        costs.append([str(rank), m["name"], _cost(cost, "flops", magnitude), _cost(cost, "tokens", magnitude), _cost(cost, "seconds", _seconds),
                      f"{cost['runs_that_reached']} of {len(m['runs'])}", of_all])  # fmt: skip
    for entry in result["not_ranked"]:
        losses.append(
            ["-", entry["name"], "", "", *[""] * rates, f"({entry['curve'][-1]['loss']:.3f})", "", "", "", "", ""]
        )
    free = (
        "earlier runs, teachers and sources are free"
        if result["free_source"]
        else "earlier runs, teachers and sources are counted"
    )
    lines = [
        "Held-out loss"
        + (" (mean, half the range over seeds)" if several else "")
        + (", * read in mid-decay" if starred else ""),
        *_aligned(losses),
        f"without context (unigram): loss {result['unigram']['loss']:.3f}, accuracy {result['unigram']['accuracy']:.3f}",
        "",
        f"Cost until held-out loss {target['loss']:.3f}, that of {target['method']} at its end"
        + (f" (mean of {target['runs']} runs)" if target["runs"] > 1 else ""),
        *_aligned(costs),
        f"FLOPs: {COUNTED[result['counting']]}; seconds: {SECONDS[result['clock']]}{_load(result.get('load'))}; {free}",
        "ranked by seconds to that loss, then by loss at equal seconds; a single run is held against the baseline's of the same seed",
    ]
    warnings = [f"{entry['name']} is not ranked: {entry['why']} ({entry['run']})" for entry in result["not_ranked"]]
    warnings += result["notes"]
    return "\n".join([*lines, *([""] if warnings else []), *(f"! {line}" for line in warnings)])


def _loss(spread: dict | None) -> str:
    if spread is None:
        return "-"
    half = (spread["max"] - spread["min"]) / 2
    return f"{spread['mean']:.3f}" + (f" ±{half:.3f}" if half else "") + ("*" if spread.get("mid_decay") else "")


def _load(load: dict | None) -> str:
    if not load or not load["threads"]:
        return ""
    threads = f"{load['threads']} thread{'s' if load['threads'] > 1 else ''}"
    return f" ({load['jobs']} runs at a time, {threads} each)" if load["jobs"] > 1 else f" ({threads})"


def _difference(entry: dict, baseline: str) -> str:
    spread = entry["final_against_baseline"]
    if spread is None or entry["name"] == baseline:
        return "-"
    half = (spread["max"] - spread["min"]) / 2
    return f"{spread['mean']:+.3f}" + (f" ±{half:.3f}" if half else "")


def _cost(cost: dict, measure: str, shown) -> str:
    if cost[measure] is None:
        return "never reached"
    saved = 100 * cost[f"{measure}_saved"]
    return f"{shown(cost[measure])}" + (
        f" ({abs(saved):.0f}% {'less' if saved > 0 else 'more'})" if abs(saved) >= 0.5 else ""
    )


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right, two spaces between."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip
