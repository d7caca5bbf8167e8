"""What `patch` did: a row for each module and part, as a table that a person can read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stackbert_kernels.patch.swap import Replacement, Skipped


@dataclass(frozen=True)
class Row:
    module: str  # its name in the model; "" = the model itself
    part: str
    runs: str  # the op and its implementation; "as before" where nothing was replaced
    why_not: str  # why it was not replaced, or when it runs as before all the same

    @property
    def patched(self) -> bool:
        return self.runs != AS_BEFORE


AS_BEFORE = "as before"


@dataclass(frozen=True)
class PatchReport:
    """`str(report)` is the table, equal layers on one line. The implementations are those for the model's device and dtype at that time."""

    model: str
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, model: str, entries: list[Replacement | Skipped]) -> PatchReport:
        rows = []
        for entry in entries:
            if isinstance(entry, Skipped):
                rows.append(Row(entry.name, entry.part, AS_BEFORE, entry.reason))
            else:
                rows += [Row(entry.name, part, runs, entry.note) for part, runs in entry.runs.items()]
        return cls(model, tuple(rows))

    @property
    def patched(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.patched)

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.patched)

    def __str__(self) -> str:
        lines = [("module", "part", "runs", "as before where")]
        lines += [(name or "(the model)", row.part, row.runs, row.why_not or "-") for name, row in _folded(self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        modules = len({row.module for row in self.patched})
        head = f"{self.model}: {modules} modules patched, by sbk.unpatch(model) undone"
        return "\n".join([head, *("  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in lines)])  # fmt: skip


def _folded(rows: tuple[Row, ...]) -> list[tuple[str, Row]]:
    """Rows that differ only in the numbers of their names are one: encoder.layer.{0-11}.output."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", row.module)
        groups.setdefault((pattern, row.part, row.runs, row.why_not), []).append(row)
    folded = []
    for (pattern, *_), same in groups.items():
        numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", row.module) for row in same]
        names = pattern
        for column in zip(*numbers, strict=True):
            names = names.replace("{}", _span(sorted({int(n) for n in column})), 1)
        folded.append((names, same[0]))
    return folded


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return "{" + f"{numbers[0]}-{numbers[-1]}" + "}"
    return "{" + ",".join(map(str, numbers)) + "}"
