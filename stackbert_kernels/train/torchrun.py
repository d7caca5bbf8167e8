"""What torchrun says of this process: which one of how many it is. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from stackbert_kernels.config import ConfigError, TrainConfig


class DistributedError(RuntimeError):
    """Another process of this run failed, or cannot be reached; the message is one line."""


@dataclass(frozen=True)
class Place:
    """Of a process among those that train together; the default is one alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the `local_size` of its machine."""
    local_size: int = 1


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """By RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone where there is no WORLD_SIZE. ConfigError where they make no sense."""
    size = _number(environment, "WORLD_SIZE", "1", least=1)
    if size == 1:
        return Place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, which needs {', '.join(missing)} too: start with torchrun, or unset it"
        )
    rank = _number(environment, "RANK", "0", least=0)
    if rank >= size:
        raise ConfigError(f"RANK must be in [0, {size}), got {rank}")
    local_rank = _number(environment, "LOCAL_RANK", str(rank), least=0)
    return Place(rank, size, local_rank, _number(environment, "LOCAL_WORLD_SIZE", str(local_rank + 1), least=1))


def _number(environment: Mapping[str, str], name: str, default: str, *, least: int) -> int:
    text = environment.get(name, default)
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(f"{name} must be a whole number >= {least}, got {text!r}")
    return int(text)


def check_ranks(config: TrainConfig) -> Place:
    """The place of this process; ConfigError unless `config` can be trained by as many as there are."""
    here = place()
    if here.size > 1:
        data = config.data
        # Samples are at most seq_len long: so many tokens hold one for each rank at least.
        if data.batch_tokens < here.size * data.seq_len:
            raise ConfigError(
                f"batch_tokens must be >= seq_len x ranks, so that each has a sample: got batch_tokens {data.batch_tokens}, "
                f"seq_len {data.seq_len}, {here.size} ranks"
            )
        if config.device.startswith("cuda:"):
            raise ConfigError(
                f"device must be auto, cpu or cuda with {here.size} ranks, got {config.device}: each has its own"
            )
    return here


def speaks() -> bool:
    """Whether this process says what all of them would say: that of rank 0, or one alone."""
    try:
        return place().rank == 0
    except ConfigError:
        return True
