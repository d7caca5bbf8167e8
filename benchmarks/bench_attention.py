"""attention on the packed output [T, 3, H, D] of a fused projection; what wants padding gets the same sequences padded.

B sequences, S longest, T tokens, H heads, D head dimension. Peers that take no packed qkv get separate, dense q, k, v, and their padding,
before the clock starts.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stackbert_kernels import ops

from . import lengths, peers
from .harness import BACKWARD, BOTH, FORWARD, FROZEN, Absent, Bench, Bound, Call, Case, Inputs, Peer, Results

D = 64
TOKENS = {"cuda": 65536, "cpu": 4096}
CHECKED_TOKENS = 16384  # of a natural mix: padded to the longest in float64, 65,536 would take 100 GB


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(40, 2, 16, "natural", torch.float32 if device == "cpu" else torch.bfloat16, 0.1)]
    return _cuda_cases() if device == "cuda" else _cpu_cases()


def _case(T: int, H: int, S: int, mix: str, dtype: torch.dtype, p: float, **rest) -> Case:
    """About T tokens in sequences of S, or in a natural mix of lengths up to S."""
    B = T // S if mix == "equal" else len(lengths.natural(T, S))
    name = f"{B} x {S}" if mix == "equal" else f"{B} of 8..{S}"
    return Case(f"{name}, {H} heads", {"T": T, "H": H, "D": D, "S": S, "mix": mix}, dtype, p, **rest)


@functools.cache
def _lengths(T: int, S: int, mix: str) -> list[int]:
    return lengths.equal(T, S) if mix == "equal" else lengths.natural(T, S)


def lengths_of(case: Case) -> list[int]:
    return _lengths(case["T"], case["S"], case["mix"])


def _cuda_cases() -> list[Case]:
    T, bf16, fp16 = TOKENS["cuda"], torch.bfloat16, torch.float16

    def case(H: int, S: int | str, p: float, dtype: torch.dtype = bf16, **rest) -> Case:
        return _case(T, H, *((512, "natural") if S == "natural" else (S, "equal")), dtype, p, **rest)

    frozen = {"directions": (FORWARD, BACKWARD, FROZEN)}
    return [
        case(12, 128, 0.1, main=True),
        case(12, 512, 0.1, main=True),
        case(12, 512, 0.0, compile=True, **frozen),
        case(12, 128, 0.0, **frozen),
        case(12, "natural", 0.1),
        case(12, "natural", 0.0, compile=True),
        case(16, 128, 0.1),
        case(16, 512, 0.1),
        case(12, 256, 0.1),
        case(12, 384, 0.1),
        case(12, 128, 0.1, fp16),
        case(12, 512, 0.1, fp16),
    ]


def _cpu_cases() -> list[Case]:
    return [
        _case(TOKENS["cpu"], 4, S, mix, dtype, p, directions=(BOTH,) if p else (BOTH, FROZEN))
        for dtype in (torch.float32, torch.bfloat16)
        for p in (0.1, 0.0)
        for S, mix in ((128, "equal"), (512, "equal"), (256, "natural"))
        if mix == "natural" or (p and (dtype == torch.float32 or S == 128))
    ]


def checked(case: Case) -> Case:
    if case["T"] <= CHECKED_TOKENS or case["mix"] == "equal":
        return case
    return replace(case, sizes={**case.sizes, "T": CHECKED_TOKENS})


def inputs(case: Case, device: str) -> Inputs:
    of, H = lengths_of(case), case["H"]
    cu = torch.tensor([0, *of]).cumsum(0).to(torch.int32)
    qkv, dout = (torch.randn(sum(of), n, H, D, device=device).to(case.dtype) for n in (3, 1))
    return {
        "qkv": qkv.requires_grad_(),
        "cu_seqlens": cu.to(device),
        "rng": ops.new_rng(0, device=device),
        "grad": dout.squeeze(1),
    }


def ours(case: Case, t: Inputs, impl: str) -> Call:
    longest = max(lengths_of(case))
    return lambda: ops.attention_qkv_varlen(
        t["qkv"], t["cu_seqlens"], longest, dropout_p=case.p, rng=t["rng"], impl=impl
    )


def bytes_moved(case: Case, direction: str) -> int:
    """forward reads q, k, v and writes out, and the log-sum-exp where backward needs it; backward reads these and dout and writes dq,
    dk, dv. The dropout mask is drawn again: storing it would add a bit a score."""
    T, H = sum(lengths_of(case)), case["H"]
    tensor, lse = T * H * D * case.dtype.itemsize, T * H * 4
    forward, backward = 4 * tensor + lse, 8 * tensor + lse
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward, FROZEN: 4 * tensor}[direction]


def flops(case: Case, direction: str) -> int:
    """forward has 2 products, backward 5 (the scores again, dv, dp, dq, dk), each of 2 S S D a head and sequence."""
    product = 2 * case["H"] * D * sum(S * S for S in lengths_of(case))
    return product * {FORWARD: 2, FROZEN: 2, BACKWARD: 5, BOTH: 7}[direction]


# Peers.


class Padding:
    """Where each token stands in the [B, S] rectangle."""

    def __init__(self, case: Case, t: Inputs):
        of = torch.tensor(lengths_of(case))
        self.B, self.S = len(of), int(of.max())
        inside = torch.arange(self.S) < of[:, None]
        self.mask = None if bool(inside.all()) else inside.to(t["qkv"].device)

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] to [B, S, ...]"""
        if self.mask is None:
            return x.reshape(self.B, self.S, *x.shape[1:])
        padded = x.new_zeros(self.B, self.S, *x.shape[1:])
        padded[self.mask] = x
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.mask is None else x[self.mask]


def apart(t: Inputs, shape, function, back) -> Bound:
    """function(q, k, v) on dense q, k, v, each shape(of its packed tensor); `back` undoes `shape`."""
    q, k, v = (shape(x).contiguous().requires_grad_() for x in t["qkv"].detach().unbind(1))

    def as_ours(results: Results) -> Results:
        packed = {name: back(x) for name, x in results.items()}
        return {"output": packed["output"], "qkv": torch.stack([packed[name] for name in "qkv"], 1)}

    return Bound(lambda: function(q, k, v), {"q": q, "k": k, "v": v}, shape(t["grad"]).contiguous(), as_ours)


def padded(case: Case, t: Inputs, function) -> Bound:
    """function(q, k, v, mask) on [B, H, S, D]; mask [B, 1, 1, S] is None where every sequence has S tokens."""
    padding = Padding(case, t)
    mask = None if padding.mask is None else padding.mask[:, None, None, :]
    return apart(
        t,
        lambda x: padding.pad(x).transpose(1, 2),
        lambda q, k, v: function(q, k, v, mask),
        lambda x: padding.unpad(x.transpose(1, 2)),
    )


def sdpa(case: Case, t: Inputs) -> Bound:
    return padded(case, t, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, dropout_p=case.p))


def backend(which: SDPBackend, takes_mask: bool):
    """scaled_dot_product_attention by one of its GPU kernels."""

    def make(case: Case, t: Inputs) -> Bound:
        peers.gpu_only(t)
        if not takes_mask and len(set(lengths_of(case))) > 1:
            raise Absent("takes no padding mask")
        if which == SDPBackend.CUDNN_ATTENTION and (16 * case.p) % 1:
            raise Absent(f"takes dropout in steps of 1/16, not {case.p:g}")

        def attend(q, k, v, mask):
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=case.p)

        return padded(case, t, attend)

    return make


@functools.cache
def _compiled_flex():
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # backward is timed many times on one graph
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def flex(case: Case, t: Inputs) -> Bound:
    """Equal lengths as a batch; a mix as one long sequence with a block mask, so that no padding is computed."""
    peers.gpu_only(t)
    if case.p:
        raise Absent("has no dropout")
    if not case.compile:
        raise Absent("has to be compiled, which takes long: beside some cases only, or with --compile")
    attend, block_mask = _compiled_flex()
    if len(set(lengths_of(case))) == 1:
        return padded(case, t, lambda q, k, v, mask: attend(q, k, v))
    of = torch.tensor(lengths_of(case), device=t["qkv"].device)
    sequence = torch.repeat_interleave(torch.arange(len(of), device=of.device), of)
    blocks = block_mask(
        lambda b, h, query, key: sequence[query] == sequence[key], None, None, len(sequence), len(sequence), of.device
    )
    return apart(
        t,
        lambda x: x.transpose(0, 1)[None],
        lambda q, k, v: attend(q, k, v, block_mask=blocks),
        lambda x: x[0].transpose(0, 1),
    )


def flash_attention_2(case: Case, t: Inputs) -> Call:
    function = peers.gpu_module("flash_attn.flash_attn_interface", t).flash_attn_varlen_qkvpacked_func
    return lambda: function(t["qkv"], t["cu_seqlens"], max(lengths_of(case)), dropout_p=case.p)


def flash_attention_4(case: Case, t: Inputs) -> Bound:
    cute = peers.gpu_module("flash_attn.cute.interface", t)
    if case.p:
        raise Absent("has no dropout")
    padding, cu = Padding(case, t), t["cu_seqlens"]

    def attend(q, k, v):
        if padding.mask is None:
            return cute.flash_attn_func(q, k, v)[0]
        return cute.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=padding.S, max_seqlen_k=padding.S
        )[0]

    if padding.mask is None:
        return apart(t, padding.pad, attend, padding.unpad)
    return apart(t, lambda x: x, attend, lambda x: x)


def xformers(case: Case, t: Inputs) -> Bound:
    function = peers.gpu_module("xformers.ops", t).memory_efficient_attention
    mask = peers.gpu_module("xformers.ops.fmha.attn_bias", t).BlockDiagonalMask.from_seqlens(list(lengths_of(case)))
    return apart(t, lambda x: x[None], lambda q, k, v: function(q, k, v, attn_bias=mask, p=case.p), lambda x: x[0])


ATTENTION = Bench(
    op="attention",
    folder="attention",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(
        Peer("torch", sdpa),
        Peer("SDPA math", backend(SDPBackend.MATH, True)),
        Peer("SDPA flash", backend(SDPBackend.FLASH_ATTENTION, False)),
        Peer("SDPA efficient", backend(SDPBackend.EFFICIENT_ATTENTION, True)),
        Peer("SDPA cuDNN", backend(SDPBackend.CUDNN_ATTENTION, True)),
        Peer("FlexAttention", flex),
        Peer("flash-attn 2", flash_attention_2),
        Peer("FA4", flash_attention_4),
        Peer("xformers", xformers),
    ),
    bytes_moved=bytes_moved,
    flops=flops,
    test="python_tests/ops/test_attention.py",
    checked=checked,
)

BENCHES = (ATTENTION,)
