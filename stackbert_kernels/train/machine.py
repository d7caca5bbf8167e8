"""What runs a configuration on this machine: the device, and the implementation of every op."""

from __future__ import annotations

import torch

from stackbert_kernels import ops
from stackbert_kernels.config import ConfigError, TrainConfig
from stackbert_kernels.train.torchrun import DistributedError, Place


def check_machine(config: TrainConfig) -> dict[str, str]:
    """The concrete implementation of every op; ConfigError if this machine lacks the device or the implementation that `config` names."""
    return kernels_of(config, device_of(config.device))


def device_of(wanted: str, place: Place = Place()) -> torch.device:  # noqa: B008 (frozen)
    """Of several processes on a machine, each has the GPU of its number. Where these are too few, one process of the machine says so."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and place.size > 1:
        wanted = f"cuda:{place.local_rank}"
    device = torch.device(wanted)
    seen = torch.cuda.device_count()
    if device.type == "cuda" and place.size > 1 and seen < place.local_size:
        refusal = DistributedError if place.rank > 0 and place.local_rank == 0 else ConfigError
        raise refusal(
            f"{place.local_size} ranks on a machine need as many CUDA devices, torch sees {seen}: "
            f"--nproc-per-node {seen}, or --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise ConfigError(
            f"device must be one that torch can use, got {wanted}: torch {torch.__version__} sees {seen} CUDA devices"
        )
    return device


def kernels_of(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """The concrete implementation of every op, by what the model will hand to it."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    stream = torch.empty(1, config.model.hidden, dtype=dtype, device=device)
    parameter = torch.empty(1, config.model.embedding_width, device=device)
    samples = {
        "attention": torch.empty(1, config.model.heads, config.model.head_dim, dtype=dtype, device=device),
        **dict.fromkeys(("embedding_layer_norm", "adamw_", "lamb_", "lans_", "global_norm"), parameter),
    }
    try:
        return {op.name: op.resolve(config.impl, samples.get(op.name, stream)) for op in ops.OPS}
    except ValueError as error:
        raise ConfigError(f"impl: {error}") from None
