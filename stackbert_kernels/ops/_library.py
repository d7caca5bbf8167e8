"""What every op.py uses: the `stackbert` op namespace, the choice of an implementation, and its explanation.

An op has up to three implementations: `reference` (plain PyTorch), `native` (the compiled module: C++ on CPU, CUDA on GPU) and
`triton`. "auto" is resolved to one of these names before the op is called, so that what ran is never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from stackbert_kernels.ops import _triton

try:
    from stackbert_kernels import _C
except (
    ImportError
) as error:  # a source tree without the compiled module still runs its reference; `doctor` shows this reason
    _C = None
    WHY_NO_NATIVE = WHY_NO_NATIVE_CUDA = f"the compiled module cannot be imported: {error}"
else:
    WHY_NO_NATIVE = None
    WHY_NO_NATIVE_CUDA = None if _C.cuda_archs() else f"built without CUDA: {_C.build_info()['why_no_cuda']}"

PREFERENCE = ("native", "triton", "reference")
KEYS = {"cpu": "CPU", "cuda": "CUDA"}
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h

HUGE_PAGES_FROM = 4 << 20  # bytes: two 2 MB pages

LIBRARY = torch.library.Library("stackbert", "DEF")


def why_no_native(device: torch.device) -> str | None:
    if device.type != "cuda":
        return WHY_NO_NATIVE
    return WHY_NO_NATIVE_CUDA or why_no_machine_code(device.index)


def why_no_machine_code(index: int | None) -> str | None:
    """Why none of the architectures that the compiled module was built for runs on this GPU, or None. torch.compile asks it once, while tracing."""
    return _why_no_machine_code(index)


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo (and Triton) by whoever imports an op.
why_no_machine_code._dynamo_marked_constant = True


@cache
def _why_no_machine_code(index: int | None) -> str | None:
    if not torch.cuda.is_available():  # a tensor that only claims to be on a GPU
        return None
    return _C.cuda_archs_why_not(_C.cuda_archs(), *torch.cuda.get_device_capability(index)) or None


Table = dict[str, dict[str, Callable]]  # device -> implementation -> function


def lazy(module: str, name: str) -> Callable:
    """A function of a module that is imported at the first call: Triton takes long to import and may be missing."""

    @cache
    def load() -> Callable:
        return getattr(import_module(module), name)

    def call(*arguments):
        return load()(*arguments)

    return call


@dataclass(frozen=True)
class Explanation:
    """Which implementation "auto" takes for given tensors, and why not the others."""

    op: str
    device: str
    chosen: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        others = "".join(f"\n  not {name}: {reason}" for name, reason in self.why_not.items())
        return f"{self.op} on {self.device}: {self.chosen}{others}"


@dataclass(frozen=True)
class Op:
    """Name and implementations of an op. `why_not(impl, *tensors)` gives the reason why one cannot take these tensors, or None."""

    name: str
    table: Table
    why_not: Callable[..., str | None]
    any_dtype: bool = False  # its Triton kernels move bytes

    def available(self) -> dict[str, list[str]]:
        """Without triton on the CPU: that is Triton's interpreter, for tests that ask for it by name."""
        return {
            device: [
                i for i in PREFERENCE if i in implementations and _why_unavailable(i, torch.device(device)) is None
            ]
            for device, implementations in self.table.items()
        }

    def _reason(self, impl: str, tensors: tuple[Tensor, ...]) -> str | None:
        device = tensors[0].device
        if impl not in self.table.get(device.type, {}):
            return f"{self.name} has no {impl} implementation on {device.type}"
        if impl == "native" and why_no_native(device):
            return why_no_native(device)
        if impl == "triton" and (reason := _triton.why_not(tensors[0].device)):
            return reason
        if impl == "triton" and not self.any_dtype and (reason := _triton.why_not_dtype(tensors[0].dtype)):
            return reason
        return self.why_not(impl, *tensors)

    def _auto_reason(self, impl: str, tensors: tuple[Tensor, ...]) -> str | None:
        """Why "auto" does not take it."""
        reason = self._reason(impl, tensors)
        if reason is None and impl == "triton" and tensors[0].device.type == "cpu":
            return "the interpreter of Triton is for tests, which ask for it by name"
        return reason

    def explain(self, *tensors: Tensor) -> Explanation:
        reasons = {impl: self._auto_reason(impl, tensors) for impl in PREFERENCE}
        chosen = next((impl for impl in PREFERENCE if reasons[impl] is None), None)
        device = tensors[0].device.type
        if chosen is None:
            raise ValueError(f"{self.name}: nothing implements it on {device}: {reasons['reference']}")
        return Explanation(self.name, device, chosen, {i: r for i, r in reasons.items() if i != chosen and r})

    def resolve(self, impl: str, *tensors: Tensor) -> str:
        """A concrete implementation. A wanted one that cannot run is an error that names those that can."""
        if impl == "auto":
            for name in PREFERENCE:
                if self._auto_reason(name, tensors) is None:
                    return name
            self.explain(*tensors)  # raises
        reason = self._reason(impl, tensors) if impl in PREFERENCE else "no such implementation"
        if reason is not None:
            usable = [i for i in PREFERENCE if self._reason(i, tensors) is None]
            raise ValueError(
                f"{self.name}: impl={impl!r} cannot run here: {reason}; usable: {', '.join(usable) or 'none'}"
            )
        return impl


def _why_unavailable(impl: str, device: torch.device) -> str | None:
    if impl == "triton":
        return "interpreted" if device.type == "cpu" else _triton.why_not(device)
    return why_no_native(device) if impl == "native" else None


def define(schema: str, table: Table, fake: Callable) -> Callable:
    """Registers the pure op `schema`, whose last argument is `str impl`, and returns it ready to call with positional arguments."""
    name = LIBRARY.define(schema)
    for device, implementations in table.items():
        LIBRARY.impl(name, _by_name(name, implementations), KEYS[device])
    torch.library.register_fake(f"stackbert::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.stackbert, name).default


def autograd(name: str, setup: Callable, backward: Callable) -> None:
    torch.library.register_autograd(f"stackbert::{name}", backward, setup_context=setup, lib=LIBRARY)


def _by_name(op: str, implementations: dict[str, Callable]) -> Callable:
    def kernel(*arguments):
        *tensors, impl = arguments
        if impl not in implementations:
            raise ValueError(f"{op}: impl must be one of {', '.join(implementations)}, got {impl!r}")
        return implementations[impl](*tensors)

    return kernel


def only_dtypes(impl: str, tensor: Tensor) -> str | None:
    """The why_not of an op whose native kernels take float32 and bfloat16, on a GPU float16 too."""
    taken = ("float32", "bfloat16", "float16") if tensor.is_cuda else ("float32", "bfloat16")
    given = str(tensor.dtype).removeprefix("torch.")
    if impl == "native" and given not in taken:
        return f"native takes {', '.join(taken[:-1])} and {taken[-1]}, got {given}"
    return None


def empty_like(x: Tensor) -> Tensor:
    """What a native kernel writes a result to: dense. Large ones are put on huge pages where the system has them: the page faults of a
    fresh buffer cost more than the kernel that fills it."""
    return _on_huge_pages(torch.empty_like(x, memory_format=torch.contiguous_format))


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same on the CPU for a result that is like no argument."""
    return _on_huge_pages(torch.empty(shape, dtype=dtype))


def _on_huge_pages(y: Tensor) -> Tensor:
    if y.nbytes >= HUGE_PAGES_FROM and y.device.type == "cpu":
        _C.advise_huge_pages(y.data_ptr(), y.nbytes)
    return y


def launch(function: str, x: Tensor, /, **arguments) -> None:
    """A function of the compiled module that launches CUDA kernels, on x's device and torch's current stream there."""
    stream = torch.cuda.current_stream(x.device).cuda_stream
    getattr(_C, function)(**arguments, device=x.device.index, stream=stream)


def ask(function: str, x: Tensor, /, **arguments) -> int:
    """A function of the compiled module that answers for x's device: how large a workspace has to be, say."""
    return getattr(_C, function)(**arguments, device=x.device.index)


def as_float32(parameter: Tensor) -> Tensor:
    """Dense float32: how native kernels take [C] parameters of either dtype. The caller keeps it alive while its address is used."""
    return parameter.float().contiguous()
