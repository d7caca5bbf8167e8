"""What every triton_kernel.py shares and what tells where Triton can run. Imports Triton only when a kernel is wanted.

`INTERPRETED`: TRITON_INTERPRET=1 was set when this was imported. Kernels then run on CPU tensors, in Python: slow, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from typing import TypeVar

import torch

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")  # what Triton is called in package indexes
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Configuration = TypeVar("Configuration")


@functools.cache
def version() -> str | None:
    """Of the installed Triton; None = not installed."""
    if util.find_spec("triton") is None:
        return None
    for distribution in DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of no known version"


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    """Of a GPU; the oldest that will do where there is none, for tensors that only claim to be on one."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else OLDEST_CAPABILITY


def why_not(device: torch.device | str) -> str | None:
    """Why Triton cannot run on this device, or None."""
    device = torch.device(device)
    wanted, found = ".".join(map(str, OLDEST)), version()
    if found is None:
        return f"Triton is not installed, wanted {wanted} or newer"
    if not _at_least(found, OLDEST):
        return f"wanted Triton {wanted} or newer, got {found}"
    if device.type == "cpu" and not INTERPRETED:
        return "Triton takes CPU tensors only under TRITON_INTERPRET=1, for tests"
    if device.type == "cuda" and capability(device.index) < OLDEST_CAPABILITY:
        major, minor = capability(device.index)
        return f"Triton wants a GPU of compute capability 8.0 (Ampere) or newer, got {major}.{minor}"
    return None


def why_not_dtype(dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"triton takes float32, bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    return None


def _at_least(found: str, wanted: tuple[int, ...]) -> bool:
    numbers = found.split("+")[0].split(".")[: len(wanted)]
    return all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) >= wanted


def configuration(table: Mapping[int, Configuration], device: torch.device) -> Configuration:
    """What is kept for this device's architecture."""
    return table[architecture(table, device)]


def architecture(table: Mapping[int, Configuration], device: torch.device) -> int:
    """The device's (80, 90, 100) or the nearest below it that the table has; the oldest in the interpreter."""
    if device.type != "cuda":
        return min(table)
    major, minor = capability(device.index)
    return max(arch for arch in table if arch <= 10 * major + minor)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """By how many programs a persistent kernel fills the device; 1 in the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches inside go to this device. Costs nothing where it is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def registers_of(warps: int) -> int:
    """A thread's registers where so many warps are to be on a multiprocessor at once; whole eights, as they are handed out."""
    return min(255, (1 << 16) // (32 * warps) // 8 * 8)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """[R, C] with the elements of a row side by side; rows may be any distance apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@dataclass(frozen=True)
class Compilation:
    """A kernel at a shape that BERT uses, to be compiled ahead of time, and what its machine code must look like.

    name           op, kernel, shape and dtype, for the table
    kernel         the @triton.jit function
    signature      {argument: type}, without constants: "*bf16", "i32", "fp32"; ":16" at the end = a multiple of 16 (of a pointer: of
                   16 bytes), as torch's allocations are; without it no load can be 128-bit; a tuple of types for a tuple
    constants      {argument: value} of the constexpr arguments, and of those that are None or 1
    maxnreg        what the compiler is told to keep to, as the launch does
    max_registers  a thread's; more would leave too few warps on an SM
    max_spills     instructions that store registers to local memory
    max_narrow     loads and stores of global memory of less than 128 bits: single numbers as seed and step, a row's statistics
    sass           {architecture: instructions that must appear, as "HGMMA"}
    without        {architecture: instructions that must not appear}
    """

    name: str
    kernel: object
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    max_registers: int = 255
    max_spills: int = 0
    max_narrow: int = 0
    sass: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    without: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
