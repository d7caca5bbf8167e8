"""The figure of a run, report.png. matplotlib is imported when it is drawn."""

from __future__ import annotations

import io
from itertools import accumulate
from statistics import median

from stackbert_kernels.train.run_facts import Facts, at, number, summary, title, was_skipped

TRAINED, HELD_OUT, PLATEAU, SKIPPED, BANDS = "#2f6db3", "#d1541f", "#6b7280", "#b91c1c", ("#eef3fa", "#fbf5ea")


def draw(facts: Facts) -> bytes:
    """The figure as PNG: loss by tokens and by seconds, tokens a second and learning rate by step, over bands of stages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    figure = Figure(figsize=(13, 8.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, gridspec_kw={"height_ratios": (3, 2)})
    (by_tokens, by_seconds), (speed, rate) = axes
    figure.suptitle(f"{title(facts)}. {summary(facts)}", fontsize=13, x=0.012, ha="left")

    for axis, key, label in ((by_tokens, "tokens", "tokens"), (by_seconds, "seconds", "time")):
        _bands(axis, facts, key)
        _losses(axis, facts, key)
        axis.set_title(f"Loss by {label}", loc="left", fontsize=11)
        axis.set_ylabel("nats a masked token")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_tokens.set_xlabel("tokens")
    _time_axis(by_seconds, facts.last("seconds") or 0.0, FuncFormatter)
    if by_tokens.get_legend_handles_labels()[0]:
        by_tokens.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)

    _bands(speed, facts, "step")
    _series(speed, facts, "tokens_per_second", alpha=0.35)
    for stage in facts.stages:
        if stage.tokens_per_second:
            end = min(stage.last, facts.steps[-1]["step"])
            speed.plot((stage.first, end), (stage.tokens_per_second,) * 2, color=TRAINED, lw=2.2, solid_capstyle="butt")
            speed.annotate(
                EngFormatter(places=1, sep="")(stage.tokens_per_second),
                ((stage.first + end) / 2, stage.tokens_per_second),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    speeds = [v for e in facts.steps if (v := number(e, "tokens_per_second"))]
    speed.set_ylim(0, 1.15 * max(speeds, default=1.0))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed.set_title("Tokens a second, median of each stage", loc="left", fontsize=11)
    _bands(rate, facts, "step", labels=False)
    _series(rate, facts, "lr")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    rate.set_title("Learning rate", loc="left", fontsize=11)
    _teacher(rate, facts)
    for axis in (speed, rate):
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#d9dde3", lw=0.6)
        axis.set_axisbelow(True)
        axis.margins(x=0)
    if not facts.steps:
        figure.text(0.5, 0.5, "no step yet", ha="center", fontsize=16, color=PLATEAU)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _bands(axis, facts: Facts, key: str, labels: bool = True) -> None:
    """A shade and a label for each stage that has begun, where there are several; `key` is what the axis counts."""
    last_step = facts.steps[-1]["step"] if facts.steps else 0
    begun = [s for s in facts.stages if s.first < last_step]
    borders = [
        tuple(float(x) if key == "step" else at(facts, key, x) for x in (s.first, min(s.last, last_step)))
        for s in begun
    ]
    whole = borders[-1][1] if borders else 0.0
    if whole <= 0:
        return
    axis.set_xlim(0, whole)
    if len(facts.stages) == 1:
        return
    for stage, (left, right) in zip(begun, borders, strict=True):
        axis.axvspan(left, right, color=BANDS[stage.index % 2], lw=0, zorder=0)
        if not labels:
            continue
        frozen = f"{stage.train_from} frozen" if stage.train_from else "all learn"
        share = (right - left) / whole
        text = f"{stage.depth} layers\n{frozen}" if share > 0.13 else f"{stage.depth} layers, {frozen}"
        axis.text(
            (left + right) / 2,
            0.03,
            text,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            rotation=0 if share > 0.13 else 90,
            fontsize=8,
            color="#4b5563",
        )


def _losses(axis, facts: Facts, key: str) -> None:
    points = [(x, y) for e in facts.steps if (x := number(e, key)) is not None and (y := number(e, "loss")) is not None]
    held_out = [(x, y) for e in facts.evals if (x := number(e, key)) is not None and (y := number(e, "eval_loss"))]
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, y, color=TRAINED, lw=0.7, alpha=0.25)
        axis.plot(x, smooth(y), color=TRAINED, lw=1.8, label="training (smoothed)")
    if held_out:
        axis.plot(
            *zip(*held_out, strict=True), "o-", color=HELD_OUT, lw=1.2, ms=4, label="held-out", clip_on=False, zorder=3
        )
    if facts.unigram is not None:
        axis.axhline(facts.unigram, color=PLATEAU, lw=1.2, ls=(0, (5, 3)), label=f"unigram plateau {facts.unigram:.2f}")
    lost = [x for e in facts.steps if was_skipped(e) and (x := number(e, key)) is not None]
    if lost:
        axis.plot(
            lost,
            [0.985] * len(lost),
            "v",
            color=SKIPPED,
            ms=5,
            transform=axis.get_xaxis_transform(),
            label="step skipped",
        )
    values = [y for _, y in held_out] + list(smooth([y for _, y in points]))
    if values:
        # A diverging run must not press everything else into one line.
        top = min(max(values), 2 * median(values))
        low = min([*values, *([facts.unigram] if facts.unigram is not None else [])])
        # Room at the bottom for the labels of the stages.
        axis.set_ylim(low - 0.16 * (top - low) - 0.02, top + 0.05 * (top - low) + 0.02)


def _series(axis, facts: Facts, key: str, alpha: float = 1.0) -> None:
    points = [(e["step"], y) for e in facts.steps if (y := number(e, key)) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=TRAINED, lw=1.4, alpha=alpha)


def _teacher(axis, facts: Facts) -> None:
    """How near the aligned layer is to the teacher, where there is one, on a scale of its own to the right."""
    points = [(e["step"], -y) for e in facts.steps if (y := number(e, "alignment")) is not None]
    if not points:
        return
    right = axis.twinx()
    right.plot(*zip(*points, strict=True), color=HELD_OUT, lw=1.2)
    right.set_ylim(min(0.0, *(y for _, y in points)), 1.05)
    right.spines[["top", "left"]].set_visible(False)
    right.tick_params(axis="y", colors=HELD_OUT)
    right.set_title("cosine to the teacher", loc="right", fontsize=11, color=HELD_OUT)


def _time_axis(axis, seconds: float, formatter) -> None:
    unit, name = (1, "seconds") if seconds < 180 else (60, "minutes") if seconds < 3 * 3600 else (3600, "hours")
    axis.xaxis.set_major_formatter(formatter(lambda x, _: f"{x / unit:g}"))
    if unit > 1:
        from matplotlib.ticker import MaxNLocator, MultipleLocator

        ticks = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, seconds / unit)
        axis.xaxis.set_major_locator(MultipleLocator((ticks[1] - ticks[0]) * unit))
    axis.set_xlabel(name)


def smooth(values: list[float] | tuple[float, ...]) -> list[float]:
    """The mean of a window around each point, about a thirtieth of them; it shrinks towards both ends, so that nothing lags."""
    half = 1 + len(values) // 60
    sums = [0.0, *accumulate(values)]
    widths = (min(half, i, len(values) - 1 - i) for i in range(len(values)))
    return [(sums[i + w + 1] - sums[i - w]) / (2 * w + 1) for i, w in enumerate(widths)]
