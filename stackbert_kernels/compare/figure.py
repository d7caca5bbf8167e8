"""compare.png: held-out loss over FLOPs and over seconds. matplotlib is imported when it is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle

from stackbert_kernels.compare.table import COUNTED

COLOURS = ("#d1541f", "#2f6db3", "#0e9f8e", "#7c3aed", "#be185d", "#4d7c0f", "#ca8a04", "#7f1d1d", "#38bdf8", "#f472b6", "#1e3a8a", "#84cc16")  # fmt: skip
BASELINE, PLATEAU, TARGET = "#111827", "#b91c1c", "#374151"
LINE = 0.043
"""Height of a line of names, as a share of the panel's."""


def draw(result: dict) -> bytes:
    """Two panels as PNG: a line a method (the mean of its seeds) with its name where it ends, the range of the seeds as a band, a ring at the end of
    each stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(14, 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    target, colours = result["target"]["method"], cycle(COLOURS)
    entries = (*result["methods"], *result["not_ranked"])
    coloured = [(entry, BASELINE if entry["name"] == target else next(colours)) for entry in entries]
    for axis, measure, label in zip(
        panels, ("flops", "seconds"), (f"FLOPs ({COUNTED[result['counting']]})", "seconds of training"), strict=True
    ):
        for entry, colour in coloured:
            finished, own = "final_loss" in entry, entry["name"] == target
            _line(
                axis, entry["curve"], measure, colour, ends=entry.get("stage_ends", ()), dashed=not finished, bold=own
            )
        axis.axhline(result["target"]["loss"], color=TARGET, lw=0.9, ls=(0, (1, 2)), zorder=1)
        axis.axhline(result["unigram"]["loss"], color=PLATEAU, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.margins(x=0.02)
        axis.grid(axis="y", color="#e5e7eb", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"Loss by {'FLOPs' if measure == 'flops' else 'time'}", loc="left", fontsize=11)
    by_flops, by_seconds = panels
    by_flops.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_flops.set_ylabel("held-out loss, nats a masked token")
    by_flops.set_ylim(*_limits(result))
    for axis, x, height, words, colour in (
        # Curves begin high and end low: the left end of the target is free, and the right end of the plateau.
        (by_flops, 0.008, result["target"]["loss"], f"{result['target']['method']} at its end", TARGET),
        (by_seconds, 0.992, result["unigram"]["loss"], "without context", PLATEAU),
    ):
        axis.annotate(words, (x, height), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="left" if x < 0.5 else "right", fontsize=8, color=colour)  # fmt: skip
    _names(by_seconds, coloured)
    rings = ", rings: ends of stages" if any(entry["stage_ends"] for entry in result["methods"]) else ""
    bands = ", bands: range over seeds" if any(len(entry["runs"]) > 1 for entry in result["methods"]) else ""
    figure.suptitle(f"Held-out loss by method{bands}{rings}", fontsize=12, x=0.012, ha="left")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _label(entry: dict) -> str:
    if "final_loss" not in entry:
        return f"{entry['name']}: unfinished"
    runs = len(entry["runs"])
    return f"{entry['name']}: {entry['final_loss']['mean']:.3f}" + (f" ({runs} seeds)" if runs > 1 else "")


def _line(axis, curve: list[dict], measure: str, colour: str, *, ends: Sequence[int], dashed: bool, bold: bool) -> None:
    x = [point[measure] for point in curve]
    y = [point["loss"] for point in curve]
    axis.plot(x, y, color=colour, lw=2.6 if bold else 1.6, ls=(0, (2, 2)) if dashed else "-", zorder=3)
    if any(point["high"] > point["low"] for point in curve):
        axis.fill_between(
            x, [p["low"] for p in curve], [p["high"] for p in curve], color=colour, alpha=0.16, lw=0, zorder=2
        )
    axis.plot([x[i] for i in ends], [y[i] for i in ends], "o", color=colour, mfc="white", mew=1.4, ms=5.5, zorder=4)


def _names(axis, coloured: Sequence[tuple[dict, str]]) -> None:
    """Right of the panel over seconds, in the order of the losses, each tied to the end of its line."""
    low, high = axis.get_ylim()
    ordered = sorted(coloured, key=lambda pair: pair[0]["curve"][-1]["loss"])
    heights = spread([(entry["curve"][-1]["loss"] - low) / (high - low) for entry, _ in ordered], LINE)
    for (entry, colour), height in zip(ordered, heights, strict=True):
        end = entry["curve"][-1]
        axis.annotate(
            _label(entry),
            (end["seconds"], end["loss"]),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.6,
                "alpha": 0.6,
                "shrinkA": 2,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising `heights` moved apart until no two are nearer than `gap`: each group that would overlap stays centred where it was."""
    groups: list[tuple[float, int]] = []  # of each, its centre and how many are in it
    for height in heights:
        centre, count = height, 1
        while groups and centre - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            before, many = groups.pop()
            centre, count = (before * many + centre * count) / (many + count), many + count
        groups.append((centre, count))
    return [centre + gap * (i - (count - 1) / 2) for centre, count in groups for i in range(count)]


def _limits(result: dict) -> tuple[float, float]:
    """From the lowest loss to a little above the plateau: the fall from the loss of random weights would press all else together."""
    curves = [entry["curve"] for entry in (*result["methods"], *result["not_ranked"])]
    plateau = result["unigram"]["loss"]
    low = min(plateau, *(point["low"] for curve in curves for point in curve))
    top = max(point["high"] for curve in curves for point in curve)
    high = max(plateau, min(top, 0.5 + max(plateau, *(curve[-1]["high"] for curve in curves))))
    edge = 0.05 * (high - low) + 0.01
    return low - edge, high + edge
