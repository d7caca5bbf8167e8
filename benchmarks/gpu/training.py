"""The last phase: a short training run on the documentation of this machine's Python.

Three things are shown. Two runs of one seed, on the CPU and on the GPU, have the same losses up to rounding: same batches, same masks. A
run by MSLT learns. And each of its stages costs what plan/ predicts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pydoc_data.topics
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stackbert_kernels.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

from .. import results_file

# The first loss comes before any update: only the rounding of one forward pass in fp32 separates the two, and a wrong mask shows. Later
# ones drift apart as rounding is fed back through Adam.
FIRST_LOSS, ALL_LOSSES = 1e-5, 1e-2  # relative
# FLOPs leave out what is bound by memory or by launches. A stage that by mistake ran or trained all layers would be at 2 to 3.
COST = (0.6, 1.6)  # measured / predicted
TEXT_BYTES = 8 << 20

OFTEN = {"log_every": 1, "checkpoint_every": 10_000, "eval_every": 10_000}


@dataclass(frozen=True)
class Preset:
    curve: TrainConfig
    mslt: TrainConfig  # its steps are chosen by the time that is left
    steps: tuple[int, int]  # at least, at most
    fall: float  # of the loss, at least, as a share of the first
    judge_cost: bool


def preset(device: str) -> Preset:
    if device == "cuda":
        data = DataConfig(train_vocab_size=8192, seq_len=128, batch_tokens=2048, mask_rate=0.15)
        small = ModelConfig(layers=4, hidden=128, heads=2, max_position=128)
        wide = ModelConfig(layers=12, hidden=512, heads=8, max_position=128)
        return Preset(
            TrainConfig(model=small, data=data, optim=OptimConfig(lr=1e-3, warmup=10), steps=60, **OFTEN),
            TrainConfig(
                model=wide, data=replace(data, batch_tokens=32_768, mask_rate=0.3), optim=OptimConfig(lr=1e-3, warmup=30),
                steps=400, precision="bf16", device="cuda", **OFTEN,
            ),
            steps=(120, 2000),
            fall=0.05,
            judge_cost=True,
        )  # fmt: skip
    data = DataConfig(train_vocab_size=512, seq_len=32, batch_tokens=256, eval_tokens=1024)
    tiny = ModelConfig(layers=4, hidden=32, heads=2, max_position=32, init_std=0.05)
    config = TrainConfig(model=tiny, data=data, optim=OptimConfig(lr=5e-3, warmup=4), steps=10, device="cpu", **OFTEN)
    return Preset(config, replace(config, steps=40, stages=()), steps=(40, 40), fall=0.02, judge_cost=False)


class Report:
    """What has been found so far, in the result file at every moment."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict = {"lines": [], "failures": []}

    def put(self, *lines: str, **values) -> None:
        self.values["lines"] += lines
        self.values |= values
        print("\n".join(lines), flush=True)
        results_file.write(self.path, self.values)

    def judge(self, good: bool, line: str) -> None:
        if not good:
            self.values["failures"].append(line)
        self.put(line)

    def attempt(self, what: str, part: Callable[[], None]) -> None:
        """One part that breaks leaves the others their turn."""
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            self.judge(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def corpus(device: str, scratch: Path) -> Path:
    """Prose of this Python and its packages; on a CPU, where this only has to run, one file's."""
    from stackbert_kernels.data.documentation import documentation, prose_of_file

    text = scratch / "text.txt"
    if device == "cpu":
        documents = prose_of_file(pydoc_data.topics.__file__)
        text.write_text("".join("\n".join(paragraphs) + "\n\n" for paragraphs in documents), encoding="utf-8")
        return text
    documentation(text, progress=False)
    with text.open("r+b") as file:
        head = file.read(TEXT_BYTES)
        if len(head) == TEXT_BYTES:
            file.truncate(head.rindex(b"\n\n") + 2)
    return text


def losses(config: TrainConfig, out: Path) -> tuple[list[float], dict]:
    """Of every step, and what the run returned."""
    from stackbert_kernels.train.loop import train
    from stackbert_kernels.train.run_directory import METRICS, read_metrics

    result = train(config, out, progress=False)
    return [event["loss"] for event in read_metrics(out / METRICS) if event["event"] == "step"], result


def compare_curves(report: Report, device: str, config: TrainConfig, shards: Path, scratch: Path) -> None:
    config = replace(config, data=replace(config.data, text=(str(shards),)))
    runs = {"cpu": replace(config, device="cpu"), "cuda": replace(config, device="cuda")}
    if device == "cpu":
        runs = {"cpu reference": replace(config, impl="reference"), "cpu auto": config}
    curves = {name: losses(run, scratch / f"curve {name}")[0] for name, run in runs.items()}
    (one, a), (other, b) = curves.items()
    apart = [abs(x - y) / abs(x) for x, y in zip(a, b, strict=True)]
    report.put(curves=curves)
    report.judge(
        apart[0] <= FIRST_LOSS and max(apart) <= ALL_LOSSES,
        f"losses of one seed, {one} and {other}: first {a[0]:.6f} and {b[0]:.6f} ({apart[0]:.1e} apart, allowed {FIRST_LOSS:.0e}), "
        f"over {len(a)} steps at most {max(apart):.1e} (allowed {ALL_LOSSES:.0e})",
    )


def steps_for(config: TrainConfig, seconds: float, bounds: tuple[int, int], scratch: Path) -> int:
    """How many steps of MSLT fit, by a few steps of all layers. The average stage costs about half of such a step; a third is reserve."""
    if bounds[0] == bounds[1]:
        return bounds[0]
    pilot = replace(config, steps=12, stages=(), optim=replace(config.optim, warmup=4))
    (full,) = losses(pilot, scratch / "pilot")[1]["stage_seconds"]
    return max(bounds[0], min(bounds[1], int(0.67 * seconds / (0.6 * full))))


def train_by_mslt(report: Report, preset: Preset, shards: Path, scratch: Path, until: float) -> None:
    from stackbert_kernels.plan import baseline_stage, flops_per_token
    from stackbert_kernels.recipes.mslt import MsltOptions, mslt

    config = replace(preset.mslt, data=replace(preset.mslt.data, text=(str(shards),)))
    started = time.monotonic()
    steps = steps_for(config, until - started, preset.steps, scratch)
    config = mslt(replace(config, steps=steps, stages=()), MsltOptions(stages=4, joint=0.2))
    # The loop finishes its step on SIGTERM and returns what it has: better than being cut off.
    alarm = threading.Timer(max(1.0, until - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try:
        curve, result = losses(config, scratch / "mslt")
    finally:
        alarm.cancel()
    report.put(
        mslt={"losses": curve, **{k: v for k, v in result.items() if k not in ("out", "model", "report", "message")}}
    )

    beside = (
        f", held-out {result['eval_loss']:.3f}, without context {result['unigram_loss']:.3f}"
        if "eval_loss" in result
        else ""
    )
    window = max(1, len(curve) // 20)
    last = sum(curve[-window:]) / window
    report.judge(
        last < (1 - preset.fall) * curve[0],
        f"loss by MSLT: {curve[0]:.3f} to {last:.3f} in {len(curve)} of {steps} steps, {result['seconds']:.0f} s{beside}",
    )
    if result["status"] != "finished":
        report.judge(False, f"MSLT {result['status']} after {len(curve)} of {steps} steps")
        return
    full = flops_per_token(config, baseline_stage(config))
    measured = [seconds / result["stage_seconds"][-1] for seconds in result["stage_seconds"]]
    predicted = [flops_per_token(config, stage) / full for stage in config.stages]
    stages = [
        {"name": stage.name, "seconds": s, "measured": m, "predicted": p}
        for stage, s, m, p in zip(config.stages, result["stage_seconds"], measured, predicted, strict=True)
    ]
    text = ", ".join(f"{s['measured']:.2f} ({s['predicted']:.2f})" for s in stages)
    within = all(COST[0] <= m / p <= COST[1] for m, p in zip(measured, predicted, strict=True))
    report.put(stages=stages)
    report.judge(within or not preset.judge_cost, f"cost of a step in each MSLT stage, measured (predicted): {text}")


def draw(values: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for (name, curve), style in zip(values.get("curves", {}).items(), ("-", "--"), strict=False):
        left.plot(range(1, len(curve) + 1), curve, style, label=name)
        left.legend()
    left.set(title="one seed on two devices", xlabel="step", ylabel="loss (nats)")
    middle.plot(values.get("mslt", {}).get("losses", []))
    middle.set(title="training by MSLT", xlabel="step")
    stages = values.get("stages", [])
    for offset, key in ((-0.2, "measured"), (0.2, "predicted")):
        right.bar([i + offset for i in range(len(stages))], [s[key] for s in stages], 0.4, label=key)
    right.set_xticks(range(len(stages)), [s["name"] for s in stages], rotation=20)
    right.set(title="cost of a step, all layers = 1")
    if stages:
        right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    until = time.monotonic() + options.seconds

    from stackbert_kernels.data.prepare import load_manifest, prepare

    report, chosen = Report(options.result), preset(options.device)
    text = corpus(options.device, options.scratch)
    shards = prepare([str(text)], options.scratch / "shards", chosen.curve.data, progress=False)
    tokens = load_manifest(shards)["splits"]["train"]["tokens"]
    report.put(f"{tokens:,} tokens of documentation, ready after {time.monotonic() + options.seconds - until:.0f} s")
    report.attempt("curves", lambda: compare_curves(report, options.device, chosen.curve, shards, options.scratch))
    report.attempt(
        "MSLT", lambda: train_by_mslt(report, chosen, shards, options.scratch, until - 0.15 * options.seconds)
    )
    if importlib.util.find_spec("matplotlib"):
        report.attempt("figure", lambda: draw(report.values, options.figure))
    else:
        report.put("no figure: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
