"""Attention in Triton: tile sizes, launches, and what is compiled ahead of time. The kernels: triton_forward.py, triton_backward.py.

Sequences of up to one key-value tile (128 tokens at D = 64) take the one-tile kernels, where memory is the bound; longer ones the tiled
kernels. Lengths are read on the device alone: the grid covers max_seqlen, programs past a sequence's end return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from stackbert_kernels.ops import _triton, philox
from stackbert_kernels.ops.attention import triton_backward, triton_forward
from stackbert_kernels.ops.attention.reference import lse_shape


@dataclass(frozen=True)
class Tiles:
    queries: int
    keys: int  # multiples of 64: a row of 64 keys shares its Philox calls
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    spills: int = 0  # stores of registers to local memory that the compiler needs, at most

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Configuration:
    """Tiles of each kernel. The one-tile kernels take sequences of up to `forward_one_tile.keys` and 2 * `backward_one_tile.queries` tokens
    (whose keys are as many). Of longer ones, dq and dkv leave the first so many rows to it: a multiple of their own. None = no such
    kernel: where operands pass through registers, on sm_80 and in fp32, it spills."""

    forward_one_tile: Tiles | None
    forward: Tiles
    backward_one_tile: Tiles | None
    dq: Tiles
    dkv: Tiles


# What a tuning run tries for D = 64 in half precision on sm_90; the kept ones stand first. benchmarks/notes/triton_attention.md has the reasons.
CANDIDATES = {
    "forward_one_tile": (
        Tiles(64, 128, maxnreg=168),
        Tiles(64, 128, num_stages=1),
        Tiles(64, 128, maxnreg=128, spills=16),
    ),
    "forward": (
        Tiles(128, 64, 8, 3, 128),
        Tiles(128, 64, 8, 2, 128),
        Tiles(64, 64, maxnreg=168),
        Tiles(128, 64, spills=8),
    ),
    "backward_one_tile": (Tiles(64, 64, num_stages=1, spills=24),),
    "dq": (Tiles(128, 64, 8, 2, 128), Tiles(64, 64, maxnreg=168)),
    "dkv": (Tiles(64, 64, spills=8), Tiles(64, 64, num_stages=3, spills=8), Tiles(64, 64, num_stages=1)),
}

SINGLE = {
    (4, 64): Configuration(
        Tiles(32, 64, 8, 1), Tiles(64, 64, 8), None, Tiles(32, 64, 8), Tiles(32, 64, 8, 1)
    ),
    (4, 128): Configuration(
        Tiles(32, 64, 8, 1), Tiles(32, 64, 8, 1, spills=4), None, Tiles(16, 64, 8), Tiles(16, 64, 8, 1, spills=2)
    ),
}  # fmt: skip
# By the bytes of a number and the columns of a tile.
CONFIGURATIONS = {
    80: SINGLE | {
        (2, 64): Configuration(
            Tiles(64, 128), Tiles(64, 64), None, Tiles(64, 64, spills=8), Tiles(64, 64, spills=8)
        ),
        (2, 128): Configuration(
            Tiles(64, 128, num_stages=1), Tiles(128, 64, 8), None, Tiles(64, 64, spills=4), Tiles(64, 64, 8, spills=8)
        ),
    },
    90: SINGLE | {
        (2, 64): Configuration(**{kernel: tiles[0] for kernel, tiles in CANDIDATES.items()}),
        (2, 128): Configuration(
            Tiles(64, 128), Tiles(128, 64, 8), None, Tiles(128, 64, 8), Tiles(64, 64, 8, spills=8)
        ),
    },
    100: SINGLE | {
        (2, 64): Configuration(
            Tiles(64, 128, num_stages=1), Tiles(128, 64, 8, 3, 128), Tiles(64, 64, num_stages=1),
            Tiles(128, 64, 8, 2, 128), Tiles(64, 64),
        ),
        (2, 128): Configuration(
            Tiles(64, 128, num_stages=1), Tiles(128, 64, 8), Tiles(64, 64, 8, 1), Tiles(128, 64, 8), Tiles(64, 64, 8)
        ),
    },
}  # fmt: skip
TUNED = (2, 64)  # the entry whose candidates are above
CONFIGURATIONS[120] = CONFIGURATIONS[80]  # no tensor memory, and shared memory as small as on sm_86: 99 KB


def _configuration(q: Tensor) -> Configuration:
    return _triton.configuration(CONFIGURATIONS, q.device)[q.element_size(), _block_d(q.shape[-1])]


def _block_d(head_dim: int) -> int:
    """At least 64, as the tensor cores of sm_90 and newer want it."""
    return max(64, triton.next_power_of_2(head_dim))


def forward(q, k, v, seqlens, max_seqlen, scale, rng, site, threshold, with_lse) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(lse_shape(q) if with_lse else (0,), dtype=torch.float32)
    if q.numel() == 0 or max_seqlen == 0:
        return out.zero_(), lse.zero_()
    heads, chosen = q.shape[-2], _configuration(q)
    constants = _constants(q, threshold) | {"WITH_LSE": with_lse, "POSITIVE": scale > 0}
    arguments = (*_rows(q), *_rows(k), *_rows(v), *_dense(out), lse, *_lse_strides(q), seqlens, heads, max_seqlen)
    dropout = (rng, site, threshold, philox.scale(threshold))
    sequences = _sequences(q, seqlens)
    with _triton.on(q.device):
        if (tiles := chosen.forward_one_tile) is not None and max_seqlen <= tiles.keys:
            keys = min(tiles.keys, max(64, triton.next_power_of_2(max_seqlen)))
            triton_forward.attention_fwd_one_tile_kernel[(sequences * heads,)](
                *arguments, scale, *dropout, **constants, BLOCK_Q=tiles.queries, BLOCK_K=keys, **tiles.options()
            )
        else:
            tiles = chosen.forward
            count = triton.cdiv(max_seqlen, tiles.queries)
            triton_forward.attention_fwd_kernel[(sequences * heads * count,)](
                *arguments, count, scale, *dropout, **constants,
                BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys, **tiles.options(),
            )  # fmt: skip
    return out, lse


def backward(
    dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _backward((dq, dk, dv), dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold)
    return dq, dk, dv


def qkv_forward(qkv, *arguments) -> tuple[Tensor, Tensor]:
    return forward(*qkv.unbind(1), *arguments)


def qkv_backward(dout, qkv, *arguments) -> Tensor:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward(dqkv.unbind(1), dout, *qkv.unbind(1), *arguments)
    return dqkv


def _backward(gradients, dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold) -> None:
    """Into dq, dk, dv, which have the same strides."""
    if q.numel() == 0 or max_seqlen == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    dq, dk, dv = gradients
    dx_strides = _rows(dq)[1:3]
    heads, chosen, constants = q.shape[-2], _configuration(q), _constants(q, threshold)
    inputs = (*_rows(dout), *_rows(q), *_rows(k), *_rows(v))
    lse_strides = _lse_strides(q)
    extents = (seqlens, heads, max_seqlen)
    dropout = (rng, site, threshold, philox.scale(threshold))
    programs = _sequences(q, seqlens) * heads
    with _triton.on(q.device):
        short = 0
        if (tiles := chosen.backward_one_tile) is not None:
            two = max_seqlen > tiles.queries
            short = tiles.queries * (2 if two else 1)
            triton_backward.attention_bwd_one_tile_kernel[(programs,)](
                *inputs, *_dense(out), lse, *lse_strides, dq, dk, dv, *dx_strides, *extents, scale, *dropout,
                **constants, BLOCK=tiles.queries, TWO=two, **tiles.options(),
            )  # fmt: skip
        if max_seqlen <= short:
            return
        constants["SHORT"] = short
        delta = torch.empty_like(lse)
        tiles = chosen.dq
        count = triton.cdiv(max_seqlen, tiles.queries)
        triton_backward.attention_bwd_dq_kernel[(programs * count,)](
            *inputs, *_dense(out), lse, delta, *lse_strides, dq, *dx_strides, *extents, count, scale, *dropout,
            **constants, BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys, **tiles.options(),
        )  # fmt: skip
        tiles = chosen.dkv
        count = triton.cdiv(max_seqlen, tiles.keys)
        triton_backward.attention_bwd_dkv_kernel[(programs * count,)](
            *inputs, lse, delta, *lse_strides, dk, dv, *dx_strides, *extents, count, scale, *dropout,
            **constants, BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys, **tiles.options(),
        )  # fmt: skip


def _constants(q: Tensor, threshold: int) -> dict[str, object]:
    return {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": _block_d(q.shape[-1]),
        "PACKED": q.dim() == 3,
        "DROPOUT": threshold > 0,
    }


def _sequences(q: Tensor, seqlens: Tensor) -> int:
    return len(seqlens) - (q.dim() == 3)


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x and its strides of a sequence, a token and a head. Offsets within a tile have 32 bits."""
    x = x if x.stride(-1) == 1 and x.stride(-3) < 2**23 else x.contiguous()
    return x, x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2)


def _dense(x: Tensor) -> tuple[Tensor, int, int]:
    return _rows(x)[:3]


def _lse_strides(q: Tensor) -> tuple[int, int]:
    """Of a sequence and a head in [H, T] or [B, H, S]."""
    tokens = q.shape[-3]
    return (q.shape[-2] * tokens if q.dim() == 4 else 0), tokens


KERNELS = {
    "forward_one_tile": triton_forward.attention_fwd_one_tile_kernel,
    "forward": triton_forward.attention_fwd_kernel,
    "backward_one_tile": triton_backward.attention_bwd_one_tile_kernel,
    "dq": triton_backward.attention_bwd_dq_kernel,
    "dkv": triton_backward.attention_bwd_dkv_kernel,
}
TYPES = {"seqlens_ptr": "*i32:16", "rng_ptr": "*i64:16", "lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16"}


def compilations(arch: int) -> list[_triton.Compilation]:
    shapes = (("bf16", 64, True), ("bf16", 64, False), ("fp16", 128, True), ("fp32", 64, True), ("fp32", 96, True))
    return [
        _compilation(arch, kernel, tiles, *shape)
        for shape in shapes
        for kernel in KERNELS
        if (tiles := getattr(CONFIGURATIONS[arch][_itemsize(shape[0]), _block_d(shape[1])], kernel)) is not None
    ]


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def _compilation(arch: int, kernel: str, tiles: Tiles, dtype: str, head_dim: int, dropout: bool) -> _triton.Compilation:
    """Packed views of one qkv, with the statistics that training stores."""
    function = KERNELS[kernel]
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_Q": tiles.queries,
        "BLOCK_K": tiles.keys,
        "BLOCK": tiles.queries,
        "TWO": True,
        "SHORT": 0 if CONFIGURATIONS[arch][_itemsize(dtype), _block_d(head_dim)].backward_one_tile is None else 128,
        "PACKED": True,
        "DROPOUT": dropout,
        "WITH_LSE": True,
        "POSITIVE": True,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}

    def kind(name: str) -> str:
        if name in TYPES:
            return TYPES[name]
        if name.endswith("_ptr"):
            return f"*{dtype}:16"
        if name in ("scale", "factor"):
            return "fp32"
        return "i32" if name in triton_forward.NUMBERS else "i32:16"

    return _triton.Compilation(
        name=f"attention {kernel} {head_dim} {dtype}" + ("" if dropout else " p=0"),
        kernel=function,
        signature={name: kind(name) for name in function.arg_names if name not in constants},
        constants=constants,
        **tiles.options(),
        max_registers=tiles.maxnreg or 255,
        max_spills=tiles.spills,
        # Lengths, seed and step, a row's statistics; and the result of fp32 where it comes from tensor memory.
        max_narrow=40 if dtype == "fp32" else 24,
        sass={90: ("HGMMA",), 100: ("UTCHMMA",)} if dtype != "fp32" else {},
        # How Triton would exchange the words of the mask between threads; dK and dV store their operands so.
        without={90: ("STSM",)} if kernel in ("forward_one_tile", "forward", "dq") else {},
    )
