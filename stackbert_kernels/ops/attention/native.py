"""Attention by csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, empty_like
from stackbert_kernels.ops.attention.reference import lse_shape

# Everything goes to the compiled module as (address, stride of a sequence, of a token, of a head); packed tensors have no first stride.
Rows = tuple[int, int, int, int]


def forward(q, k, v, seqlens, max_seqlen, scale, rng, site, threshold, with_lse) -> tuple[Tensor, Tensor]:
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    out = empty_like(q)
    lse = q.new_empty(lse_shape(q) if with_lse else (0,), dtype=torch.float32)
    _run(_C.attention_forward, (), q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold)
    return out, lse


def backward(
    dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dout = _dense_last(q), _dense_last(k), _dense_last(v), _dense_last(dout)
    dq, dk, dv = (empty_like(x) for x in (q, k, v))
    gradients = (_rows(dout), _rows(dq), _rows(dk), _rows(dv))
    _run(_C.attention_backward, gradients, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold)
    return dq, dk, dv


def qkv_forward(qkv, *arguments) -> tuple[Tensor, Tensor]:
    return forward(*qkv.unbind(1), *arguments)


def qkv_backward(dout, qkv, out, lse, seqlens, max_seqlen, scale, rng, site, threshold) -> Tensor:
    q, k, v = (_dense_last(x) for x in qkv.unbind(1))
    dout = _dense_last(dout)
    dqkv = empty_like(qkv)
    gradients = (_rows(dout), *(_rows(dx) for dx in dqkv.unbind(1)))
    _run(_C.attention_backward, gradients, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold)
    return dqkv


def _arguments(q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold) -> tuple[dict, Tensor]:
    """What kernels on either device take, and the order of the sequences, which is to be kept until they are launched."""
    packed = q.dim() == 3
    lengths = seqlens.diff() if packed else seqlens
    order = lengths.argsort(descending=True, stable=True).to(torch.int32)
    return {
        "q": _rows(q),
        "k": _rows(k),
        "v": _rows(v),
        "out": _rows(out),
        "lse": _rows(lse.unsqueeze(-1).transpose(-2, -3)) if lse.numel() else (0, 0, 0, 0),
        "seqlens": seqlens.data_ptr(),
        "order": order.data_ptr(),
        "packed": packed,
        "tokens": q.shape[-3],
        "sequences": len(lengths),
        "max_seqlen": max_seqlen,
        "heads": q.shape[-2],
        "head_dim": q.shape[-1],
        "dtype": NATIVE_DTYPES[q.dtype],
        "scale": scale,
        "rng": rng.data_ptr(),
        "site": site,
        "threshold": threshold,
    }, order


def _run(kernel, gradients, q, k, v, out, lse, seqlens, max_seqlen, *settings, isa="best") -> None:
    arguments, order = _arguments(q, k, v, out, lse, seqlens, max_seqlen, *settings)
    threads = torch.get_num_threads()
    floats = _C.attention_scratch(max_seqlen, q.shape[-1], bool(gradients))
    scratch = torch.empty(threads * floats, dtype=torch.float32)
    kernel(*gradients, **arguments, scratch=scratch.data_ptr(), threads=threads, isa=isa)
    del order


def forward_cuda(q, k, v, seqlens, max_seqlen, scale, rng, site, threshold, with_lse) -> tuple[Tensor, Tensor]:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out = empty_like(q)
    lse = q.new_empty(lse_shape(q) if with_lse else (0,), dtype=torch.float32)
    arguments, order = _arguments(q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold)
    library.launch("attention_forward_cuda", q, **arguments)
    del order
    return out, lse


def backward_cuda(
    dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_like(x) for x in (q, k, v))
    _backward_cuda((dq, dk, dv), dout, q, k, v, out, lse, seqlens, max_seqlen, scale, rng, site, threshold)
    return dq, dk, dv


def _backward_cuda(gradients, dout, q, k, v, out, lse, *settings) -> None:
    q, k, v, dout = _aligned(q), _aligned(k), _aligned(v), _aligned(dout)
    arguments, order = _arguments(q, k, v, out, lse, *settings)
    delta = torch.empty_like(lse)
    names = dict(zip(("dout", "dq", "dk", "dv"), map(_rows, (dout, *gradients)), strict=True))
    library.launch("attention_backward_cuda", q, **names, delta=delta.data_ptr(), **arguments)
    del order


def qkv_forward_cuda(qkv, *arguments) -> tuple[Tensor, Tensor]:
    return forward_cuda(*qkv.unbind(1), *arguments)


def qkv_backward_cuda(dout, qkv, *arguments) -> Tensor:
    dqkv = empty_like(qkv)
    _backward_cuda(dqkv.unbind(1), dout, *qkv.unbind(1), *arguments)
    return dqkv


def _aligned(x: Tensor) -> Tensor:
    """Every row on 16 bytes, which is what one access takes."""
    strides = x.stride()[:-1]
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(s * x.element_size() % 16 for s in strides)
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Rows:
    batch = x.stride(0) if x.dim() == 4 else 0
    return x.data_ptr(), batch, x.stride(-3), x.stride(-2)
