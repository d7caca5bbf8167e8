"""Runs of seconds: a small text, a small model, what a run left behind, and a run put back to where it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from stackbert_kernels.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.train import checkpoint
from stackbert_kernels.train.loop import train

DATA = DataConfig(train_vocab_size=120, seq_len=16, batch_tokens=64, eval_tokens=200, heldout=0.1)
MEASURED = ("seconds", "tokens_per_second", "stage_seconds")


def settings(shards, **changes):
    model = ModelConfig(layers=4, hidden=32, heads=2, max_position=16, dropout=0.1)
    own = {
        "steps": 20,
        "checkpoint_every": 1,
        "keep": 99,
        "eval_every": 7,
        "log_every": 3,
        "optim": OptimConfig(lr=1e-2),
    }
    return TrainConfig(model=model, data=replace(DATA, text=(str(shards),)), **own | changes)


def trained(config, out, **keywords):
    return train(config, out, progress=False, **keywords)


def state_after(out, step):
    tensors, documents = checkpoint.load(out / "checkpoints" / f"step-{step}")
    for name in MEASURED:
        documents["state"].pop(name, None)
    documents["state"]["since_log"].pop("seconds")
    return tensors, documents


def assert_same_state(left, right):
    assert left[1] == right[1]
    assert {f: set(named) for f, named in left[0].items()} == {f: set(named) for f, named in right[0].items()}
    for file, named in left[0].items():
        for name, tensor in named.items():
            assert torch.equal(tensor, right[0][file][name]), f"{file}: {name}"


def log_of(out):
    """Events without what a clock decides; every line must be valid JSON."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line, parse_constant=pytest.fail).items() if k not in MEASURED} for line in lines
    ]


def go_back(out, step):
    """As if the process had died after it saved `step` and logged some more."""
    for path in checkpoint.saved(out / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"event": "end"' not in line]
    (out / "metrics.jsonl").write_text("\n".join(lines)[:-10])  # the last line is cut off


def assert_goes_on_bitwise(config, folder, at):
    """A run that was stopped after each step of `at` ends, state and log, as one that never was. Returns the straight run's directory."""
    straight = folder / "straight"
    assert trained(config, straight)["status"] == "finished"
    last, log = state_after(straight, config.steps), log_of(straight)
    for step in at:
        resumed = folder / f"resumed-{step}"
        shutil.copytree(straight, resumed)
        go_back(resumed, step)
        assert trained(config, resumed)["status"] == "finished"
        assert_same_state(state_after(resumed, config.steps), last)
        assert log_of(resumed) == log
    return straight
