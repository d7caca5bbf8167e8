"""The report of a run, from files as a run leaves them: whole, cut off, resumed, empty, with losses that are not numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from stackbert_kernels.config import ModelConfig, Stage, TrainConfig
from stackbert_kernels.train.figure import smooth
from stackbert_kernels.train.report import WITHOUT_PLOT, write_report
from stackbert_kernels.train.run_facts import duration, magnitude, read_facts

STAGES = (
    Stage(steps=40, depth=2, name="one"),
    Stage(steps=40, depth=4, train_from=2, grow="copy_top", embeddings="freeze", name="two <b>"),
    Stage(steps=20, depth=4, name="joint"),
)
STEP_SECONDS = (0.1, 0.15, 0.2)
TOKENS = 500
KERNELS = {"masked_lm_loss": "native", "layer_norm": "reference"}


def step_event(step: int, **changes) -> dict:
    stage = 0 if step <= 40 else 1 if step <= 80 else 2
    seconds = sum(STEP_SECONDS[0 if s < 40 else 1 if s < 80 else 2] for s in range(step))
    known = STAGES[stage]
    return {
        "event": "step", "step": step, "stage": stage, "depth": known.depth, "train_from": known.train_from, "tokens": step * TOKENS,
        "flops": step * 10**9, "seconds": seconds, "loss": 9 - 0.05 * step, "lr": 1e-3 * (1 - step / 100), "grad_norm": 1.0,
        "tokens_per_second": TOKENS / STEP_SECONDS[stage], "skipped": 0, **changes,
    }  # fmt: skip


def eval_event(step: int, loss: float | None = None) -> dict:
    at = step_event(step)
    return {
        "event": "eval", "step": step, "tokens": at["tokens"], "seconds": at["seconds"], "eval_loss": loss or 8.9 - 0.05 * step,
        "eval_accuracy": step / 1000, "unigram_loss": 6.25,
    }  # fmt: skip


def events(last: int = 100) -> list[dict]:
    lines, first = [], 0
    for index, stage in enumerate(STAGES):
        if first <= last:
            lines.append(
                {
                    "event": "stage",
                    "step": first,
                    "stage": index,
                    "predicted_cost": (0.5, 0.7, 1.0)[index],
                    "kernels": KERNELS,
                }
            )
        for step in range(first + 5, min(first + stage.steps, last) + 1, 5):
            lines.append(step_event(step))
            if step % 20 == 0:
                lines += [eval_event(step), {"event": "checkpoint", "step": step}]
        first += stage.steps
    return lines


def end_event() -> dict:
    return step_event(100) | {
        "event": "end", "eval_loss": 3.9, "eval_accuracy": 0.1, "unigram_accuracy": 0.05, "stage_seconds": {"0": 0.11, "1": 0.16, "2": 0.22},
    }  # fmt: skip


def run_directory(path: Path, lines: list[dict], tail: bytes = b"") -> Path:
    config = TrainConfig(model=ModelConfig(layers=4, hidden=64, heads=2), steps=100, stages=STAGES, recipe="mslt")
    (path / "config.json").write_text(json.dumps(asdict(config)))
    (path / "metrics.jsonl").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    return path


def test_a_finished_run(tmp_path):
    pytest.importorskip("matplotlib")
    write_report(run_directory(tmp_path, [*events(), end_event()]))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    for wanted in (
        "data:image/png;base64,",
        "mslt: 4 layers, hidden 64, mlm",
        "Finished: 100 steps in 14.0 s.",
        "3.9000 nats a masked token, perplexity 49.4",
        "10.00% of the masked tokens (the most frequent word alone: 5.00%)",
        "6.2500 nats",
        "the held-out loss is 2.35 below",
        "two &lt;b&gt;",
        "masked_lm_loss",
        "50 k",
        "100 G FLOP",
        "optim.lr",
    ):
        assert wanted in page, wanted
    assert 'src="http' not in page and "href" not in page  # self-contained


def test_stages_have_predicted_and_measured_cost(tmp_path):
    facts = read_facts(run_directory(tmp_path, [*events(), end_event()]))
    assert [s.predicted_cost for s in facts.stages] == [0.5, 0.7, 1.0]
    assert [s.measured_cost for s in facts.stages] == pytest.approx([0.5, 0.16 / 0.22, 1.0])
    assert [s.tokens_per_second for s in facts.stages] == pytest.approx([TOKENS / t for t in STEP_SECONDS])
    assert [s.seconds for s in facts.stages] == pytest.approx([4.0, 6.0, 4.0])
    assert [s.eval_loss for s in facts.stages] == pytest.approx([6.9, 4.9, 3.9])


def test_an_unfinished_run_measures_its_steps_itself(tmp_path):
    facts = read_facts(run_directory(tmp_path, events(60)))
    assert [s.step_seconds for s in facts.stages] == [pytest.approx(0.1), pytest.approx(0.15), None]
    assert [s.measured_cost for s in facts.stages] == [None, None, None]  # no full step was taken yet
    write_report(tmp_path)
    assert "Not finished: step 60 of 100" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("tail", [b'{"event": "step", "st', b"\xff\xfe", b"null\n[1]\n{}\n"])
def test_a_last_line_that_is_cut_off_is_left_out(tail, tmp_path):
    facts = read_facts(run_directory(tmp_path, events(60), tail))
    assert facts.steps[-1]["step"] == 60


def test_a_resumed_run_counts_what_was_repeated_once(tmp_path):
    again = [step_event(step, loss=1.0) for step in (45, 50, 55)] + [eval_event(60, loss=2.0)]
    facts = read_facts(run_directory(tmp_path, [*events(70), *again]))
    assert [e["step"] for e in facts.steps] == [*range(5, 60, 5)]
    assert [e["loss"] for e in facts.steps[-4:]] == [7.0, 1.0, 1.0, 1.0]
    assert [(e["step"], e["eval_loss"]) for e in facts.evals] == [(20, 7.9), (40, 6.9), (60, 2.0)]
    assert facts.stages[1].kernels == KERNELS


@pytest.mark.parametrize("lines", [[], [events()[0]], [step_event(5, tokens=None, seconds=None, loss=None, lr=None)]])
def test_almost_nothing_logged(lines, tmp_path):
    write_report(run_directory(tmp_path, lines))
    assert "Not finished" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), None])
def test_losses_that_are_not_numbers(missing, tmp_path):
    lines = [*events(), end_event()]
    for line in lines:
        if line["event"] == "step" and line["step"] in (30, 35):
            line |= {"loss": missing, "grad_norm": missing, "skipped": 3}
    lines[-1]["eval_loss"] = missing
    write_report(run_directory(tmp_path, lines))
    page = (tmp_path / "report.html").read_text()
    assert "6 (loss or gradient not finite)" in page
    assert "3.9000 nats" in page  # the last evaluation that gave a number


def test_without_matplotlib_the_page_says_how_to_get_the_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "report.png").write_bytes(b"of an earlier state")
    write_report(run_directory(tmp_path, [*events(), end_event()]))
    page = (tmp_path / "report.html").read_text()
    assert WITHOUT_PLOT in page and "<img" not in page and "Finished" in page
    assert not (tmp_path / "report.png").exists()


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold config\.json and metrics\.jsonl"):
        write_report(tmp_path)


def test_smoothing_keeps_a_straight_line():
    line = [2.0 * i for i in range(300)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([]) == [] and smooth([3.0]) == [3.0]


def test_numbers_for_people():
    assert [duration(s) for s in (1.49, 125, 11245)] == ["1.5 s", "2 min 05 s", "3 h 07 min"]
    assert [magnitude(v) for v in (12, 1234, 3.2e12)] == ["12", "1.23 k", "3.2 T"]
