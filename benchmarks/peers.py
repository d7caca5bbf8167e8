"""What is measured beside us. Each peer is used where it can be imported and named as absent where it cannot."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from .harness import Absent, Case, Inputs


def module(name: str):
    """The module, or Absent."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer built for another torch may fail in any way
        raise Absent(
            f"{name} cannot be imported: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        ) from None


def compiled(function: Callable) -> Callable:
    """torch.compile of `function`, made at its first call; on a GPU only, where compiling takes seconds and pays."""

    @functools.cache
    def make():
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*arguments):
        if not any(torch.is_tensor(a) and a.is_cuda for a in arguments):
            raise Absent("measured on GPUs only")
        return make()(*arguments)

    return call


def liger_layer_norm(case: Case, t: Inputs):
    function = module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    if not t["x"].is_cuda:
        raise Absent("Liger-Kernel wants a GPU")
    return lambda: function.apply(t["x"], t["weight"].to(t["x"].dtype), t["bias"].to(t["x"].dtype), 1e-12)
