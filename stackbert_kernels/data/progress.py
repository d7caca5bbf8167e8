"""How long work is shown: a tqdm bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """`with Progress("reading", total, "B") as bar: bar.advance(n)`; silent when shown is False. Writes to stderr."""

    def __init__(self, title: str, total: int, unit: str, *, shown: bool = True):
        self.title, self.total, self.unit, self.shown = title, total, unit, shown
        self.done, self.started = 0, time.monotonic()
        self.last_line = self.started
        self.bar = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B", file=sys.stderr)

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif self.shown and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = time.monotonic() - self.started
        share = 100 * self.done / self.total if self.total else 100.0
        amount = f"{self.done / 1e6:.1f} MB" if self.unit == "B" else f"{self.done} {self.unit}"
        print(f"{self.title}: {amount} ({share:.0f}%), {seconds:.1f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.shown and kind is None:
            self._line()
