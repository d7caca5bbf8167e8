"""What became slower between two result files of the same benchmark.

Rows are matched by op, case, dtype, p, options, direction and implementation; ours are judged, peers are the control. A change counts when
it is larger than --over and the ranges p20 to p80 of the two files do not meet, in seconds and in floors; else it is within noise. The floor
is what the declared bytes or FLOPs take at the ceiling of the same rounds: a machine that was slower as a whole changes seconds, not floors.
Seconds of different machines say nothing about a change: then floors alone are compared.

Exit status: 0 nothing became slower beyond noise, 1 something did, or is wrong now, 2 bad use.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from . import results_file, table
from .command_line import DONE, FAILED, BadUse, Parser

SLOWER, FASTER, NOISE, SAME, WRONG = "slower", "faster", "within noise", "same", "wrong now"
ONLY_A, ONLY_B = "only in A", "only in B"
IDENTITY = ("device", "gpu", "cpu", "cores", "threads")  # the machine; what else differs is only named
NAMED = ("torch", "triton", "cuda", "driver_version", "power_limit")


@dataclass(frozen=True)
class Key:
    op: str
    case: str
    dtype: str
    p: float
    options: str
    direction: str
    impl: str


@dataclass(frozen=True)
class Time:
    """In seconds, or in floors."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Change:
    key: Key
    a: Time | None
    b: Time | None
    verdict: str

    @property
    def ratio(self) -> float | None:
        """B over A."""
        return self.b.median / self.a.median if self.a and self.b else None


def key_of(row: Mapping, impl: str) -> Key:
    options = " ".join(f"{name}={value}" for name, value in row["options"].items())
    return Key(row["op"], row["case"], row["dtype"], row["p"], options, row["direction"], impl)


def times(result: Mapping, *, in_floors: bool) -> dict[Key, Time]:
    """Of ours and of the peers; in floors: of those rows that have a ceiling."""
    found = {}
    for row in result["rows"]:
        unit = table.floor(row) if in_floors else 1.0
        for name, stats in row["seconds"].items():
            if unit and name not in row.get("ceilings", {}):
                found[key_of(row, name)] = Time(*(stats[field] / unit for field in ("median", "p20", "p80")))
    return found


def wrongs(result: Mapping) -> set[Key]:
    """What got no time because it was wrong."""
    return {key_of(row, name) for row in result["rows"] for name in row.get("wrong", {})}


def judge(a: Time, b: Time, over: float) -> str:
    """`over` is a fraction: 0.05."""
    if b.median > a.median * (1 + over):
        return SLOWER if b.p20 > a.p80 else NOISE
    if a.median > b.median * (1 + over):
        return FASTER if a.p20 > b.p80 else NOISE
    return SAME


def changes(a: Mapping, b: Mapping, over: float, *, in_floors: bool = False) -> list[Change]:
    """Of ours, in the order of A, then what only B has."""
    before, after, wrong = times(a, in_floors=in_floors), times(b, in_floors=in_floors), wrongs(b)
    floors = times(a, in_floors=True), times(b, in_floors=True)
    found = []
    for key in dict.fromkeys((*before, *after)):
        if not table.is_ours(key.impl):
            continue
        old, new = before.get(key), after.get(key)
        if old and new:
            verdict = judge(old, new, over)
            if key in floors[0] and key in floors[1] and judge(floors[0][key], floors[1][key], over) != verdict:
                verdict = SAME if verdict == SAME else NOISE
        elif old:
            verdict = WRONG if key in wrong else ONLY_A
        else:
            verdict = ONLY_B
        found.append(Change(key, old, new, verdict))
    return found


def control(a: Mapping, b: Mapping, *, in_floors: bool) -> float | None:
    """How much slower the peers are in B: the median of their ratios, which shows a machine that drifted."""
    before, after = times(a, in_floors=in_floors), times(b, in_floors=in_floors)
    ratios = [after[key].median / before[key].median for key in before if key in after and not table.is_ours(key.impl)]
    return median(ratios) if ratios else None


def warnings(a: Mapping, b: Mapping) -> tuple[bool, list[str]]:
    """Whether the machines differ, and a line for each thing that makes the comparison weaker."""
    one, other = a["machine"], b["machine"]
    differs = [field for field in IDENTITY if one.get(field) != other.get(field)]
    lines = []
    if differs:
        what = "; ".join(f"{field} {one.get(field)}, {other.get(field)}" for field in differs)
        lines.append(f"different machines ({what}): times are compared in floors of their own machine, not in seconds")
    for field in NAMED:
        if one.get(field) != other.get(field):
            lines.append(f"{field} differs: {one.get(field)}, {other.get(field)}")
    for name, result in (("A", a), ("B", b)):
        for mark in ("quick", "pretend"):
            if result.get(mark):
                lines.append(f"{name} is a {mark} run: it shows that everything runs, not how fast")
    return bool(differs), lines


def lines_of(found: Sequence[Change], *, in_floors: bool) -> list[dict[str, object]]:
    """For the table."""
    unit, scale = ("floors", 1.0) if in_floors else ("us", 1e6)
    return [
        {
            "op": change.key.op,
            "case": f"{change.key.case} {change.key.options}".strip(),
            "dtype": change.key.dtype,
            "p": change.key.p,
            "pass": change.key.direction,
            "impl": change.key.impl,
            f"A {unit}": scale * change.a.median if change.a else None,
            f"B {unit}": scale * change.b.median if change.b else None,
            "B / A": change.ratio,
            "verdict": change.verdict,
        }
        for change in found
    ]


def parser(prog: str) -> Parser:
    made = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("a", type=Path, metavar="A.json", help="the earlier result: ops.json or train_step.json")
    made.add_argument("b", type=Path, metavar="B.json", help="the later one")
    made.add_argument("--over", type=float, default=5.0, metavar="PERCENT", help="smaller changes are none (default 5)")
    made.add_argument("--json", action="store_true", help="print the comparison as one JSON object")
    return made


def main(arguments: Sequence[str], prog: str) -> int:
    options = parser(prog).parse_args(arguments)
    if not 0 <= options.over < math.inf:
        raise BadUse(f"--over must be a percentage of at least 0, got {options.over:g}")
    a, b = (_read(path) for path in (options.a, options.b))
    if a["kind"] != b["kind"]:
        raise BadUse(f"two results of one benchmark are wanted, got {a['kind']} and {b['kind']}")
    in_floors, notes = warnings(a, b)
    found = changes(a, b, options.over / 100, in_floors=in_floors)
    if not any(change.a and change.b for change in found):
        raise BadUse(f"{options.a} and {options.b} have no row in common")
    peers = control(a, b, in_floors=in_floors)
    bad = [change for change in found if change.verdict in (SLOWER, WRONG)]
    if options.json:
        print(json.dumps(_as_json(found, peers, notes, in_floors=in_floors), indent=1))
    else:
        _print(found, peers, notes, options.over, a, b, in_floors=in_floors)
    return FAILED if bad else DONE


def _read(path: Path) -> dict:
    try:
        result = results_file.read(path)
    except ValueError as error:
        raise BadUse(str(error)) from None
    rows = result.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "direction" in row for row in rows):
        raise BadUse(f"{path}: wanted ops.json or train_step.json, got a result of kind {result.get('kind')!r}")
    return result


def _as_json(found: Sequence[Change], peers: float | None, notes: list[str], *, in_floors: bool) -> dict:
    rows = [
        asdict(c.key) | {"a": c.a and asdict(c.a), "b": c.b and asdict(c.b), "ratio": c.ratio, "verdict": c.verdict}
        for c in found
    ]
    return {"unit": "floors" if in_floors else "seconds", "warnings": notes, "peers": peers, "rows": rows}


def _print(
    found: Sequence[Change], peers: float | None, notes: list[str], over: float, a: Mapping, b: Mapping, *, in_floors: bool
) -> None:  # fmt: skip
    print(f"A  {table.header(a['machine'])}\nB  {table.header(b['machine'])}")
    print("".join(f"warning: {note}\n" for note in notes))
    order = (WRONG, SLOWER, FASTER, NOISE, ONLY_A, ONLY_B)
    shown = sorted((c for c in found if c.verdict != SAME), key=lambda c: (order.index(c.verdict), -(c.ratio or 0)))
    if shown:
        print(f"{table.text(lines_of(shown, in_floors=in_floors))}\n")
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in (*order, SAME)}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) + f"; limit {over:g}%")
    if peers is not None:
        print(f"control: the peers took x{peers:.3f} of their time in A (median)")
