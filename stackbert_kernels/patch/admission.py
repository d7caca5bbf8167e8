"""What `patch` refuses before it looks for anything: a class swap there would do nothing, or harm."""

from __future__ import annotations

import torch
from torch import nn

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes", "torchao", "auto_gptq", "awq")


def refuse(model: nn.Module) -> None:
    """A TypeError or ValueError with the module and what to do; the model is not touched."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        here = name or "the model"
        if (
            isinstance(module, torch._dynamo.OptimizedModule)
            or getattr(module, "_compiled_call_impl", None) is not None
        ):
            raise ValueError(f"patch: {here} is compiled already; patch first, then torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"patch: {here} is a torch.jit.ScriptModule; patch the module it was made from")
        if _sharded(module):
            raise ValueError(f"patch: {here} is sharded already ({type(module).__name__}); patch first, then shard")
        if kind := quantized(module):
            raise ValueError(f"patch: {here} is quantized ({kind}); wanted modules with floating-point weights")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"patch: {name} is on meta; load or initialise the model first")


def _sharded(module: nn.Module) -> bool:
    if any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__):
        return True
    return any(
        type(p.data).__name__ == "DTensor" or type(p).__name__ == "DTensor" for p in module.parameters(recurse=False)
    )


def quantized(module: nn.Module) -> str | None:
    """The name of the class of a quantized linear layer, or of its weight's."""
    cls = type(module)
    if any(c.__module__.startswith(QUANTIZED) for c in cls.__mro__):
        return f"{cls.__module__}.{cls.__name__}"
    weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
    if isinstance(weight, torch.Tensor):
        if not weight.is_floating_point():
            return f"{cls.__name__} with a weight of {weight.dtype}"
        if type(weight) not in (torch.Tensor, nn.Parameter):
            return f"{cls.__name__} with a {type(weight).__name__}"
    return None
