"""A whole run."""

from __future__ import annotations

from dataclasses import dataclass, field

from stackbert_kernels.config.checks import at_most, one_of, positive, require
from stackbert_kernels.config.sections import DataConfig, ModelConfig, OptimConfig
from stackbert_kernels.config.sequence import check_levels, check_stages
from stackbert_kernels.config.stage import Stage

IMPLEMENTATIONS = ("auto", "reference", "native", "triton")
MOST_THREADS = 4096


@dataclass(frozen=True)
class TeacherShape:
    """What is known of TrainConfig.teacher, from its own settings, so that its forward pass can be counted; 0 = not looked at yet."""

    layers: int = 0
    hidden: int = 0
    inner: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `stages` empty = one stage of all layers; else their steps must sum to `steps`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    """Optimizer steps of the whole run."""
    stages: tuple[Stage, ...] = ()
    recipe: str = "baseline"
    """The name of the recipe that made `stages`."""
    source: str = ""
    """Of recipes that begin from a smaller model (bert2bert): its run directory, or a transformers directory with a BERT."""
    teacher: str = ""
    """Of recipes that learn from a finished model with the same words (late_to_early): its run directory, or a transformers directory with
    a BERT."""
    teacher_shape: TeacherShape = TeacherShape()
    seed: int = 0
    """Decides initial weights, order of samples, masks and dropout."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast; weights, moments and statistics stay fp32)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    impl: str = "auto"
    """Implementation of the ops: auto, reference, native or triton."""
    threads: int = 0
    """CPU threads; 0 = as many as torch chooses."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more at the end of each stage."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    eval_every: int = 500
    """Steps between evaluations on held-out text; one more at the end of each stage."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self):
        positive(
            steps=self.steps,
            checkpoint_every=self.checkpoint_every,
            eval_every=self.eval_every,
            log_every=self.log_every,
        )
        require(self.keep >= 1, f"keep must be >= 1, got {self.keep}")
        require(self.threads >= 0, f"threads must be >= 0, got {self.threads}")
        at_most(MOST_THREADS, threads=self.threads)
        require(0 <= self.seed < 2**63, f"seed must be in [0, 2^63), got {self.seed}")
        require(
            self.optim.accumulate <= self.data.batch_tokens,
            f"accumulate must be <= batch_tokens, got accumulate {self.optim.accumulate}, batch_tokens {self.data.batch_tokens}",
        )
        one_of("precision", self.precision, ("fp32", "bf16"))
        one_of("impl", self.impl, IMPLEMENTATIONS)
        require(
            self.device in ("auto", "cpu", "cuda") or (self.device.startswith("cuda:") and self.device[5:].isdigit()),
            f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}",
        )
        require(
            self.data.seq_len <= self.model.max_position,
            f"seq_len must be <= max_position, got seq_len {self.data.seq_len}, max_position {self.model.max_position}",
        )
        require(
            self.data.short_seq_len == 0 or 0 < self.short_steps < self.steps,
            f"steps must leave both lengths (short_share {self.data.short_share:g}) at least 1, got steps {self.steps}",
        )
        require(
            self.optim.warmup < self.steps,
            f"warmup must be < steps, got warmup {self.optim.warmup}, steps {self.steps}",
        )
        require(
            self.optim.constant == 0 or self.optim.warmup + self.optim.constant < self.steps,
            f"warmup + constant must be < steps, got warmup {self.optim.warmup}, constant {self.optim.constant}, "
            f"steps {self.steps}",
        )
        if not self.stages:
            object.__setattr__(self, "stages", (Stage(steps=self.steps, depth=self.model.layers, name="all layers"),))
        check_stages(self.stages, self.model.layers, self.steps)
        check_levels(self.stages, self.model)
        require(
            self.model.norm == "pre" or all(stage.drop.keep == 1 for stage in self.stages),
            f"layers can be left out of a pre-norm encoder: norm must be 'pre' with drop, got {self.model.norm!r}",
        )

    @property
    def short_steps(self) -> int:
        """The first steps of the run, whose samples have at most data.short_seq_len tokens."""
        return round(self.data.short_share * self.steps) if self.data.short_seq_len else 0

    def seq_len(self, step: int) -> int:
        """Most tokens of a sample of `step`."""
        return self.data.short_seq_len if step < self.short_steps else self.data.seq_len
