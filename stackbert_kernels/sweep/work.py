"""One piece of work of a sweep: a run, or the timing of a method."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from stackbert_kernels.config import ConfigError, TrainConfig, from_dict, to_dict
from stackbert_kernels.train.budget import TIMED_STEPS, timing_of
from stackbert_kernels.train.checkpoint import CheckpointError

TIMING_SHARE, LONGEST_TIMING = 0.05, 200
"""Of the budget, and steps a stage: a timing of few short steps is repeated with more, so that a busy moment of the machine decides nothing."""
TRAIN, TIME, FILL = "train", "time", "fill"
"""A run; a timing; a timing without end, which only keeps a core as busy as it is while another run is there."""
ENDLESS = 10**7


@dataclass(frozen=True)
class Work:
    kind: str
    name: str
    """For a person, such as: mslt seed 1."""
    config: TrainConfig
    out: Path
    seconds: float = 0.0
    """The budget, of which a timing takes a share at most."""

    def plain(self) -> dict:
        return {
            "kind": self.kind,
            "name": self.name,
            "config": to_dict(self.config),
            "out": str(self.out),
            "seconds": self.seconds,
        }


def work_of(plain: dict) -> Work:
    return Work(**plain | {"config": from_dict(plain["config"]), "out": Path(plain["out"])})


def perform(work: Work, *, progress: bool = False) -> dict:
    """What training returned; of a timing, `stage_seconds` are what steps take. status "failed" and a message where it is refused."""
    from stackbert_kernels.train.loop import train

    try:
        if work.kind == TRAIN:
            return train(work.config, work.out, progress=progress)
        return _timed(work, train)
    except (ConfigError, CheckpointError) as error:
        return {"status": "failed", "message": str(error)}


def _timed(work: Work, train) -> dict:
    def result_of(timed: int) -> dict:
        shutil.rmtree(work.out, ignore_errors=True)
        try:
            return train(timing_of(lambda _: work.config, timed), work.out, progress=False)
        finally:
            shutil.rmtree(work.out, ignore_errors=True)

    if work.kind == FILL:
        return result_of(ENDLESS)
    result = result_of(TIMED_STEPS)
    if result["status"] == "finished":
        longer = min(LONGEST_TIMING, int(TIMING_SHARE * work.seconds / sum(result["stage_seconds"])))
        if longer > 2 * TIMED_STEPS:
            result = result_of(longer)
    return result
