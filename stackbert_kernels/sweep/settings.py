"""What a sweep runs: the configuration of each method for so many steps, and the runs in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackbert_kernels.config import TrainConfig
from stackbert_kernels.recipes import NEED_SOURCE, RECIPES

EVALUATIONS, CHECKPOINTS, LOGGED = 20, 10, 100
"""So many of each in a run."""


@dataclass(frozen=True)
class Sweep:
    """What is run; `base` says all that the methods share."""

    base: TrainConfig
    methods: tuple[str, ...]
    directory: Path
    seconds: float
    seeds: int = 3
    warmup: float = 0.05
    """Share of a run's steps over which the rate rises."""
    rates: dict[str, float] = field(default_factory=dict)
    """Highest learning rate of methods that have their own."""
    options: dict[str, object] = field(default_factory=dict)
    """Options of recipes that differ from their defaults."""
    jobs: int = 1
    """Runs at a time."""

    def config(self, method: str, steps: int) -> TrainConfig:
        """The run of a method with the first seed."""
        base = self.base
        optim = replace(base.optim, lr=self.rates.get(method, base.optim.lr), warmup=max(1, round(self.warmup * steps)))
        function, options = RECIPES[method]
        return function(
            replace(
                base,
                steps=steps,
                stages=(),
                source=base.source if method in NEED_SOURCE else "",
                optim=optim,
                keep=1,
                eval_every=max(1, steps // EVALUATIONS),
                checkpoint_every=max(1, steps // CHECKPOINTS),
                log_every=max(1, steps // LOGGED),
            ),
            self.options.get(method, options()),
        )

    def recipe(self, method: str) -> Callable[[int], TrainConfig]:
        return lambda steps: self.config(method, steps)

    def runs(self) -> list[tuple[str, int, Path]]:
        """Method, seed and directory, in the order of the work."""
        first = self.base.seed
        return [
            (m, seed, self.directory / f"{m}-seed{seed}")
            for seed in range(first, first + self.seeds)
            for m in self.methods
        ]
