"""What is measured beside us. Each peer is used where it can be imported and named as absent where it cannot.

The names and arguments are those of Liger-Kernel 0.8, flash-attention 2.8 and its flash_attn.cute, apex (July 2026) and torch 2.6 to 2.13.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .harness import Absent, Call, Case, Inputs


def module(name: str):
    """The module, or Absent."""
    package = name.partition(".")[0]
    for wanted in (package, name):  # the package first: without it, every module of it is absent for one reason
        try:
            found = importlib.import_module(wanted)
        except Exception as error:  # a peer built for another torch may fail in any way
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise Absent(f"{wanted} cannot be imported: {why}") from None
    return found


def gpu_only(t: Inputs) -> None:
    """For a peer whose kernels are for GPUs, or whose CPU path is another peer's."""
    if not any(torch.is_tensor(x) and x.is_cuda for x in t.values()):
        raise Absent("measured on GPUs only")


def gpu_module(name: str, t: Inputs):
    found = module(name)
    gpu_only(t)
    return found


def compiled(function: Callable, bind: Callable[[Callable], Callable[[Case, Inputs], Call]]):
    """The peer bind(torch.compile(function)), where the case says that compiling is worth its time."""

    @functools.cache
    def fast():
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False  # backward is timed many times on one graph
        return torch.compile(function, dynamic=False)

    def make(case: Case, t: Inputs):
        if not case.compile:
            raise Absent(
                "compiling takes longer than measuring; --compile asks for it (on a GPU the main cases have it)"
            )
        return bind(fast())(case, t)

    return make


# layer norm


def _affine(t: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """In x's dtype, as these peers want them."""
    return t["weight"].to(t["x"].dtype), t["bias"].to(t["x"].dtype)


def liger_layer_norm(eps: float):
    def make(case: Case, t: Inputs) -> Call:
        function = gpu_module("liger_kernel.ops.layer_norm", t).LigerLayerNormFunction
        return lambda: function.apply(t["x"], *_affine(t), eps)

    return make


def apex_layer_norm(eps: float):
    def make(case: Case, t: Inputs) -> Call:
        gpu_module("fused_layer_norm_cuda", t)
        function = gpu_module("apex.normalization.fused_layer_norm", t).fused_layer_norm_affine
        return lambda: function(t["x"], *_affine(t), (t["x"].shape[-1],), eps)

    return make


def apex_fast_layer_norm(eps: float):
    def make(case: Case, t: Inputs) -> Call:
        function = gpu_module("apex.contrib.layer_norm.layer_norm", t).FastLayerNormFN
        return lambda: function.apply(t["x"], *_affine(t), eps)

    return make


# cross entropy


def _logits(t: Inputs) -> torch.Tensor:
    dtype = t["hidden"].dtype
    return F.linear(t["hidden"], t["weight"].to(dtype), t["bias"].to(dtype))


def liger_fused_linear_cross_entropy(case: Case, t: Inputs) -> Call:
    function = gpu_module("liger_kernel.ops.fused_linear_cross_entropy", t).LigerFusedLinearCrossEntropyFunction
    dtype = t["hidden"].dtype
    return lambda: function.apply(t["hidden"], t["weight"].to(dtype), t["labels"], t["bias"].to(dtype))[0]


def liger_cross_entropy(case: Case, t: Inputs) -> Call:
    function = gpu_module("liger_kernel.ops.cross_entropy", t).LigerCrossEntropyFunction
    return lambda: function.apply(_logits(t), t["labels"], None)[0]


def apex_cross_entropy(case: Case, t: Inputs) -> Call:
    function = gpu_module("apex.contrib.xentropy.softmax_xentropy", t).SoftmaxCrossEntropyLoss
    in_float32 = t["hidden"].dtype != torch.float32
    return lambda: function.apply(_logits(t), t["labels"], 0.0, -100, in_float32).mean()
