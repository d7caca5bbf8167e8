"""adamw_, lamb_, lans_: a step of AdamW, LAMB or LANS over all parameters of a model, in place, without a wait for the device;
global_norm: of its gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops.optimizer import native, reference
from stackbert_kernels.ops.optimizer.native import NUMBERS, SCALARS

triton = library.lazy("stackbert_kernels.ops.optimizer.triton_kernel", "adamw_")

TABLE = {
    "cpu": {"reference": reference.adamw_, "native": native.adamw_, "triton": triton},
    "cuda": {"reference": reference.adamw_, "native": native.adamw_cuda_, "triton": triton},
}


def _why_not(impl: str, weights: Tensor) -> str | None:
    if impl != "reference" and weights.dtype != torch.float32:
        return f"{impl} takes float32 weights, got {str(weights.dtype).removeprefix('torch.')}"
    return None


OP = library.Op("adamw_", TABLE, _why_not)

triton_lamb = library.lazy("stackbert_kernels.ops.optimizer.triton_layerwise", "lamb_")
LAMB_TABLE = {
    "cpu": {"reference": reference.lamb_, "native": native.lamb_, "triton": triton_lamb},
    "cuda": {"reference": reference.lamb_, "native": native.lamb_cuda_, "triton": triton_lamb},
}
LAMB = library.Op("lamb_", LAMB_TABLE, _why_not)
triton_lans = library.lazy("stackbert_kernels.ops.optimizer.triton_layerwise", "lans_")
LANS_TABLE = {
    "cpu": {"reference": reference.lans_, "native": native.lans_, "triton": triton_lans},
    "cuda": {"reference": reference.lans_, "native": native.lans_cuda_, "triton": triton_lans},
}
LANS = library.Op("lans_", LANS_TABLE, _why_not)

triton_norm = library.lazy("stackbert_kernels.ops.optimizer.triton_kernel", "global_norm")
NORM_TABLE = {
    "cpu": {"reference": reference.global_norm, "native": native.global_norm, "triton": triton_norm},
    "cuda": {"reference": reference.global_norm, "native": native.global_norm_cuda, "triton": triton_norm},
}
NORM = library.Op("global_norm", NORM_TABLE, _why_not)


def _check(op, weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, scalars, numbers) -> None:
    """Written out, for it runs each step on a hundred tensors."""
    if not weights:
        raise ValueError(f"{op}: weights must name at least one tensor, got none")
    like = {
        "weights": weights,
        "grads": grads,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "copies": copies or weights,
    }
    for name, given in {**like, "steps": steps, "decay": decay}.items():
        if len(given) != len(weights):
            raise ValueError(f"{op}: {name} must have {len(weights)} entries as weights, got {len(given)}")
    dtype, device = weights[0].dtype, weights[0].device
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: weights must be floating point, got {dtype}")
    shapes = [w.shape for w in weights]
    for name, given in like.items():
        dense, wanted = name != "grads", torch.bfloat16 if given is copies else dtype
        for i, t in enumerate(given):
            if t.dtype != wanted or t.shape != shapes[i] or t.device != device or (dense and not t.is_contiguous()):
                raise _refused(op, f"{name}[{i}]", t, wanted, shapes[i], device)
    for i, t in enumerate(steps):
        rows = shapes[i][: t.dim()]
        if t.dim() > 1 or t.dtype != torch.float32 or t.shape != rows or t.device != device or not t.is_contiguous():
            raise _refused(op, f"steps[{i}]", t, torch.float32, shapes[i][:1], device)
        size = weights[i].numel() // max(1, t.numel())
        if not 0 <= decay[i] <= size:
            raise ValueError(f"{op}: decay[{i}] must be in 0..{size}, the elements of a row, got {decay[i]}")
    for name, scalar in zip(SCALARS, scalars, strict=True):
        if scalar is not None and (scalar.dim() or not scalar.is_floating_point() or scalar.device != device):
            raise ValueError(f"{op}: {name} must be a floating point scalar on {device}, got {_described(scalar)}")
    if skipped is not None:
        fits = skipped.dtype == torch.float32 and skipped.shape == (2,) and skipped.device == device
        if not fits or not skipped.is_contiguous():
            raise _refused(op, "skipped", skipped, torch.float32, (2,), device)
    for name, number in zip(NUMBERS, numbers, strict=True):
        if not 0.0 <= number < (1.0 if name.startswith("beta") else math.inf):
            raise ValueError(f"{op}: {name} must be in [0, {1 if name.startswith('beta') else 'inf'}), got {number}")


def _refused(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> Exception:
    if tensor.dtype != dtype:
        return TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        return ValueError(f"{op}: {name} must be {list(shape)} on {device}, got {_described(tensor)}")
    return ValueError(f"{op}: {name} must be dense, got {_described(tensor)} with strides {list(tensor.stride())}")


def _refuse_grad(op: str, changed: list[list[Tensor]]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for tensors in changed for t in tensors):
        raise ValueError(f"{op}: what it changes must not require grad; or call it under torch.no_grad()")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


# Not Library.impl: only custom_op(mutates_args=...) raises the version counters. Few arguments: torch spends their square.
@torch.library.custom_op(
    "stackbert::adamw_",
    mutates_args=("weights", "exp_avg", "exp_avg_sq", "steps", "copies", "skipped"),
    schema="(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, Tensor(f!)? skipped, int[] decay, Tensor?[] scalars, float[] numbers, str impl) -> ()",
)
def _adamw_(weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, scalars, numbers, impl) -> None:
    TABLE[weights[0].device.type][impl](
        weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, scalars, numbers
    )


@_adamw_.register_fake
def _(weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, scalars, numbers, impl) -> None:
    _check("adamw_", weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, scalars, numbers)


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    decay: Sequence[int],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    impl: str = "auto",
) -> None:
    """One step of Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), as torch.optim.AdamW takes it.

        weights        tensors of one floating dtype (float32 but for the reference), each dense
        grads          their gradients, of the same dtype; read, never changed
        exp_avg, exp_avg_sq   Adam's moments, like the weights
        steps          float32; a scalar: the tensor counts its steps as one; or [L]: it is [L, ...], and each row counts its own
        decay          so many elements at the beginning of each row (of the tensor, if it counts as one) have weight decay
        norm           scalar, the norm of all gradients as they are; max_norm > 0 scales them to at most that, as torch's clip_grad_norm_
        scale          scalar that gradients and norm are multiplied with first, such as 1 / a loss scale; None = 1
        found_inf      scalar; anything but 0, NaN included, skips the step; None = 0
        skipped        [2] float32: counts the skipped steps, in all and in a row until now
        copies         bfloat16 tensors like the weights that get the new weights too; () = none

    A step is skipped where norm * scale is not finite, too: then nothing changes but `skipped`. That is decided on the device. Each
    element is read and written once: 28 bytes. Tensors that require grad are refused unless gradients are off.

    Before:
        torch.nn.utils.clip_grad_norm_(weights, max_norm)
        torch.optim.AdamW(weights, lr=lr, weight_decay=0.01).step()
    After:
        grads = [w.grad for w in weights]
        exp_avg, exp_avg_sq = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        steps, decay = [torch.zeros(()) for w in weights], [w.numel() for w in weights]
        with torch.no_grad():
            norm = sbk.ops.global_norm(grads)
            sbk.ops.adamw_(weights, grads, exp_avg, exp_avg_sq, steps, decay, lr=lr, norm=norm, max_norm=max_norm)
    """
    changed = [list(t) for t in (weights, exp_avg, exp_avg_sq, steps, copies)]
    weights, exp_avg, exp_avg_sq, steps, copies = changed
    scalars, numbers = [norm, scale, found_inf], [lr, beta1, beta2, eps, weight_decay, max_norm]
    arguments = (weights, list(grads), exp_avg, exp_avg_sq, steps, copies, skipped, list(decay), scalars, numbers)
    _check("adamw_", *arguments)
    _refuse_grad("adamw_", changed)
    _adamw_(*arguments, OP.resolve(impl, weights[0]))


LEAST_EPS = 1e-30  # well above 0 in float32: where all gradients were zero, 0 / eps must be 0


def _define_layerwise(op: str, table: library.Table):
    """lamb_ and lans_: arguments as of adamw_, and `parts`, the sizes of all parts of a row of each tensor, one after another."""

    @torch.library.custom_op(
        f"stackbert::{op}",
        mutates_args=("weights", "exp_avg", "exp_avg_sq", "steps", "copies", "skipped"),
        schema="(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] steps, "
        "Tensor(e!)[] copies, Tensor(f!)? skipped, int[] decay, int[] parts, Tensor?[] scalars, float[] numbers, str impl) -> ()",
    )
    def step(weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, parts, scalars, numbers, impl) -> None:
        table[weights[0].device.type][impl](
            weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, parts, scalars, numbers
        )

    @step.register_fake
    def _(weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, parts, scalars, numbers, impl) -> None:
        _check(op, weights, grads, exp_avg, exp_avg_sq, steps, copies, skipped, decay, scalars, numbers)

    return step


_lamb_, _lans_ = _define_layerwise("lamb_", LAMB_TABLE), _define_layerwise("lans_", LANS_TABLE)


def _flat_parts(
    op: str, weights: list[Tensor], steps: list[Tensor], decay: list[int], parts: Sequence[Sequence[int]] | None
) -> list[int]:
    sizes = [w.numel() // max(1, t.numel()) for w, t in zip(weights, steps, strict=True)]
    parts = [[size] for size in sizes] if parts is None else parts
    if len(parts) != len(sizes):
        raise ValueError(f"{op}: parts must have {len(sizes)} entries as weights, got {len(parts)}")
    for i, (size, row, decays) in enumerate(zip(sizes, parts, decay, strict=True)):
        if sum(row) != size or any(part < 1 for part in row if size):
            raise ValueError(
                f"{op}: parts[{i}] must be sizes that sum to {size}, the elements of a row, got {list(row)}"
            )
        begins = [0, *itertools.accumulate(row)]
        if decays not in begins:
            raise ValueError(
                f"{op}: decay[{i}] must be where a part begins or the last one ends, {begins}, got {decays}"
            )
    return [part for size, row in zip(sizes, parts, strict=True) if size for part in row]


def _layerwise(op: library.Op, step, changed, grads, skipped, decay, parts, scalars, numbers, impl: str) -> None:
    weights, exp_avg, exp_avg_sq, steps, copies = changed = [list(t) for t in changed]
    before, after = (weights, list(grads), exp_avg, exp_avg_sq, steps, copies, skipped, list(decay)), (scalars, numbers)
    _check(op.name, *before, *after)
    if not numbers[NUMBERS.index("eps")] >= LEAST_EPS:
        raise ValueError(f"{op.name}: eps must be at least {LEAST_EPS:g}, got {numbers[NUMBERS.index('eps')]}")
    flat = _flat_parts(op.name, weights, steps, before[-1], parts)
    _refuse_grad(op.name, changed)
    step(*before, flat, *after, op.resolve(impl, weights[0]))


def lamb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    decay: Sequence[int],
    parts: Sequence[Sequence[int]] | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    impl: str = "auto",
) -> None:
    """One step of LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2): Adam's direction with decoupled weight decay inside,
    m / (sqrt(v) + eps) + weight_decay w with bias-corrected moments, scaled for each part by its trust ratio: the norm of w over that of
    the direction, 1 where either is zero. phi of the paper is the identity.

        parts     for each of weights the sizes of its parts, the parameters of the model in a row of it (in the tensor, if it counts its
                  steps as one) one after another; None: each is one part. Every row's part has a trust ratio of its own.
        decay     as of adamw_, and a multiple of whole parts: those have weight decay and a trust ratio, what follows them (our
                  choice: biases and norms) has neither and takes Adam's step
        eps       at least 1e-30

    All else is as of adamw_, the skipped step included. Norms are deterministic sums on the device. An element moves 40 bytes.

    Before:
        with torch.no_grad():
            for w in weights:  # a first step: the corrected moments are the gradient and its square
                direction = w.grad / (w.grad.abs() + 1e-6) + 0.01 * w
                w -= lr * w.norm() / direction.norm() * direction
    After:
        grads = [w.grad for w in weights]
        exp_avg, exp_avg_sq = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        steps, decay = [torch.zeros(()) for w in weights], [w.numel() for w in weights]
        with torch.no_grad():
            sbk.ops.lamb_(weights, grads, exp_avg, exp_avg_sq, steps, decay, lr=lr)
    """
    _layerwise(
        LAMB, _lamb_, (weights, exp_avg, exp_avg_sq, steps, copies), grads, skipped, decay, parts, [norm, scale, found_inf],
        [lr, beta1, beta2, eps, weight_decay, max_norm], impl,
    )  # fmt: skip


def lans_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    decay: Sequence[int],
    parts: Sequence[Sequence[int]] | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    norm: Tensor | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    impl: str = "auto",
) -> None:
    """One step of LANS (Zheng et al. 2020, arXiv 2006.13484): each part's gradient is divided by its norm + eps (not where that is 0)
    before the moments see it; the step is beta1 times LAMB's, which follows the mean of gradients, plus (1 - beta1) times one that
    follows the gradient itself, each with a trust ratio of its own.

    Arguments as of lamb_; there is no clipping, because the length of a gradient does not matter. `norm` only decides whether the step is
    taken. Parts behind `decay` have their gradients normalised too, but neither weight decay nor trust ratio: our choice, the paper's code
    has the ratio for all. An element moves 48 bytes.

    Before:
        with torch.no_grad():
            for w in weights:  # a first step: mean and gradient are the same, so both terms are
                g = w.grad / (w.grad.norm() + 1e-6)
                direction = g / (g.abs() + 1e-6) + 0.01 * w
                w -= lr * w.norm() / direction.norm() * direction
    After:
        grads = [w.grad for w in weights]
        exp_avg, exp_avg_sq = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        steps, decay = [torch.zeros(()) for w in weights], [w.numel() for w in weights]
        with torch.no_grad():
            sbk.ops.lans_(weights, grads, exp_avg, exp_avg_sq, steps, decay, lr=lr)
    """
    _layerwise(
        LANS, _lans_, (weights, exp_avg, exp_avg_sq, steps, copies), grads, skipped, decay, parts, [norm, scale, found_inf],
        [lr, beta1, beta2, eps, weight_decay, 0.0], impl,
    )  # fmt: skip


def _check_norm(tensors: list[Tensor]) -> None:
    if not tensors:
        raise ValueError("global_norm: tensors must name at least one tensor, got none")
    dtype, device = tensors[0].dtype, tensors[0].device
    if not dtype.is_floating_point:
        raise TypeError(f"global_norm: tensors must be floating point, got {dtype}")
    for i, t in enumerate(tensors):
        if t.dtype != dtype or t.device != device:
            raise ValueError(
                f"global_norm: tensors[{i}] must be {dtype} on {device} as tensors[0], got {_described(t)}"
            )


def _norm_fake(tensors: list[Tensor], impl: str) -> Tensor:
    _check_norm(tensors)
    return tensors[0].new_empty((), dtype=torch.promote_types(tensors[0].dtype, torch.float32))


_global_norm = library.define("global_norm(Tensor[] tensors, str impl) -> Tensor", NORM_TABLE, _norm_fake)


def global_norm(tensors: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """The norm of all elements of all tensors together: adamw_'s `norm`, and by it the check that gradients are finite.

        tensors   one floating dtype and device (float32 but for the reference)
        returns   scalar, float32 (float64 of float64); inf or NaN where an element is, or where squares overflow float32

    Deterministic; without a wait for the device. Has no gradient.

    Before:
        norm = torch.stack([t.norm() for t in tensors]).norm()
    After:
        norm = sbk.ops.global_norm(tensors)
    """
    tensors = list(tensors)
    _check_norm(tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            "global_norm: tensors must not require grad, for it has no gradient; or call it under torch.no_grad()"
        )
    return _global_norm(tensors, NORM.resolve(impl, tensors[0]))
