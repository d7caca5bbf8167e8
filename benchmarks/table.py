"""Results as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OURS = ("native", "triton", "reference")


def is_ours(contender: str) -> bool:
    """An implementation of an op, or a whole step of ours ("ours native")."""
    return contender in OURS or contender.split()[0] == "ours"


def text(rows: Sequence[Mapping[str, object]]) -> str:
    """Columns are the keys of all rows, in order of appearance; floats get three digits, what a row lacks a dash."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """The same as a Markdown table."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(row.get(column)).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def header(machine: Mapping[str, object]) -> str:
    """One line: what the timings have to be read with."""
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads"
    commit = str(machine.get("commit") or "unknown")[:12] + (" with changes" if machine.get("dirty") else "")
    triton = f", triton {machine['triton']}" if machine.get("triton") else ""
    return f"{place}; torch {machine['torch']}{triton}; commit {commit}; {machine['date']}"


def case_name(row: Mapping) -> str:
    """ "65536 x 768 bf16 p=0.1": what a row of the op benchmarks measured, without its direction."""
    options = "".join(f" {key}={value}" for key, value in row["options"].items())
    dropout = f" p={row['p']:g}" if row["p"] else ""
    return f"{row['case']} {row['dtype']}{dropout}{options}"


def floor(row: Mapping) -> float | None:
    """The seconds that the declared bytes and FLOPs take at least, by the ceilings of the same rounds."""
    amounts = {"copy": row["bytes"], "matmul": row["flops"]}
    return max((amounts[name] / rate for name, rate in row.get("ceilings", {}).items()), default=None)


def op_rows(rows: Sequence[Mapping]) -> list[dict[str, object]]:
    """A line a row of the op benchmarks: how long ours took, at which rate, what share of the ceiling, and the ratio to each peer."""
    lines = []
    for row in rows:
        options = "".join(f" {value}" for value in row["options"].values())
        line = {
            "op": row["op"],
            "case": row["case"] + options,
            "dtype": row["dtype"],
            "p": row["p"],
            "pass": row["direction"],
        }
        if row["ours"] is None:
            lines.append(line | {"impl": "wrong: no time"})
            continue
        memory = row["bound"] == "copy"
        lines.append(
            line
            | {
                "impl": row["ours"],
                "us": 1e6 * row["seconds"][row["ours"]]["median"],
                "rate": f"{row['gb_per_s']:.0f} GB/s" if memory else f"{row['tflop_per_s']:.3g} TFLOP/s",
                "of ceiling": row["share"],
            }
            | {f"x {name}": row["ratios"][name]["median"] for name in sorted(row["ratios"], key=is_ours, reverse=True)}
        )
    return lines


def left_out(rows: Sequence[Mapping]) -> list[str]:
    """A line for each peer that was absent and each candidate that was wrong, with the first reason given."""
    lines = {}
    for row in rows:
        for name, reason in row["wrong"].items():
            lines.setdefault((row["op"], name, "wrong"), f"{row['op']}: {name} got no time: {reason}")
        for name, reason in row["absent"].items():
            lines.setdefault((name, reason), f"{name} absent: {reason}")
    return list(lines.values())
