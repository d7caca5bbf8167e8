"""compare.png: held-out loss over FLOPs and over seconds. matplotlib is imported when it is drawn."""

from __future__ import annotations

import io

from stackbert_kernels.compare.table import COUNTED

COLOURS = ("#d1541f", "#2f6db3", "#0e9f8e", "#7c3aed", "#b45309", "#be185d", "#4d7c0f", "#0369a1")
BASELINE, PLATEAU, TARGET = "#6b7280", "#b91c1c", "#374151"


def draw(result: dict) -> bytes:
    """Two panels as PNG: a line a method (the mean of its seeds), the range of the seeds as a band, a ring at the end of each stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, measure, label in zip(
        panels, ("flops", "seconds"), (f"FLOPs ({COUNTED[result['counting']]})", "seconds of training"), strict=True
    ):
        colours = iter(COLOURS * 4)
        for entry in result["methods"]:
            own = entry["name"] == result["target"]["method"]
            _line(
                axis,
                entry["curve"],
                measure,
                BASELINE if own else next(colours),
                label=_label(entry),
                ends=entry["stage_ends"],
            )
        for entry in result["not_ranked"]:
            _line(axis, entry["curve"], measure, next(colours), label=f"{entry['name']}: unfinished", dashed=True)
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
    by_flops.legend(frameon=False, fontsize=9, loc="upper right")
    rings = ", rings: ends of stages" if any(entry["stage_ends"] for entry in result["methods"]) else ""
    bands = ", bands: range over seeds" if any(len(entry["runs"]) > 1 for entry in result["methods"]) else ""
    figure.suptitle(f"Held-out loss by method{bands}{rings}", fontsize=12, x=0.012, ha="left")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _label(entry: dict) -> str:
    runs = len(entry["runs"])
    return f"{entry['name']}: {entry['final_loss']['mean']:.3f}" + (f" ({runs} seeds)" if runs > 1 else "")


def _line(axis, curve: list[dict], measure: str, colour: str, *, label: str, ends=(), dashed: bool = False) -> None:
    x = [point[measure] for point in curve]
    y = [point["loss"] for point in curve]
    axis.plot(x, y, color=colour, lw=1.7, ls=(0, (2, 2)) if dashed else "-", label=label, zorder=3)
    if any(point["high"] > point["low"] for point in curve):
        axis.fill_between(
            x, [p["low"] for p in curve], [p["high"] for p in curve], color=colour, alpha=0.16, lw=0, zorder=2
        )
    axis.plot([x[i] for i in ends], [y[i] for i in ends], "o", color=colour, mfc="white", mew=1.4, ms=5.5, zorder=4)


def _limits(result: dict) -> tuple[float, float]:
    """From the lowest loss to a little above the plateau: the fall from the loss of random weights would press all else together."""
    curves = [entry["curve"] for entry in (*result["methods"], *result["not_ranked"])]
    plateau = result["unigram"]["loss"]
    low = min(plateau, *(point["low"] for curve in curves for point in curve))
    top = max(point["high"] for curve in curves for point in curve)
    high = max(plateau, min(top, 0.5 + max(plateau, *(curve[-1]["high"] for curve in curves))))
    edge = 0.05 * (high - low) + 0.01
    return low - edge, high + edge
