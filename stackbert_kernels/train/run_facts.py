"""What the files of a run directory say about the run: metrics.jsonl and config.json, nothing else.

Events that are read (one JSON object a line; a key that is absent or null is left out of the report):

    step        step (how many are done) stage depth train_from tokens flops seconds loss lr grad_norm tokens_per_second skipped (how many)
                alignment (with a teacher: minus the mean cosine)
    eval        step tokens seconds eval_loss eval_accuracy unigram_loss unigram_accuracy
                word_drift (embeddings output_grad; not shown)
    stage       stage (index) name steps depth train_from predicted_cost (of a step, 1 = a full one) kernels {op: implementation}
    growth, checkpoint                                                                         not shown
    end         seconds tokens flops eval_loss eval_accuracy unigram_accuracy stage_seconds (median step seconds by stage)

A last line that was cut off is left out. Where a resumed run repeats steps, the repetition counts.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median


@dataclass
class StageFacts:
    """A stage of the plan, with what the events say about it."""

    index: int
    name: str
    first: int
    last: int  # exclusive
    depth: int
    train_from: int
    predicted_cost: float | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    step_seconds: float | None = None
    measured_cost: float | None = None  # step_seconds over that of a full step
    tokens_per_second: float | None = None
    seconds: float = 0.0
    eval_loss: float | None = None  # the last one in this stage


@dataclass
class Facts:
    """A run: its configuration, the events that count, and its stages."""

    config: dict
    steps: list[dict]
    evals: list[dict]
    stages: list[StageFacts]
    end: dict | None

    @property
    def unigram(self) -> float | None:
        return next((e["unigram_loss"] for e in reversed(self.evals) if number(e, "unigram_loss") is not None), None)

    def last(self, key: str) -> float | None:
        """The newest value of what only grows: seconds, tokens, flops."""
        values = (number(e, key) for e in ([self.end] if self.end else []) + self.steps[::-1])
        return next((v for v in values if v is not None), None)


def read_facts(run_dir: Path) -> Facts:
    """A ValueError says which file is missing or unreadable."""
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"report: {run_dir} must hold config.json and metrics.jsonl, got: {error}") from error
    events = _without_repetition([event for line in lines if (event := _event(line))])
    of_kind = {kind: [e for e in events if e["event"] == kind] for kind in ("step", "eval", "stage", "end")}
    stages = _stages(config, of_kind["stage"])
    facts = Facts(config, of_kind["step"], of_kind["eval"], stages, of_kind["end"][-1] if of_kind["end"] else None)
    _measure(facts)
    return facts


def _event(line: bytes) -> dict | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return None if event["event"] in ("step", "eval") and number(event, "step") is None else event


def _without_repetition(events: list[dict]) -> list[dict]:
    """Going back to an earlier step means that the run was resumed: what it had written past that point happens again."""
    kept: list[dict] = []
    newest: dict[str, float] = {}
    for event in events:
        kind, step = event["event"], number(event, "step")
        if kind in ("step", "eval"):
            if step <= newest.get(kind, -1) or step < max(newest.values(), default=-1):
                kept = [e for e in kept if not _is_repeated(e, kind, step)]
                newest = dict.fromkeys(newest, step)
            newest[kind] = step
        kept.append(event)
    return kept


def _is_repeated(earlier: dict, kind: str, step: float) -> bool:
    if earlier["event"] not in ("step", "eval"):
        return earlier["event"] == "end"
    then = earlier["step"]
    return then > step or (then == step and earlier["event"] == kind)


def number(event: dict | None, key: str) -> float | None:
    value = (event or {}).get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _stages(config: dict, events: list[dict]) -> list[StageFacts]:
    stages, first = [], 0
    for index, stage in enumerate(config.get("stages", ())):
        facts = StageFacts(
            index,
            stage.get("name") or f"stage {index + 1}",
            first,
            first + stage["steps"],
            stage["depth"],
            stage["train_from"],
        )
        for event in events:
            if event.get("stage") == index:
                facts.predicted_cost = number(event, "predicted_cost")
                facts.kernels = event.get("kernels") or {}
        stages.append(facts)
        first = facts.last
    return stages


def _measure(facts: Facts) -> None:
    """Step times from the end event, or from neighbouring step events while there is none."""
    ended = (facts.end or {}).get("stage_seconds") or {}
    ended = dict(enumerate(ended)) if isinstance(ended, list) else {int(k): v for k, v in ended.items()}
    for stage in facts.stages:
        inside = [e for e in facts.steps if stage.first < e["step"] <= stage.last]
        clock = [(e["step"], e["seconds"]) for e in inside if number(e, "seconds") is not None]
        rates = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in pairwise(clock) if s1 > s0 and t1 > t0]
        stage.step_seconds = number(ended, stage.index) or (median(rates) if rates else None)
        speeds = [v for e in inside if (v := number(e, "tokens_per_second"))]
        stage.tokens_per_second = median(speeds) if speeds else None
        stage.seconds = at(facts, "seconds", stage.last) - at(facts, "seconds", stage.first)
        scores = [v for e in facts.evals if stage.first < e["step"] <= stage.last and (v := number(e, "eval_loss"))]
        stage.eval_loss = scores[-1] if scores else None
    full = next((s for s in facts.stages[::-1] if s.train_from == 0 and s.depth == facts.stages[-1].depth), None)
    for stage in facts.stages:
        if full and full.step_seconds and stage.step_seconds:
            stage.measured_cost = stage.step_seconds / full.step_seconds


def at(facts: Facts, key: str, step: int) -> float:
    """`key` (tokens or seconds) at the border `step`, between the two step events beside it."""
    known = [(0, 0.0)] + [(e["step"], v) for e in facts.steps if (v := number(e, key)) is not None]
    right = bisect_left(known, (step, -math.inf))
    if right == len(known):
        return known[-1][1]
    if right == 0:
        return known[0][1]
    (s0, v0), (s1, v1) = known[right - 1], known[right]
    return v0 + (v1 - v0) * (step - s0) / (s1 - s0)


def was_skipped(event: dict) -> bool:
    return bool(event.get("skipped")) or ("loss" in event and number(event, "loss") is None)


def title(facts: Facts) -> str:
    model = facts.config.get("model", {})
    return f"{facts.config.get('recipe', 'run')}: {model.get('layers')} layers, hidden {model.get('hidden')}, {model.get('objective', 'mlm')}"


def summary(facts: Facts) -> str:
    done = [e["eval_loss"] for e in facts.evals if number(e, "eval_loss") is not None]
    score = f"Held-out loss {done[-1]:.3f} after " if done else ""
    return f"{score}{magnitude(facts.last('tokens') or 0)} tokens, {duration(facts.last('seconds') or 0.0)}"


def duration(seconds: float) -> str:
    """1.5 s, 2 min 05 s, 3 h 07 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def magnitude(value: float) -> str:
    """1.23 M"""
    for power, name in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {name}"
    return f"{value:g}"
