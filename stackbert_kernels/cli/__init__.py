"""`stackbert <command>`: the options are the fields of config, checked before anything slow is loaded.

Exit codes: 0 done, 1 failed, 2 bad arguments (one line on stderr, before any work).
"""

from __future__ import annotations

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
        return COMMANDS[type(command)](command)
    except ConfigError as error:
        return complain(error, BAD_ARGUMENTS) if speaks() else BAD_ARGUMENTS
    except (CheckpointError, DistributedError, OSError) as error:
        return complain(error if speaks() else f"rank {place().rank}: {error}", FAILED)
    except KeyboardInterrupt:
        return complain("interrupted", FAILED)


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
