"""The peers' side of the declarations, without the peers: stand-ins with their names and signatures, plain PyTorch inside.

What is shown is that layouts, order of arguments and what comes back are understood: each passes the benchmark's own check against float64.
"""

from __future__ import annotations

import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import bench_attention, harness, lengths, peers
from benchmarks.declared import BENCHES
from benchmarks.harness import Absent, Case

BY_OP = {bench.op: bench for bench in BENCHES}
EQUAL = bench_attention._case(48, 2, 16, "equal", torch.float32, 0.0, compile=True)
NATURAL = bench_attention._case(100, 2, 32, "natural", torch.float32, 0.0, compile=True)


def attend(q, k, v, p=0.0):
    """[..., S, H, D]"""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(-3, -2)


def attend_packed(q, k, v, cu_seqlens, p=0.0):
    return torch.cat([attend(*(x[a:b] for x in (q, k, v)), p) for a, b in itertools.pairwise(cu_seqlens)])


# Signatures as in the projects' sources.


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False):
    assert max_seqlen == int(cu_seqlens.diff().max())
    return attend_packed(*qkv.unbind(1), cu_seqlens, dropout_p)


def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False):
    return attend(q, k, v), None


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None
):
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return attend_packed(q, k, v, cu_seqlens_q), None


class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        mask = cls()
        mask.cu = [0, *torch.tensor(q_seqlen).cumsum(0).tolist()]
        return mask


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    return attend_packed(query[0], key[0], value[0], attn_bias.cu, p)[None]


class LigerLayerNormFunction:
    @staticmethod
    def apply(X, W, B, eps):
        return F.layer_norm(X, W.shape, W, B, eps)


class FastLayerNormFN:
    @staticmethod
    def apply(x, gamma, beta, epsilon, memory_efficient=False):
        return F.layer_norm(x, gamma.shape, gamma, beta, epsilon)


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return (
            F.cross_entropy(F.linear(_input, weight, bias).float(), target, ignore_index=ignore_index),
            None,
            None,
            None,
        )


class LigerCrossEntropyFunction:
    @staticmethod
    def apply(_input, target, weight, ignore_index=-100):
        return F.cross_entropy(_input.float(), target, weight, ignore_index=ignore_index), None, None, None


class SoftmaxCrossEntropyLoss:
    @staticmethod
    def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        assert half_to_float == (logits.dtype != torch.float32)
        losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        return losses.masked_fill(labels == padding_idx, 0)


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0
    ):
        assert adam_w_mode and bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                m, v, (b1, b2) = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"], group["betas"]
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                root = (v / (1 - b2 ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
                    m, root, value=-group["lr"] / (1 - b1 ** group["step"])
                )


STAND_INS = {
    "flash_attn.flash_attn_interface": [flash_attn_varlen_qkvpacked_func],
    "flash_attn.cute.interface": [flash_attn_func, flash_attn_varlen_func],
    "xformers.ops": [memory_efficient_attention],
    "xformers.ops.fmha.attn_bias": [BlockDiagonalMask],
    "liger_kernel.ops.layer_norm": [LigerLayerNormFunction],
    "liger_kernel.ops.fused_linear_cross_entropy": [LigerFusedLinearCrossEntropyFunction],
    "liger_kernel.ops.cross_entropy": [LigerCrossEntropyFunction],
    "apex.normalization.fused_layer_norm": [fused_layer_norm_affine],
    "apex.contrib.layer_norm.layer_norm": [FastLayerNormFN],
    "apex.contrib.xentropy.softmax_xentropy": [SoftmaxCrossEntropyLoss],
    "apex.optimizers.fused_adam": [FusedAdam],
    "fused_layer_norm_cuda": [],
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Every peer can be imported, and takes CPU tensors."""
    for name, contents in STAND_INS.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            parent = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
        for content in contents:
            monkeypatch.setattr(sys.modules[name], content.__name__, content, raising=False)
    monkeypatch.setattr(peers, "gpu_only", lambda t: None)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(bench_attention, "_compiled_flex", lambda: (flex_attention, create_block_mask))
    refuses_gradients_on_a_cpu = "torch.nn.attention.flex_attention._validate_device"
    monkeypatch.setattr(refuses_gradients_on_a_cpu, lambda *_: None, raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def checked(op: str, case: Case) -> harness.Checked:
    return harness.check_all(BY_OP[op], case, BY_OP[op].inputs(case, "cpu"), "cpu")


GPU_KERNELS = {"SDPA flash", "SDPA efficient", "SDPA cuDNN"}  # of torch, which a CPU has not


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", [EQUAL, NATURAL], ids=["equal", "natural"])
def test_attention(case, stand_ins, eager):
    right = checked("attention", case)
    names = {peer.name for peer in right.peers}
    wanted = {"torch", "SDPA math", "FlexAttention", "flash-attn 2", "FA4", "xformers"}
    assert right.wrong == {} and names - GPU_KERNELS == wanted, right.absent


OTHERS = [
    pytest.param(
        bench.op, replace(case, p=p, dtype=dtype, compile=True), id=f"{bench.op}-{harness.dtype_name(dtype)}-p={p}"
    )
    for bench in BENCHES
    for case in bench.cases("cpu", True)
    if bench.op not in ("attention", "duplicate_layers_")
    for dtype in ((torch.float32,) if bench.op == "adamw_" else (torch.float32, torch.bfloat16))
    for p in sorted({0.0, case.p})
]


@pytest.mark.parametrize(("op", "case"), OTHERS)
def test_the_others(op, case, stand_ins, eager):
    right = checked(op, case)
    assert right.wrong == {} and right.absent == {}
    assert [peer.name for peer in right.peers] == [peer.name for peer in BY_OP[op].peers]


def test_a_stand_in_that_is_wrong_is_found(stand_ins, eager, monkeypatch):
    monkeypatch.setattr(
        sys.modules["flash_attn.cute.interface"], "flash_attn_func", lambda q, k, v: (attend(q, v, k), None)
    )
    assert set(checked("attention", EQUAL).wrong) == {"FA4"}


def test_reasons_of_absence(stand_ins):
    dropped, mixed = replace(EQUAL, p=0.1), replace(NATURAL, p=0.1)
    t = BY_OP["attention"].inputs(EQUAL, "cpu")
    with pytest.raises(Absent, match=r"in steps of 1/16, not 0\.1"):
        bench_attention.backend(SDPBackend.CUDNN_ATTENTION, True)(dropped, t)
    bench_attention.backend(SDPBackend.CUDNN_ATTENTION, True)(replace(EQUAL, p=0.125), t)
    with pytest.raises(Absent, match="takes no padding mask"):
        bench_attention.backend(SDPBackend.FLASH_ATTENTION, False)(mixed, t)
    for peer in (bench_attention.flex, bench_attention.flash_attention_4):
        with pytest.raises(Absent, match="has no dropout"):
            peer(dropped, t)
    with pytest.raises(Absent, match="has to be compiled"):
        bench_attention.flex(replace(EQUAL, compile=False), t)
    with pytest.raises(Absent, match="--compile"):
        checked_peer = next(peer for peer in BY_OP["bias_gelu"].peers if peer.name == "torch.compile")
        checked_peer.make(BY_OP["bias_gelu"].cases("cpu", True)[0], {})


def test_a_module_that_is_missing_or_broken(monkeypatch):
    with pytest.raises(Absent, match="no_such_package cannot be imported: ModuleNotFoundError"):
        peers.module("no_such_package.inside")
    monkeypatch.setattr(
        peers.importlib, "import_module", lambda name: (_ for _ in ()).throw(OSError("undefined symbol\nmore"))
    )
    with pytest.raises(Absent, match=r"apex cannot be imported: OSError: undefined symbol$"):
        peers.module("apex.optimizers")


def test_padding_there_and_back():
    t = BY_OP["attention"].inputs(NATURAL, "cpu")
    padding = bench_attention.Padding(NATURAL, t)
    of = lengths.natural(100, 32)
    padded = padding.pad(t["qkv"])
    assert padded.shape == (len(of), max(of), 3, 2, 64) and torch.equal(padding.unpad(padded), t["qkv"])
    assert [int(row.any(-1).any(-1).any(-1).sum()) for row in padded] == of
