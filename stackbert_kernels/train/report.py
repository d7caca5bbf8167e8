"""What happened in a run: report.png and report.html, from metrics.jsonl and config.json alone (run_facts.py lists what is read)."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

from stackbert_kernels.train.figure import draw
from stackbert_kernels.train.run_facts import Facts, duration, magnitude, number, read_facts, title, was_skipped

WITHOUT_PLOT = "The figure needs matplotlib: pip install stackbert-kernels[plot]"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.lead { color: #4b5563; margin-top: 0 }
img { width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb; vertical-align: top }
th { font-weight: 600; color: #4b5563 } td.n, th.n { text-align: right }
"""


def write_report(run_dir: Path) -> None:
    """Writes report.html, and report.png where matplotlib is installed, into the run directory."""
    facts = read_facts(run_dir)
    png, picture = run_dir / "report.png", None
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        png.unlink(missing_ok=True)  # an earlier one would show an earlier state
    else:
        picture = draw(facts)
        png.write_bytes(picture)
    (run_dir / "report.html").write_text(_page(facts, picture, run_dir.name), encoding="utf-8")


def _page(facts: Facts, picture: bytes | None, name: str) -> str:
    if picture is None:
        figure = f"<p>{html.escape(WITHOUT_PLOT)}</p>"
    else:
        figure = f'<img alt="loss, speed and learning rate of the run" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}: {html.escape(title(facts))}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title(facts))}</h1>
<p class="lead">{html.escape(state(facts))}</p>
{figure}
<h2>Result</h2>
{_table(_result(facts))}
<h2>Stages</h2>
{_stage_table(facts)}
<h2>Settings</h2>
{_table(_settings(facts.config))}
<h2>Kernels</h2>
{_kernel_table(facts)}
</body></html>
"""


def state(facts: Facts) -> str:
    total, done = facts.config.get("steps", 0), facts.steps[-1]["step"] if facts.steps else 0
    if facts.end:
        return f"Finished: {total:,} steps in {duration(facts.last('seconds'))}."
    return f"Not finished: step {done:,} of {total:,} after {duration(facts.last('seconds') or 0.0)}."


def _result(facts: Facts) -> list[tuple[str, str]]:
    scored = next((e for e in reversed(facts.evals) if number(e, "eval_loss") is not None), None)
    source = facts.end if number(facts.end, "eval_loss") is not None else scored
    rows = []
    if (loss := number(source, "eval_loss")) is not None:
        perplexity = f", perplexity {math.exp(loss):.4g}" if loss < 50 else ""
        rows.append(("Held-out loss", f"{loss:.4f} nats a masked token{perplexity}"))
    if (accuracy := number(source, "eval_accuracy")) is not None:
        unigram = number(source, "unigram_accuracy")
        beside = "" if unigram is None else f" (the most frequent word alone: {100 * unigram:.2f}%)"
        rows.append(("Held-out accuracy", f"{100 * accuracy:.2f}% of the masked tokens{beside}"))
    if facts.unigram is not None:
        text = f"{facts.unigram:.4f} nats: what knowing only how frequent each word is would give"
        if loss is not None:
            text += (
                f"; the held-out loss is {abs(facts.unigram - loss):.2f} {'below' if loss < facts.unigram else 'above'}"
            )
        rows.append(("Unigram entropy", text))
    for label, key, unit in (("Tokens", "tokens", ""), ("Matrix-product work", "flops", " FLOP")):
        if (value := facts.last(key)) is not None:
            rows.append((label, f"{magnitude(value)}{unit}"))
    if (seconds := facts.last("seconds")) is not None:
        rows.append(("Time", duration(seconds)))
    if skipped := sum(int(e.get("skipped") or was_skipped(e)) for e in facts.steps):
        rows.append(("Steps skipped", f"{skipped} (loss or gradient not finite)"))
    return rows or [("", "nothing was logged yet")]


def _settings(config: dict) -> list[tuple[str, str]]:
    """Every setting but the stages, which have their own table."""
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", _plain(v)) for name, v in value.items()]
        elif key != "stages":
            rows.append((key, _plain(value)))
    return rows


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _stage_table(facts: Facts) -> str:
    head = (
        "stage",
        "steps",
        "layers",
        "learning",
        "predicted step",
        "measured step",
        "ms a step",
        "tokens a second",
        "time",
        "held-out loss",
    )
    whole = sum(s.seconds for s in facts.stages)
    rows = []
    for s in facts.stages:
        learning = "all" if s.train_from == 0 else f"{s.train_from + 1} to {s.depth}"
        rows.append((
            s.name,
            f"{s.last - s.first:,}",
            str(s.depth),
            learning,
            "" if s.predicted_cost is None else f"{s.predicted_cost:.3f}",
            "" if s.measured_cost is None else f"{s.measured_cost:.3f}",
            "" if s.step_seconds is None else f"{1e3 * s.step_seconds:.4g}",
            "" if s.tokens_per_second is None else f"{s.tokens_per_second:,.0f}",
            f"{duration(s.seconds)} ({100 * s.seconds / whole:.0f}%)" if s.seconds > 0 else "",
            "" if s.eval_loss is None else f"{s.eval_loss:.4f}",
        ))  # fmt: skip
    note = "<p>Predicted and measured step: the cost of a step, 1 being one that trains all layers.</p>"
    return _grid(head, rows, numbers_from=1) + note


def _kernel_table(facts: Facts) -> str:
    """An op a row; the stages share a column while they use the same."""
    known = [s for s in facts.stages if s.kernels]
    if not known:
        return "<p>Not logged yet.</p>"
    if all(s.kernels == known[0].kernels for s in known):
        return _grid(("op", "implementation"), sorted(known[0].kernels.items()))
    ops = sorted({op for s in known for op in s.kernels})
    return _grid(("op", *(s.name for s in known)), [(op, *(s.kernels.get(op, "") for s in known)) for op in ops])


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f'<div class="scroll"><table>{body}</table></div>'


def _grid(head: tuple[str, ...], rows: list[tuple[str, ...]], numbers_from: int | None = None) -> str:
    def line(cells, tag):
        marks = (' class="n"' if numbers_from is not None and i >= numbers_from else "" for i in range(len(cells)))
        return (
            "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"
        )

    return f'<div class="scroll"><table>{line(head, "th")}{"".join(line(r, "td") for r in rows)}</table></div>'
