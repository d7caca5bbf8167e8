"""attention: softmax(q k^T * scale) v on padded, packed or fused-and-packed tensors, with dropout on the probabilities.

One family of kernels. Packed [T, H, D] tensors come with seqlens = cu_seqlens [B + 1], padded [B, S, H, D] ones with seqlens = lengths
[B]. The backward pass gets q, k, v, out and the log-sum-exp of each row, and draws the dropout mask again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops import philox
from stackbert_kernels.ops.attention import native, reference

MAX_HEAD_DIM = 256  # csrc/attention/attention.h
CUDA_HEAD_DIMS = (32, 64, 128)
TRITON_HEAD_DIMS = (32, 64, 96, 128)


def _check(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, max_seqlen: int) -> None:
    packed = q.dim() == 3
    op, wanted = ("attention_varlen", "[T, H, D]") if packed else ("attention", "[B, S, H, D]")
    if not q.is_floating_point():
        raise TypeError(f"{op}: q must be floating point, got {q.dtype}")
    if q.dim() not in (3, 4) or q.shape[-1] == 0:
        raise ValueError(f"{op}: q must be {wanted}, got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{op}: {name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}")
        if x.shape != q.shape:
            raise ValueError(f"{op}: {name} must be {list(q.shape)} as q is, got {list(x.shape)}")
    name = "cu_seqlens" if packed else "lengths"
    if seqlens.dtype != torch.int32 or seqlens.device != q.device:
        raise TypeError(f"{op}: {name} must be int32 on {q.device}, got {seqlens.dtype} on {seqlens.device}")
    if packed and (seqlens.dim() != 1 or seqlens.shape[0] == 0 or not seqlens.is_contiguous()):
        raise ValueError(f"{op}: cu_seqlens must be dense [B + 1], got {list(seqlens.shape)}")
    if not packed and (seqlens.shape != q.shape[:1] or not seqlens.is_contiguous()):
        raise ValueError(f"{op}: lengths must be dense [{q.shape[0]}], got {list(seqlens.shape)}")
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen must be >= 0, got {max_seqlen}")


def _check_qkv(qkv: Tensor, seqlens: Tensor, max_seqlen: int) -> None:
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention_qkv_varlen: qkv must be [T, 3, H, D], got {list(qkv.shape)}")
    _check(*qkv.unbind(1), seqlens, max_seqlen)


def _check_values(q: Tensor, seqlens: Tensor, max_seqlen: int) -> None:
    """Where reading is free, on CPU: a wrong length would be a wrong address."""
    values = seqlens.tolist()
    if q.dim() == 4:
        for length in values:
            if not 0 <= length <= q.shape[1]:
                raise ValueError(f"attention: lengths must be in [0, {q.shape[1]}], got {length}")
        return
    if values[0] != 0 or values[-1] != q.shape[0]:
        raise ValueError(
            f"attention_varlen: cu_seqlens must go from 0 to T = {q.shape[0]}, got {values[0]} to {values[-1]}"
        )
    for b in range(len(values) - 1):
        if not 0 <= values[b + 1] - values[b] <= max_seqlen:
            raise ValueError(
                f"attention_varlen: cu_seqlens must rise by 0 to max_seqlen = {max_seqlen} each, "
                f"got {values[b]}, {values[b + 1]} at sequence {b}"
            )


def _on_cpu(forward):
    def checked(q, k, v, seqlens, max_seqlen, *rest):
        _check_values(q, seqlens, max_seqlen)
        return forward(q, k, v, seqlens, max_seqlen, *rest)

    return checked


def _qkv_on_cpu(forward):
    def checked(qkv, seqlens, max_seqlen, *rest):
        _check_values(qkv[:, 0], seqlens, max_seqlen)
        return forward(qkv, seqlens, max_seqlen, *rest)

    return checked


def _lazy(name: str):
    return library.lazy("stackbert_kernels.ops.attention.triton_kernel", name)


FORWARD = {
    "cpu": {
        "reference": _on_cpu(reference.forward),
        "native": _on_cpu(native.forward),
        "triton": _on_cpu(_lazy("forward")),
    },
    "cuda": {"reference": reference.forward, "native": native.forward_cuda, "triton": _lazy("forward")},
}
BACKWARD = {
    "cpu": {"reference": reference.backward, "native": native.backward, "triton": _lazy("backward")},
    "cuda": {"reference": reference.backward, "native": native.backward_cuda, "triton": _lazy("backward")},
}
QKV_FORWARD = {
    "cpu": {
        "reference": _qkv_on_cpu(reference.qkv_forward),
        "native": _qkv_on_cpu(native.qkv_forward),
        "triton": _qkv_on_cpu(_lazy("qkv_forward")),
    },
    "cuda": {"reference": reference.qkv_forward, "native": native.qkv_forward_cuda, "triton": _lazy("qkv_forward")},
}
QKV_BACKWARD = {
    "cpu": {"reference": reference.qkv_backward, "native": native.qkv_backward, "triton": _lazy("qkv_backward")},
    "cuda": {
        "reference": reference.qkv_backward,
        "native": native.qkv_backward_cuda,
        "triton": _lazy("qkv_backward"),
    },
}


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(q, k, v, seqlens, max_seqlen, scale, rng, site, threshold, with_lse, impl):
    _check(q, k, v, seqlens, max_seqlen)
    lse = q.new_empty(reference.lse_shape(q) if with_lse else (0,), dtype=torch.promote_types(q.dtype, torch.float32))
    return _dense_like(q), lse


def _fake_backward(dout, q, k, v, *rest):
    return _dense_like(q), _dense_like(k), _dense_like(v)


def _fake_qkv_forward(qkv, seqlens, max_seqlen, *rest):
    _check_qkv(qkv, seqlens, max_seqlen)
    return _fake_forward(*qkv.unbind(1), seqlens, max_seqlen, *rest)


def _fake_qkv_backward(dout, qkv, *rest):
    return _dense_like(qkv)


SETTINGS = "Tensor seqlens, SymInt max_seqlen, float scale, Tensor rng, int site, int threshold"


def _why_not(impl: str, q: Tensor) -> str | None:
    if impl == "native" and q.is_cuda:
        if q.shape[-1] not in CUDA_HEAD_DIMS:
            return f"native takes head dimensions {', '.join(map(str, CUDA_HEAD_DIMS))} on a GPU, got {q.shape[-1]}"
        if q.dtype == torch.float32:
            return "native takes float16 and bfloat16 on a GPU, got float32"
    elif impl == "native" and q.shape[-1] > MAX_HEAD_DIM:
        return f"native takes head dimensions up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if impl == "triton" and q.shape[-1] not in TRITON_HEAD_DIMS:
        return f"triton takes head dimensions {', '.join(map(str, TRITON_HEAD_DIMS))}, got {q.shape[-1]}"
    return library.only_dtypes(impl, q)


OP = library.Op("attention", FORWARD, _why_not)
_attention_fwd = library.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {SETTINGS}, bool with_lse, str impl) -> (Tensor, Tensor)",
    FORWARD,
    _fake_forward,
)
_attention_bwd = library.define(
    f"attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {SETTINGS}, str impl) -> (Tensor, Tensor, Tensor)",
    BACKWARD,
    _fake_backward,
)
_attention_qkv_fwd = library.define(
    f"attention_qkv_fwd(Tensor qkv, {SETTINGS}, bool with_lse, str impl) -> (Tensor, Tensor)",
    QKV_FORWARD,
    _fake_qkv_forward,
)
_attention_qkv_bwd = library.define(
    f"attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {SETTINGS}, str impl) -> Tensor",
    QKV_BACKWARD,
    _fake_qkv_backward,
)


def _setup(ctx, inputs, output):
    *x, seqlens, ctx.max_seqlen, ctx.scale, rng, ctx.site, ctx.threshold, with_lse, ctx.impl = inputs
    if not with_lse:
        raise ValueError("attention: a gradient needs with_lse=True")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*x, *output, seqlens, rng)


def _gradient(ctx, backward, dout: Tensor | None):
    *x, seqlens, rng = ctx.saved_tensors
    if dout is None:
        return None
    return backward(dout, *x, seqlens, ctx.max_seqlen, ctx.scale, rng, ctx.site, ctx.threshold, ctx.impl)


def _backward(ctx, dout: Tensor | None, dlse: None):
    dq, dk, dv = _gradient(ctx, _attention_bwd, dout) or (None, None, None)
    return dq, dk, dv, *[None] * 8


def _qkv_backward(ctx, dout: Tensor | None, dlse: None):
    return _gradient(ctx, _attention_qkv_bwd, dout), *[None] * 8


library.autograd("attention_fwd", _setup, _backward)
library.autograd("attention_qkv_fwd", _setup, _qkv_backward)


def _attend(op, q, k, v, seqlens, max_seqlen, dropout_p, rng, site, scale, impl) -> Tensor:
    _check(q, k, v, seqlens, max_seqlen)
    threshold, rng = philox.dropout_arguments(op, dropout_p, rng, site, q.device)
    impl = OP.resolve(impl, q)
    with_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention_fwd(q, k, v, seqlens, max_seqlen, scale, rng, site, threshold, with_lse, impl)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence, with dropout on the probabilities.

        q, k, v    [B, S, H, D]  one floating dtype; any strides with a dense last dimension are taken without a copy
        lengths    [B] int32     valid keys and queries of each sequence; None = S
        dropout_p  a probability is zeroed with chance round(256 p) / 256 and else scaled by the realised keep rate
        rng, site  as in dropout; the mask depends on (seed, step, site, sequence, head, query, key) alone
        scale      default 1 / sqrt(D)
        returns    [B, S, H, D]  dense; rows past a sequence's length are zero

    Padding is never read, its gradients are zero.

    Before:
        token = torch.arange(q.shape[1]) < lengths[:, None]
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=token[:, None, None], dropout_p=p).transpose(1, 2)
        out = out * token[:, :, None, None]
    After:
        out = sbk.ops.attention(q, k, v, lengths, dropout_p=p)
    """
    if q.dim() != 4:
        raise ValueError(f"attention: q must be [B, S, H, D], got {list(q.shape)}")
    if lengths is None:
        lengths = torch.full(q.shape[:1], q.shape[1], dtype=torch.int32, device=q.device)
    return _attend("attention", q, k, v, lengths, q.shape[1], dropout_p, rng, site, scale, impl)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """attention on packed tokens: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of T.

        q, k, v     [T, H, D]      one floating dtype; any strides with a dense last dimension are taken without a copy
        cu_seqlens  [B + 1] int32  0, then the running sum of the lengths, T at the end
        max_seqlen  int            no sequence is longer
        returns     [T, H, D]      dense

    The other arguments are those of `attention`, which gives the same rows for the same sequences, dropout included.

    Before:
        heads_first = [x.transpose(0, 1) for x in (q, k, v)]
        ends = cu_seqlens.tolist()
        sequences = [[x[:, i:j] for x in heads_first] for i, j in zip(ends, ends[1:])]
        out = torch.cat([F.scaled_dot_product_attention(*qkv, dropout_p=p) for qkv in sequences], 1).transpose(0, 1)
    After:
        out = sbk.ops.attention_varlen(q, k, v, cu_seqlens, max_seqlen, dropout_p=p)
    """
    if q.dim() != 3:
        raise ValueError(f"attention_varlen: q must be [T, H, D], got {list(q.shape)}")
    return _attend("attention_varlen", q, k, v, cu_seqlens, max_seqlen, dropout_p, rng, site, scale, impl)


def attention_qkv_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """attention_varlen on the output qkv [T, 3, H, D] of one fused projection; its gradient is one dense tensor, nothing is joined.

    Before:
        q, k, v = F.linear(x, in_proj_weight, in_proj_bias).view(-1, 3, H, D).permute(1, 2, 0, 3)
        ends = cu_seqlens.tolist()
        sequences = [[y[:, i:j] for y in (q, k, v)] for i, j in zip(ends, ends[1:])]
        out = torch.cat([F.scaled_dot_product_attention(*qkv, dropout_p=p) for qkv in sequences], 1).transpose(0, 1)
    After:
        qkv = F.linear(x, in_proj_weight, in_proj_bias).view(-1, 3, H, D)
        out = sbk.ops.attention_qkv_varlen(qkv, cu_seqlens, max_seqlen, dropout_p=p)
    """
    _check_qkv(qkv, cu_seqlens, max_seqlen)
    threshold, rng = philox.dropout_arguments("attention_qkv_varlen", dropout_p, rng, site, qkv.device)
    impl = OP.resolve(impl, qkv)
    with_lse = torch.is_grad_enabled() and qkv.requires_grad
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return _attention_qkv_fwd(qkv, cu_seqlens, max_seqlen, scale, rng, site, threshold, with_lse, impl)[0]
