"""`stackbert <command>`: the options are the fields of config, checked before anything slow is loaded.

Exit codes: 0 done, 1 failed, 2 bad arguments (one line on stderr, before any work).
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from stackbert_kernels import __version__
from stackbert_kernels.cli.arguments import parse
from stackbert_kernels.cli.commands import BAD_ARGUMENTS, COMMANDS, DONE, FAILED, complain, summary
from stackbert_kernels.config import ConfigError
from stackbert_kernels.train.checkpoint import CheckpointError
from stackbert_kernels.train.torchrun import DistributedError, place, speaks

__all__ = ["BAD_ARGUMENTS", "DONE", "FAILED", "complain", "main", "summary"]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"stackbert {__version__}")
        return DONE
    try:
        if arguments[:1] == ["bench"]:
            return _benchmarks()(arguments[1:], prog="stackbert bench")
        command = parse(arguments)
        code = COMMANDS[type(command)](command)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return complain(error, BAD_ARGUMENTS) if speaks() else BAD_ARGUMENTS
    except (CheckpointError, DistributedError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return FAILED
        return complain(error if speaks() else f"rank {place().rank}: {error}", FAILED)
    except KeyboardInterrupt:
        return complain("interrupted", FAILED)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed at its other end, as `| head` does once it has what it wants."""
    ends = select.poll()
    ends.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in ends.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has somewhere to go at exit
    return True


def _benchmarks() -> Callable[..., int]:
    """Their `main`. They are installed as stackbert_kernels.benchmarks; in a source tree they lie beside the package."""
    name = "stackbert_kernels.benchmarks"
    if find_spec(name) is None:
        folder = Path(__file__).parents[2] / "benchmarks"
        if not (folder / "__main__.py").exists():
            raise ConfigError("bench: this installation has no benchmarks")
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return import_module(f"{name}.__main__").main
