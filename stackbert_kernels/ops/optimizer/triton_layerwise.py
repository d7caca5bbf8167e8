"""LAMB and LANS in Triton, by the launches of csrc/optimizer/layerwise.h: (LANS: squares of gradients,) a program for each part that
prepares, moments with the squares of each block, a program for each part that adds those up, and what moves the weights.

An element moves 40 bytes (LANS: 48), 16 in an access of a thread. What each program works on is in segments.part_tables.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from stackbert_kernels.ops import _triton
from stackbert_kernels.ops.optimizer import segments
from stackbert_kernels.ops.optimizer.triton_step import at, counted, decided, power, squares_kernel, total

_W, _G, _M, _V, _C, _T = (tl.constexpr(f) for f in segments.ADDRESSES)
_SIZE, _FLAGS, _FIRST, _WIDE, _FIELDS = (tl.constexpr(f) for f in (*segments.SIZES, segments.FIELDS))
_ADAPTED, _COUNTS = tl.constexpr(segments.ADAPTED), tl.constexpr(segments.COUNTS)


@triton.jit(do_not_specialize=["max_norm", "eps"])
def prepare_kernel(
    table_ptr,  # [parts, FIELDS]
    partials_ptr,  # [blocks], of LANS
    norm_ptr,  # scalars, or None: 0, 1, 0
    scale_ptr,
    found_inf_ptr,
    skipped_ptr,  # [2] or None
    factors_ptr,  # [8 parts]: of the gradient, 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t), whether the step is skipped; r's and c's
    parts,
    max_norm,
    eps,
    BETA1: tl.constexpr,  # constants, because float32 is not enough for 1 - beta^t
    BETA2: tl.constexpr,
    LANS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program for each part, or one. The row's step is counted by add_up_kernel: here its parts read it."""
    part = tl.program_id(0).to(tl.int64)
    taken, factor = decided(norm_ptr, scale_ptr, found_inf_ptr, max_norm)
    if part == 0:
        counted(skipped_ptr, taken)
    if part >= parts:
        return
    line = table_ptr + part * _FIELDS
    if LANS:
        blocks = (tl.load(line + _SIZE) + ELEMENTS - 1) // ELEMENTS
        squares = total(partials_ptr + tl.load(line + _FIRST), blocks, BLOCKS)
        norm = tl.sqrt(squares).to(tl.float32) * factor
        factor = tl.where(norm > 0.0, tl.div_rn(factor, norm + eps), factor)
    step_ptr = tl.load(line + _T).to(tl.pointer_type(tl.float32))
    n = tl.load(step_ptr + tl.arange(0, 1)).to(tl.int64) + 1
    correction1 = 1.0 - power(tl.full((1,), BETA1, tl.float64), n)
    correction2 = 1.0 - power(tl.full((1,), BETA2, tl.float64), n)
    own = factors_ptr + 8 * part + tl.arange(0, 1)
    tl.store(own, factor)
    tl.store(own + 1, (1.0 / correction1).to(tl.float32))
    tl.store(own + 2, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(own + 3, tl.where(taken, 0.0, 1.0))


@triton.jit
def _load(line, FIELD: tl.constexpr, i, inside, WIDE: tl.constexpr):
    p = at(tl.load(line + FIELD), i, WIDE)
    return tl.load(p) if WIDE else tl.load(p, mask=inside, other=0.0)


@triton.jit
def _moments(line, own, first, decay, beta1, rest1, beta2, rest2, eps, ELEMENTS: tl.constexpr, LANS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """New moments of elements first .. first + ELEMENTS - 1 of a part; the squares of w, r and c. WIDE: all are there, for 16-byte
    accesses."""
    i = first + tl.arange(0, ELEMENTS)
    inside = i < tl.load(line + _SIZE)
    g = _load(line, _G, i, inside, WIDE) * tl.load(own)
    m = _load(line, _M, i, inside, WIDE) * beta1 + g * rest1
    v = _load(line, _V, i, inside, WIDE) * beta2 + g * g * rest2
    w = _load(line, _W, i, inside, WIDE)
    tl.store(at(tl.load(line + _M), i, WIDE), m, mask=None if WIDE else inside)
    tl.store(at(tl.load(line + _V), i, WIDE), v, mask=None if WIDE else inside)
    down = tl.sqrt_rn(v) * tl.load(own + 2) + eps
    r = tl.div_rn(m * tl.load(own + 1), down) + w * decay
    c = w * decay
    if LANS:
        c += tl.div_rn(g, down)
    return w * w, r * r, c * c


@triton.jit(do_not_specialize=["blocks", "decay", "beta1", "rest1", "beta2", "rest2", "eps"])
def moments_kernel(
    table_ptr,
    lines_ptr,  # [programs]: the part that each works on
    factors_ptr,
    partials_ptr,  # [3, blocks]
    blocks,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    LANS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PART: tl.constexpr,  # an element for each thread
):
    part = tl.load(lines_ptr + tl.program_id(0)).to(tl.int64)
    own = factors_ptr + 8 * part
    if tl.load(own + 3) != 0.0:
        return
    line = table_ptr + part * _FIELDS
    block = tl.program_id(0) - tl.load(line + _FIRST)
    first = block * ELEMENTS
    decay = tl.where(tl.load(line + _FLAGS) % 2 == _ADAPTED, decay, 0.0)
    to = partials_ptr + tl.program_id(0)
    if block < tl.load(line + _WIDE):
        w, r, c = _moments(line, own, first, decay, beta1, rest1, beta2, rest2, eps, ELEMENTS, LANS, True)
        tl.store(to, tl.sum(w, 0))
        tl.store(to + blocks, tl.sum(r, 0))
        if LANS:
            tl.store(to + 2 * blocks, tl.sum(c, 0))
    else:  # the end of a part: little at a time takes no registers from the others
        ws, rs, cs = tl.zeros((PART,), tl.float32), tl.zeros((PART,), tl.float32), tl.zeros((PART,), tl.float32)
        end = tl.minimum(first + ELEMENTS, tl.load(line + _SIZE))
        while first < end:
            w, r, c = _moments(line, own, first, decay, beta1, rest1, beta2, rest2, eps, PART, LANS, False)
            ws += w
            rs += r
            cs += c
            first += PART
        tl.store(to, tl.sum(ws, 0))
        tl.store(to + blocks, tl.sum(rs, 0))
        if LANS:
            tl.store(to + 2 * blocks, tl.sum(cs, 0))


@triton.jit
def _ratio(adapted, weights, x):
    """|w| / |x| of their squares."""
    defined = adapted & (weights > 0.0) & (x > 0.0)
    return tl.where(defined, tl.sqrt(weights) / tl.sqrt(tl.where(defined, x, 1.0)), 1.0)


@triton.jit(do_not_specialize=["blocks", "of_r", "of_c"])
def add_up_kernel(
    table_ptr,
    factors_ptr,
    partials_ptr,
    blocks,
    of_r,  # lr, or its shares
    of_c,
    LANS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    own = factors_ptr + 8 * part
    if tl.load(own + 3) != 0.0:
        return
    line = table_ptr + part * _FIELDS
    flags, count = tl.load(line + _FLAGS), (tl.load(line + _SIZE) + ELEMENTS - 1) // ELEMENTS
    first, adapted = partials_ptr + tl.load(line + _FIRST), flags % 2 == _ADAPTED
    weights = total(first, count, BLOCKS)
    tl.store(own + 4, (of_r * _ratio(adapted, weights, total(first + blocks, count, BLOCKS))).to(tl.float32))
    if LANS:
        tl.store(own + 5, (of_c * _ratio(adapted, weights, total(first + 2 * blocks, count, BLOCKS))).to(tl.float32))
    if flags >= _COUNTS:
        step_ptr = tl.load(line + _T).to(tl.pointer_type(tl.float32))
        tl.store(step_ptr, tl.load(step_ptr) + 1.0)


@triton.jit
def _apply(line, own, first, decay, eps, ELEMENTS: tl.constexpr, LANS: tl.constexpr, COPIES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    i = first + tl.arange(0, ELEMENTS)
    inside = i < tl.load(line + _SIZE)
    w, m = _load(line, _W, i, inside, WIDE), _load(line, _M, i, inside, WIDE)
    down = tl.sqrt_rn(_load(line, _V, i, inside, WIDE)) * tl.load(own + 2) + eps
    change = (tl.div_rn(m * tl.load(own + 1), down) + w * decay) * tl.load(own + 4)
    if LANS:
        g = _load(line, _G, i, inside, WIDE) * tl.load(own)
        change += (tl.div_rn(g, down) + w * decay) * tl.load(own + 5)
    w = w - change
    tl.store(at(tl.load(line + _W), i, WIDE), w, mask=None if WIDE else inside)
    if COPIES:
        tl.store(at(tl.load(line + _C), i, WIDE, tl.bfloat16), w.to(tl.bfloat16), mask=None if WIDE else inside)


@triton.jit(do_not_specialize=["decay", "eps"])
def apply_kernel(
    table_ptr,
    lines_ptr,
    factors_ptr,
    decay,
    eps,
    LANS: tl.constexpr,
    COPIES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PART: tl.constexpr,
):
    part = tl.load(lines_ptr + tl.program_id(0)).to(tl.int64)
    own = factors_ptr + 8 * part
    if tl.load(own + 3) != 0.0:
        return
    line = table_ptr + part * _FIELDS
    block = tl.program_id(0) - tl.load(line + _FIRST)
    first = block * ELEMENTS
    decay = tl.where(tl.load(line + _FLAGS) % 2 == _ADAPTED, decay, 0.0)
    if block < tl.load(line + _WIDE):
        _apply(line, own, first, decay, eps, ELEMENTS, LANS, COPIES, True)
    else:
        end = tl.minimum(first + ELEMENTS, tl.load(line + _SIZE))
        while first < end:
            _apply(line, own, first, decay, eps, PART, LANS, COPIES, False)
            first += PART


ELEMENTS, WARPS, BLOCKS = 1024, 4, 256  # of a program; as adamw_'s
PART_FIELDS = {"FIELDS": segments.FIELDS, "ADDRESS": 1, "SIZE": 6, "FIRST": 8}
SIZES = {"ELEMENTS": ELEMENTS, "PART": 32 * WARPS}


def _step(
    op: str,
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
    lr, beta1, beta2, eps, weight_decay, max_norm = numbers
    lans, device = op == "lans_", weights[0].device
    norm, scale, found_inf = (None if s is None else s.float() for s in scalars)
    sizes = segments.parts_of(op, weights, steps, parts)
    with _triton.on(device):
        grads = [g.contiguous() for g in grads]
        table, lines = segments.part_tables(weights, grads, exp_avg, exp_avg_sq, copies, steps, decay, sizes, ELEMENTS)
        count, blocks = len(table), len(lines)
        factors = torch.empty(8 * count, device=device)
        partials = torch.empty(3 * blocks, device=device)
        if lans and blocks:
            squares_kernel[(blocks,)](table, lines, partials, ELEMENTS=ELEMENTS, **PART_FIELDS, num_warps=WARPS)
        prepare_kernel[(max(1, count),)](
            table, partials, norm, scale, found_inf, skipped, factors, count, max_norm, eps,
            BETA1=beta1, BETA2=beta2, LANS=lans, ELEMENTS=ELEMENTS, BLOCKS=BLOCKS, num_warps=WARPS,
        )  # fmt: skip
        if not count:
            return
        if blocks:
            moments_kernel[(blocks,)](
                table, lines, factors, partials, blocks, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
                LANS=lans, **SIZES, num_warps=WARPS,
            )  # fmt: skip
        add_up_kernel[(count,)](
            table, factors, partials, blocks, lr * beta1 if lans else lr, lr * (1 - beta1),
            LANS=lans, ELEMENTS=ELEMENTS, BLOCKS=BLOCKS, num_warps=WARPS,
        )  # fmt: skip
        if blocks:
            apply_kernel[(blocks,)](
                table, lines, factors, weight_decay, eps, LANS=lans, COPIES=bool(copies), **SIZES, num_warps=WARPS
            )


lamb_, lans_ = functools.partial(_step, "lamb_"), functools.partial(_step, "lans_")


def compilations(arch: int) -> list[_triton.Compilation]:
    table = {"table_ptr": "*i64:16", "factors_ptr": "*fp32:16"}
    partials = {"partials_ptr": "*fp32:16"}
    scalars = dict.fromkeys(("norm_ptr", "found_inf_ptr", "skipped_ptr"), "*fp32:16")
    betas = dict.fromkeys(("beta1", "rest1", "beta2", "rest2"), "fp32")
    over = {"lines_ptr": "*i32:16", "decay": "fp32", "eps": "fp32"}
    found = []
    for lans in (False, True):
        op, own, reduced = "lans" if lans else "lamb", {"LANS": lans}, {"ELEMENTS": ELEMENTS, "BLOCKS": BLOCKS}
        found += [
            _triton.Compilation(
                f"{op} moments",
                moments_kernel,
                table | partials | over | betas | {"blocks": "i32"},
                own | SIZES,
                num_warps=WARPS,
                max_registers=80,
                max_narrow=48,  # of the table and the factors; of the ends of parts
            ),
            _triton.Compilation(
                f"{op} apply",
                apply_kernel,
                table | over,
                own | SIZES | {"COPIES": True},
                num_warps=WARPS,
                max_registers=80,
                max_narrow=48,
            ),
            _triton.Compilation(
                f"{op} prepare",
                prepare_kernel,
                table | partials | scalars | {"parts": "i32", "max_norm": "fp32", "eps": "fp32"},
                own | reduced | {"scale_ptr": None, "BETA1": 0.9, "BETA2": 0.999},
                num_warps=WARPS,
                max_narrow=32,
            ),
            _triton.Compilation(
                f"{op} add up",
                add_up_kernel,
                table | partials | {"blocks": "i32", "of_r": "fp32", "of_c": "fp32"},
                own | reduced,
                num_warps=WARPS,
                max_narrow=64,  # a number a load, several rounds of the loop at once
            ),
        ]
    return [
        *found,
        _triton.Compilation(
            "lans squares",
            squares_kernel,
            {"table_ptr": "*i64:16", "lines_ptr": "*i32:16"} | partials,
            {"ELEMENTS": ELEMENTS} | PART_FIELDS,
            num_warps=WARPS,
            max_registers=64,
            max_narrow=32,
        ),
    ]
