"""Where the tests of this folder run: on a GPU (`pytest -m gpu`), and rehearsed on the CPU in every run of the suite, with stand-ins for
what only a GPU has. The rehearsal shows that the tests themselves work, and find faults, before they see a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.ops._library import PREFERENCE

SEES_GPU = torch.cuda.is_available()


class Cuda:
    kind = "cuda"
    repeats = 50  # of a test for determinism
    many = 1 << 31  # elements whose offsets do not fit into 32 bits

    @staticmethod
    def synchronize() -> None:
        torch.cuda.synchronize()

    @staticmethod
    @contextmanager
    def other_stream() -> Iterator[None]:
        """Its work comes after what is queued now, and before what is queued later; nothing else orders it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield
        torch.cuda.current_stream().wait_stream(side)

    @staticmethod
    def delay() -> None:
        """Keeps the current stream busy, longer than the host takes to queue a test's work."""
        torch.cuda._sleep(50_000_000)

    @classmethod
    def captured(cls, step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """The tensors that `step` returns, and what computes them anew from whatever its inputs then hold."""
        with cls.other_stream():  # before capture, as torch asks for: compiles kernels, fills caches
            for _ in range(2):
                step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        return outputs, graph.replay

    @staticmethod
    def free_bytes() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


class Rehearsal:
    """The CPU in the place of the GPU."""

    kind = "cpu"
    repeats = 2
    many = 1 << 11

    @staticmethod
    def synchronize() -> None:
        pass

    @staticmethod
    @contextmanager
    def other_stream() -> Iterator[None]:
        yield

    @staticmethod
    def delay() -> None:
        pass

    @staticmethod
    def captured(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        outputs = step()

        def replay() -> None:
            for kept, new in zip(outputs, step(), strict=True):
                kept.copy_(new)

        return outputs, replay

    @staticmethod
    def free_bytes() -> int:
        return 1 << 30


DEVICES = ((Rehearsal, ()), (Cuda, pytest.mark.gpu)) if SEES_GPU else ((Rehearsal, ()),)


def devices() -> list:
    """A test's parameter `device`."""
    return [pytest.param(device, id=device.kind, marks=marks) for device, marks in DEVICES]


def takes(op: str, impl: str, tensor: Tensor) -> str | None:
    """Why the implementation does not take such a tensor, as it says itself; None if it does."""
    try:
        next(o for o in ops.OPS if o.name == op).resolve(impl, tensor)
    except ValueError as reason:
        return str(reason)
    return None


def implementations(op: str, kind: str) -> list[str]:
    """On the CPU Triton's interpreter is one, which ops.available() does not offer."""
    if kind == "cuda":
        return ops.available()[op]["cuda"]
    return [impl for impl in PREFERENCE if takes(op, impl, torch.empty(2, 2)) is None]


def targets(*names: str) -> list:
    """The parameters `device, op, impl` of a test for each op (or those named) and each implementation of it that there is."""
    return [
        pytest.param(device, op, impl, marks=marks, id=f"{device.kind}-{op}-{impl}")
        for op in ops.available()
        for device, marks in DEVICES
        for impl in implementations(op, device.kind)
        if op in names or not names
    ]
