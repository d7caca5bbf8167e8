"""What a person sees of a run: a tqdm bar on a terminal, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import sys
import time

from stackbert_kernels.plan import Span

SECONDS_BETWEEN_LINES = 10.0


class Console:
    """`with Console(steps) as console`; silent when shown is False."""

    def __init__(self, steps: int, *, shown: bool = True):
        self.steps, self.shown = steps, shown
        self.terminal = shown and sys.stderr.isatty()
        self.bar = None
        self.loss = float("nan")
        self.started = self.last_line = time.monotonic()
        self.first_step: int | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def stage(self, span: Span, stages: int, predicted: float) -> None:
        stage = span.stage
        learns = "all layers learn" if stage.train_from == 0 else f"layers {stage.train_from}-{stage.depth - 1} learn"
        grown = f", grown by {stage.grow}" if span.grows else ""
        self.line(
            f"stage {span.index + 1}/{stages} ({span.name}): steps {span.first}-{span.last}, depth {stage.depth}{grown}, {learns}, "
            f"predicted cost of a step {predicted:.2f} of the whole model's"
        )

    def step(self, done: int, span: Span, loss: float, lr: float, tokens_per_second: float) -> None:
        if not self.shown:
            return
        if self.first_step is None:
            self.first_step = done - 1
        shown_loss = loss if self.loss != self.loss else self.loss
        if self.terminal:
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=self.steps, initial=self.first_step, unit="step", file=sys.stderr, dynamic_ncols=True
                )
            self.bar.set_postfix_str(
                f"{span.name}, loss {shown_loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False
            )
            self.bar.update(1)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(
                f"step {done}/{self.steps}  {span.name}  loss {shown_loss:.3f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s  "
                f"{time.monotonic() - self.started:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def logged(self, loss: float) -> None:
        """The mean loss over the last logging interval, steadier to look at than one step's."""
        self.loss = loss

    def evaluated(self, step: int, figures: dict[str, float], word_drift: float | None = None) -> None:
        self.line(
            f"step {step}: held-out loss {figures['eval_loss']:.3f} (without context {figures['unigram_loss']:.3f}), "
            f"accuracy {figures['eval_accuracy']:.3f} (without context {figures['unigram_accuracy']:.3f})"
            + ("" if word_drift is None else f", word embedding moved by {word_drift:.1%} below frozen layers")
        )
