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

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Configuration:
    """Tiles of each kernel. The one-tile kernels take sequences of up to `forward_one_tile.keys` and 2 * `backward_one_tile.queries` tokens
    (whose keys are as many). Of longer ones, dq and dkv leave the first so many rows to it: a multiple of their own."""

    forward_one_tile: Tiles
    forward: Tiles
    backward_one_tile: Tiles | None
    dq: Tiles
    dkv: Tiles


BASE = Configuration(
    forward_one_tile=Tiles(64, 128, 4, 2, 168),
    forward=Tiles(128, 64, 8, 3, 128),
    backward_one_tile=Tiles(64, 64, 4, 1),
    dq=Tiles(128, 64, 8, 2, 128),
    dkv=Tiles(64, 64, 4, 2),
)
# By the bytes of a tile's row.
CONFIGURATIONS = {arch: dict.fromkeys((128, 256, 512), BASE) for arch in (80, 90, 100)}


def _configuration(q: Tensor) -> Configuration:
    return _triton.configuration(CONFIGURATIONS, q.device)[_block_d(q.shape[-1]) * q.element_size()]


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
        if max_seqlen <= chosen.forward_one_tile.keys:
            tiles = chosen.forward_one_tile
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
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
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


def compilations(arch: int) -> list[_triton.Compilation]:
    return [
        _compilation(arch, kernel, tiles, dtype, head_dim, dropout)
        for dtype, head_dim, dropout in (("bf16", 64, True), ("bf16", 64, False))
        for kernel, tiles in KERNELS
    ]


KERNELS = (
    (triton_forward.attention_fwd_one_tile_kernel, "forward_one_tile"),
    (triton_forward.attention_fwd_kernel, "forward"),
    (triton_backward.attention_bwd_one_tile_kernel, "backward_one_tile"),
    (triton_backward.attention_bwd_dq_kernel, "dq"),
    (triton_backward.attention_bwd_dkv_kernel, "dkv"),
)
TYPES = {"seqlens_ptr": "*i32:16", "rng_ptr": "*i64:16", "lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16"}


def _compilation(arch: int, kernel, tiles: str, dtype: str, head_dim: int, dropout: bool) -> _triton.Compilation:
    """Packed views of one qkv, with the statistics that training stores."""
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "PACKED": True,
        "DROPOUT": dropout,
        "WITH_LSE": True,
        "POSITIVE": True,
        "SHORT": 128,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }
    chosen = getattr(CONFIGURATIONS[arch][_block_d(head_dim) * (4 if dtype == "fp32" else 2)], tiles)
    constants |= {"BLOCK_Q": chosen.queries, "BLOCK_K": chosen.keys, "BLOCK": chosen.queries, "TWO": True}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(name: str) -> str:
        if name in TYPES:
            return TYPES[name]
        if name.endswith("_ptr"):
            return f"*{dtype}:16"
        if name in ("scale", "factor"):
            return "fp32"
        return "i32" if name in triton_forward.NUMBERS else "i32:16"

    return _triton.Compilation(
        name=f"{kernel.__name__.removesuffix('_kernel')} {head_dim} {dtype}" + ("" if dropout else " p=0"),
        kernel=kernel,
        signature={name: kind(name) for name in kernel.arg_names if name not in constants},
        constants=constants,
        **chosen.options(),
        max_registers=chosen.maxnreg or 255,
        max_narrow=16,
        sass={90: ("HGMMA",)},
    )
