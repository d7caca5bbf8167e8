"""A picture of each op's results: bars of ours and every peer, and the floor that the ceiling of the same rounds sets."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .table import case_name, floor, header, is_ours

COLOURS = {
    "native": "#1d4ed8",
    "triton": "#0e9f8e",
    "reference": "#7c3aed",
    "torch": "#9aa3af",
    "torch.compile": "#c3b07a",
    "SDPA math": "#d6c4a1",
    "SDPA flash": "#d9a58c",
    "SDPA efficient": "#c9a7c7",
    "SDPA cuDNN": "#a9bf8f",
    "FlexAttention": "#b8a99a",
    "Liger": "#d3a4ae",
    "flash-attn 2": "#cf9a66",
    "FA4": "#b98b73",
    "apex": "#8fb0b5",
}
OTHERS = ("#b3b8c2", "#c8b6a6", "#b7c3a5", "#bfaecb", "#a8bccb", "#cbb39b")  # of peers that are not named above
FLOOR, INK, FAINT = "#b91c1c", "#1f2937", "#6b7280"

CEILINGS = (("copy", "bytes", "copy"), ("matmul", "FLOPs", "matrix product"))
LOG_FROM = 25.0  # slowest over fastest: beyond it a linear axis would leave no bar of the fastest to see
# Inches: names of contenders, bars, a bar, the head of a direction, title and axis of a panel; title and notes of the figure.
NAMES, BARS, BAR, HEAD, PANEL, TITLE, NOTES = 1.45, 3.3, 0.2, 0.3, 0.86, 0.62, 0.42


def write(result: Mapping, out: Path, *, only_new: bool = False) -> list[Path]:
    """OP.png in `out` for each op of an ops.json result; without matplotlib none, and a line on stderr that says what to install.

    only_new: those that are there and of these rows are left alone.
    """
    pictures = {path: op for path, op in _pictures(result, out).items() if not (only_new and _is_of(path, result, op))}
    if not pictures:
        return []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print('no plots without matplotlib: pip install "stackbert-kernels[plot]"', file=sys.stderr)
        return []
    for path, op in pictures.items():
        draw(op, _rows(result, op), result["machine"], path)
    return list(pictures)


def outdated(result: Mapping, out: Path) -> list[Path]:
    """The pictures in `out` that are of other rows than these."""
    return [path for path, op in _pictures(result, out).items() if path.exists() and not _is_of(path, result, op)]


def _pictures(result: Mapping, out: Path) -> dict[Path, str]:
    return {Path(out) / f"{op}.png": op for op in dict.fromkeys(row["op"] for row in result["rows"])}


def _rows(result: Mapping, op: str) -> list[Mapping]:
    return [row for row in result["rows"] if row["op"] == op]


def _is_of(path: Path, result: Mapping, op: str) -> bool:
    return path.exists() and _mark(_rows(result, op), result["machine"]).encode() in path.read_bytes()


def _mark(rows: Sequence[Mapping], machine: Mapping) -> str:
    """Of what a picture shows; it is written into the file."""
    content = json.dumps([rows, machine], sort_keys=True)
    return f"rows-{hashlib.sha1(content.encode()).hexdigest()}"


def colour(name: str) -> str:
    """The same in every figure."""
    name = name.removeprefix("ours ")
    return COLOURS.get(name) or OTHERS[sum(name.encode()) % len(OTHERS)]


def draw(op: str, rows: Sequence[Mapping], machine: Mapping, path: Path) -> None:
    """A panel a case, a group of bars a direction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Mapping]] = {}
    for row in rows:
        panels.setdefault(case_name(row), []).append(row)
    heights = [PANEL + sum(HEAD + BAR * len(contenders(row)) for row in of_case) for of_case in panels.values()]
    columns = min(max(1, round(math.sqrt(sum(heights) / (NAMES + BARS) / 1.3))), 4, len(panels))
    lines = [heights[i : i + columns] for i in range(0, len(panels), columns)]
    width = max(columns * (NAMES + BARS) + 0.2, 9.0)
    height = TITLE + sum(max(line) for line in lines) + NOTES

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    figure.text(0.15 / width, 1 - 0.28 / height, op, fontsize=13, weight="bold", color=INK, va="center")
    figure.text(0.15 / width, 1 - 0.52 / height, header(machine), fontsize=8.5, color=FAINT, va="center")
    top = height - TITLE
    for i, (name, of_case) in enumerate(panels.items()):
        column = i % columns
        if i and not column:
            top -= max(lines[i // columns - 1])
        inner = heights[i] - PANEL
        share = (width - 0.2) / columns
        left = column * share + NAMES
        axis = figure.add_axes(
            (left / width, (top - 0.38 - inner) / height, (share - NAMES) / width, inner / height), label=name
        )
        axis.set_title(name, loc="left", fontsize=9.5, weight="bold", color=INK, x=(0.15 - NAMES) / (share - NAMES))
        _panel(axis, of_case, inner)
    for i, line in enumerate(_notes(rows)):
        figure.text(0.15 / width, (0.3 - 0.17 * i) / height, line, fontsize=7.5, color=FAINT, va="center")
    _save(figure, path, _mark(rows, machine))


def _save(figure, path: Path, mark: str) -> None:
    """With a palette: a quarter of the bytes, for files that are committed."""
    import numpy as np
    from PIL import Image, PngImagePlugin

    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    information = PngImagePlugin.PngInfo()
    information.add_text("Comment", mark)
    picture = picture.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(path, format="png", optimize=True, pnginfo=information)


def contenders(row: Mapping) -> list[str]:
    """Ours first, then the peers, the fastest first."""
    names = [name for name in row["seconds"] if name not in row["ceilings"]]
    wrong = [name for name in row["wrong"] if is_ours(name)]
    peers = sorted((n for n in names if not is_ours(n)), key=lambda n: row["seconds"][n]["median"])
    return [n for n in names if is_ours(n)] + wrong + peers


def _panel(axis, rows: Sequence[Mapping], inches: float) -> None:
    stats = [row["seconds"][name] for row in rows for name in contenders(row) if name in row["seconds"]]
    times, ends = [time["median"] for time in stats], [_end(time) for time in stats]
    floors = [floor(row) for row in rows]
    scale, unit = (1e6, "us") if max(times, default=0.0) < 0.01 else (1e3, "ms")
    smallest, largest = min([*times, *(f for f in floors if f)], default=1.0), max(ends, default=1.0)
    logarithmic = max(times, default=1.0) / min(times, default=1.0) > LOG_FROM

    y = 0.0  # inches from the top
    ticks = []
    for row, least in zip(rows, floors, strict=True):
        y += HEAD
        axis.text(0.0, y - 0.06, row["direction"], transform=axis.get_yaxis_transform(), fontsize=8, color=FAINT)
        names = contenders(row)
        for i, name in enumerate(names):
            _bar(axis, row, name, y + BAR * (i + 0.5), scale, unit)
            ticks.append((y + BAR * (i + 0.5), name))
        if least:
            ends = (y - 0.03, y + BAR * len(names) + 0.03)
            axis.plot((scale * least,) * 2, ends, color=FLOOR, lw=1.3, ls=(0, (3, 1.5)), zorder=4)
        y += BAR * len(names)
    axis.set_ylim(inches, 0)
    if logarithmic:
        axis.set_xscale("log")
        axis.set_xlim(scale * smallest / 2, scale * smallest / 2 * (2 * largest / smallest) ** 1.6)
    else:
        axis.set_xlim(0, 1.42 * scale * largest)  # room for what stands behind the longest bar
    axis.set_xlabel(unit + (", logarithmic" if logarithmic else ""), fontsize=8, color=FAINT, labelpad=1)
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    for label, (_, name) in zip(axis.get_yticklabels(), ticks, strict=True):
        ours = is_ours(name)
        label.set(fontsize=8, weight="bold" if ours else "normal", color=colour(name) if ours else INK)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7.5, colors=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c7ccd4")
    axis.grid(axis="x", color="#e5e7eb", lw=0.6)
    axis.set_axisbelow(True)


def _end(time: Mapping) -> float:
    """Where the drawing of a time ends: at its p80, which on a busy machine may be anywhere."""
    return max(time["median"], min(time["p80"], 1.3 * time["median"]))


def _bar(axis, row: Mapping, name: str, y: float, scale: float, unit: str) -> None:
    """A bar with its spread, the time, and how it compares: ours with the ceiling, a peer with ours."""
    if name not in row["seconds"]:
        axis.text(0.01, y, "wrong: no time", transform=axis.get_yaxis_transform(), fontsize=8, color=FLOOR, va="center")
        return
    ours = is_ours(name)
    time = row["seconds"][name]
    middle, low, end = scale * time["median"], scale * time["p20"], scale * _end(time)
    axis.barh(y, middle, height=0.78 * BAR, color=colour(name), zorder=2)
    axis.plot((low, end), (y, y), color=INK, lw=0.9, alpha=0.7, zorder=3)
    text = f"{middle:.0f} {unit}" if middle >= 100 else f"{middle:.3g} {unit}"
    if name == row["ours"] and row.get("share") is not None:
        text += f"   {row['share']:.0%} of ceiling"
    elif (compared := row.get("ratios", {}).get(name)) is not None:
        text += f"   x {compared['median']:.2f}"
    axis.annotate(
        text, (end, y), (4, 0), textcoords="offset points", fontsize=8, va="center",
        weight="bold" if ours else "normal", color=colour(name) if ours else INK, zorder=5,
    )  # fmt: skip


def _notes(rows: Sequence[Mapping]) -> list[str]:
    found = {name for row in rows for name in row.get("ceilings", {})}
    bounds = [(what, rate) for name, what, rate in CEILINGS if name in found]
    lines = ["Medians, thin lines p20 to p80 (at most 1.3 medians). x: a peer's time over ours."]
    if bounds:
        what, rates = (" or ".join(parts) for parts in zip(*bounds, strict=True))
        lines[0] += f" Red: the declared {what} at the rate of a large {rates} in the same rounds."
    absent = list(dict.fromkeys(name for row in rows for name in row["absent"]))
    if absent:
        lines.append(f"Absent: {', '.join(absent)}.")
    return lines
