"""What a sweep runs: the configuration of each method for so many steps, and the runs in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackbert_kernels.config import ModelConfig, TeacherShape, TrainConfig
from stackbert_kernels.recipes import NEED_SOURCE, NEED_TEACHER, RECIPES
from stackbert_kernels.train.budget import enough, steps_that_fit

EVALUATIONS, CHECKPOINTS, LOGGED = 20, 10, 100
"""So many of each in a run."""
TUNING = "tuning"
"""The folder of trials, beside the one of sources."""
NEEDS = {"source": NEED_SOURCE, "teacher": NEED_TEACHER}
"""The methods that need another model, by the setting of TrainConfig that names it."""


@dataclass(frozen=True)
class Timing:
    """Seconds a step of each stage: of a method, and of the model that is trained for it first."""

    method: tuple[float, ...]
    source: tuple[float, ...] = ()


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
    tune: tuple[float, ...] = ()
    """Rates that each method without its own is tried with first."""
    tune_seconds: float = 0.0
    """Of each trial."""
    source_share: float = 0.2
    """Of the budget: what the training of a source or a teacher takes that the sweep makes itself."""
    until: float = float("inf")
    """By time.monotonic(): no run is begun that would not end before."""

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
                **{setting: getattr(base, setting) if method in methods else "" for setting, methods in NEEDS.items()},
                teacher_shape=self._teacher_shape(method),
                optim=optim,
                keep=1,
                eval_every=max(1, steps // EVALUATIONS),
                checkpoint_every=max(1, steps // CHECKPOINTS),
                log_every=max(1, steps // LOGGED),
            ),
            self.options.get(method, options()),
        )

    def _teacher_shape(self, method: str) -> TeacherShape:
        """That of the given teacher, or of the one that the sweep makes."""
        if method not in NEED_TEACHER:
            return TeacherShape()
        if not self.makes(method):
            return self.base.teacher_shape
        made = SMALLER["teacher"](self.base.model)
        return TeacherShape(made.layers, made.hidden, made.inner)

    def makes(self, method: str) -> str | None:
        """source or teacher, where the method needs one and none was given: then each of its runs begins with training it."""
        return next((s for s, methods in NEEDS.items() if method in methods and not getattr(self.base, s)), None)

    def source_config(self, method: str, steps: int) -> TrainConfig:
        """Plain training of a smaller model, at the method's rate."""
        smaller = SMALLER[self.makes(method)](self.base.model)
        rates = {"baseline": self.rates.get(method, self.base.optim.lr)}
        return replace(self, base=replace(self.base, model=smaller, stages=()), rates=rates, options={}).config(
            "baseline", steps
        )

    def fitted(self, method: str, timing: Timing) -> tuple[TrainConfig, TrainConfig | None]:
        """The run whose steps fill the budget, and that of its source within it; ConfigError where there is no room."""
        source, seconds = None, self.seconds
        if self.makes(method):
            seconds = self.source_share * self.seconds
            source = _filling(lambda steps: self.source_config(method, steps), timing.source, seconds)
            seconds = self.seconds - seconds
        return _filling(lambda steps: self.config(method, steps), timing.method, seconds), source

    def runs(self) -> list[tuple[str, int, Path]]:
        """Method, seed and directory, in the order of the work."""
        first = self.base.seed
        return [
            (m, seed, self.directory / f"{m}-seed{seed}")
            for seed in range(first, first + self.seeds)
            for m in self.methods
        ]

    def trials(self) -> list[tuple[str, float, Path]]:
        """Method, rate and directory of the runs that find the rates."""
        tuned = [m for m in self.methods if m not in self.rates]
        return [(m, rate, self.directory / TUNING / f"{m}-lr{rate:g}") for m in tuned for rate in self.tune]

    def trial(self, method: str, rate: float) -> Sweep:
        """The sweep as it would be with that rate, for as long as a trial takes."""
        return replace(self, rates=self.rates | {method: rate}, seconds=self.tune_seconds)


def _filling(recipe: Callable[[int], TrainConfig], seconds_per_step: Sequence[float], seconds: float) -> TrainConfig:
    return recipe(enough(steps_that_fit(recipe, seconds_per_step, seconds), seconds))


def half_size(model: ModelConfig) -> ModelConfig:
    """Half the layers, and half the heads at the same width of a head."""
    heads = max(1, model.heads // 2)
    hidden = heads * model.head_dim
    inner = max(1, model.inner * hidden // model.hidden)
    return replace(model, layers=max(1, model.layers // 2), heads=heads, hidden=hidden, inner=inner)


def half_depth(model: ModelConfig) -> ModelConfig:
    return replace(model, layers=max(1, model.layers // 2))


SMALLER = {"source": half_size, "teacher": half_depth}
