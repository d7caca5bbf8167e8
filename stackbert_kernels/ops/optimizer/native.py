"""AdamW, LAMB, LANS and the global norm by csrc/optimizer."""

from collections.abc import Callable

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C
from stackbert_kernels.ops.optimizer import segments

BLOCK = 2048  # elements: kAdamWElements of csrc/optimizer/optimizer.h
PART_BLOCK = 2048  # kPartElements of csrc/optimizer/layerwise.h
NORM_BLOCK = 4096  # kNormElements of optimizer.h

NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "max_norm")
SCALARS = ("norm", "scale", "found_inf")


def _options(scalars: list[Tensor | None], numbers: list[float], skipped: Tensor | None) -> dict[str, float | int]:
    """Numbers as they are, tensors by their addresses."""
    addresses = {name: 0 if s is None else s.data_ptr() for name, s in zip(SCALARS, scalars, strict=True)}
    return (
        dict(zip(NUMBERS, numbers, strict=True)) | addresses | {"skipped": 0 if skipped is None else skipped.data_ptr()}
    )


def _regions(weights, grads, exp_avg, exp_avg_sq, steps, copies, decay) -> list[tuple[int, ...]]:
    tensors = zip(weights, grads, exp_avg, exp_avg_sq, steps, copies or [None] * len(weights), decay, strict=True)
    return [
        (
            w.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), t.data_ptr(), 0 if c is None else c.data_ptr(),
            t.numel(), w.numel() // max(1, t.numel()), d,
        )
        for w, g, m, v, t, c, d in tensors
    ]  # fmt: skip


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    skipped: Tensor | None,
    decay: list[int],
    scalars: list[Tensor | None],
    numbers: list[float],
) -> None:
    grads = [g.contiguous() for g in grads]
    scalars = [None if s is None else s.float() for s in scalars]
    _C.adamw(
        regions=_regions(weights, grads, exp_avg, exp_avg_sq, steps, copies, decay),
        **_options(scalars, numbers, skipped),
        threads=torch.get_num_threads(),
    )


def adamw_cuda_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    skipped: Tensor | None,
    decay: list[int],
    scalars: list[Tensor | None],
    numbers: list[float],
) -> None:
    grads = [g.contiguous() for g in grads]
    scalars = [None if s is None else s.float() for s in scalars]
    table, lines = segments.tables(weights, grads, exp_avg, exp_avg_sq, copies, steps, decay, BLOCK)
    factors = weights[0].new_empty(2 + 2 * len(table))
    library.launch(
        "adamw_cuda",
        weights[0],
        table=table.data_ptr(),
        lines=lines.data_ptr(),
        factors=factors.data_ptr(),
        rows=len(table),
        blocks=len(lines),
        elements=BLOCK,
        **_options(scalars, numbers, skipped),
    )


def global_norm(tensors: list[Tensor]) -> Tensor:
    tensors, norm = [t.contiguous() for t in tensors], torch.empty((), dtype=torch.float32)
    _C.global_norm(
        tensors=[(t.data_ptr(), t.numel()) for t in tensors], norm=norm.data_ptr(), threads=torch.get_num_threads()
    )
    return norm


def global_norm_cuda(tensors: list[Tensor]) -> Tensor:
    tensors = [t.contiguous() for t in tensors]
    table, lines = segments.norm_tables(tensors, NORM_BLOCK)
    norm, partials = tensors[0].new_empty(()), tensors[0].new_empty(len(lines))
    library.launch(
        "global_norm_cuda",
        tensors[0],
        table=table.data_ptr(),
        lines=lines.data_ptr(),
        partials=partials.data_ptr(),
        norm=norm.data_ptr(),
        blocks=len(lines),
        elements=NORM_BLOCK,
    )
    return norm


def _layerwise(op: str) -> Callable[..., None]:
    def step(
        weights: list[Tensor],
        grads: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        steps: list[Tensor],
        copies: list[Tensor],
        skipped: Tensor | None,
        decay: list[int],
        parts: list[int],
        scalars: list[Tensor | None],
        numbers: list[float],
    ) -> None:
        grads = [g.contiguous() for g in grads]
        scalars = [None if s is None else s.float() for s in scalars]
        getattr(_C, op.rstrip("_"))(
            regions=_regions(weights, grads, exp_avg, exp_avg_sq, steps, copies, decay),
            parts=segments.parts_of(op, weights, steps, parts),
            **_options(scalars, numbers, skipped),
            threads=torch.get_num_threads(),
        )

    return step


def _layerwise_cuda(op: str) -> Callable[..., None]:
    def step(
        weights: list[Tensor],
        grads: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        steps: list[Tensor],
        copies: list[Tensor],
        skipped: Tensor | None,
        decay: list[int],
        parts: list[int],
        scalars: list[Tensor | None],
        numbers: list[float],
    ) -> None:
        grads = [g.contiguous() for g in grads]
        scalars = [None if s is None else s.float() for s in scalars]
        sizes = segments.parts_of(op, weights, steps, parts)
        table, lines = segments.part_tables(
            weights, grads, exp_avg, exp_avg_sq, copies, steps, decay, sizes, PART_BLOCK
        )
        factors, partials = weights[0].new_empty(8 * len(table)), weights[0].new_empty(3 * len(lines))
        library.launch(
            f"{op}cuda",
            weights[0],
            table=table.data_ptr(),
            lines=lines.data_ptr(),
            factors=factors.data_ptr(),
            partials=partials.data_ptr(),
            parts=len(table),
            blocks=len(lines),
            elements=PART_BLOCK,
            **_options(scalars, numbers, skipped),
        )

    return step


lamb_, lamb_cuda_ = _layerwise("lamb_"), _layerwise_cuda("lamb_")
lans_, lans_cuda_ = _layerwise("lans_"), _layerwise_cuda("lans_")
