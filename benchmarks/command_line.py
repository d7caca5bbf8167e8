"""What every command of the benchmarks does with its arguments: an error is one line, with exit code 2, before any work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2


class BadUse(Exception):
    """Bad arguments, in one line."""


class Parser(argparse.ArgumentParser):
    """An error is one line, as everywhere on this command line."""

    def error(self, message: str):
        raise BadUse(message)


def answered(command: Callable[[list[str], str], int], arguments: Sequence[str], prog: str) -> int:
    """The exit code of `command(arguments, prog)`; bad use and interruption are a line on stderr."""
    try:
        return command(list(arguments), prog)
    except BadUse as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return FAILED


def device_of(wanted: str) -> str:
    """cpu or cuda; BadUse where a GPU is wanted and none is seen."""
    import torch

    seen = torch.cuda.is_available()
    if wanted == "cuda" and not seen:
        raise BadUse(f"--device cuda: torch {torch.__version__} sees no GPU here")
    return ("cuda" if seen else "cpu") if wanted == "auto" else wanted


def make_folder(path: Path | None) -> None:
    """The folder of --out, where one is wanted."""
    try:
        if path:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadUse(f"--out {path}: {error.strerror}") from None
