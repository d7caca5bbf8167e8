"""What only a GPU can show. `pytest -m gpu` runs these and the GPU cases of the op tests."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from model.samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.doctor import doctor
from stackbert_kernels.ops import philox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_cuda(values):
    return replace(
        values,
        **{f.name: getattr(values, f.name).cuda() for f in fields(values) if torch.is_tensor(getattr(values, f.name))},
    )


def test_the_doctor_finds_every_implementation_right():
    results = [r for r in doctor()["self_test"]["results"] if r["device"].startswith("cuda")]
    assert results and not [r for r in results if not r["passed"]]


@pytest.mark.parametrize("impl", ops.available()["dropout"]["cuda"])
def test_row_masks_are_those_of_the_cpu(impl):
    x, rng = torch.ones(130, 777), ops.new_rng(2**40 + 7, 2**33 + 5)
    ours = ops.dropout(x.cuda(), 0.1, rng=rng.cuda(), site=3, impl=impl)
    assert torch.equal(ours.cpu(), ops.dropout(x, 0.1, rng=rng, site=3, impl="reference"))


def test_attention_bytes_are_those_of_the_cpu():
    rng = ops.new_rng(5, 6)
    assert torch.equal(
        philox.attention_bytes(rng.cuda(), 1, 2, 3, 70, 130).cpu(), philox.attention_bytes(rng, 1, 2, 3, 70, 130)
    )


@pytest.mark.parametrize("impl", ops.available()["attention"]["cuda"])
def test_attention_masks_are_those_of_the_cpu(impl):
    """Equal scores, and values that are the unit vectors of the keys: the output shows every decision."""
    S = 64
    qk, v = torch.zeros(S, 2, S), torch.eye(S)[:, None].expand(S, 2, S).contiguous()
    cu, rng = torch.tensor([0, S], dtype=torch.int32), ops.new_rng(3, 4)
    settings = {"dropout_p": 0.1, "site": 2}
    cpu = ops.attention_varlen(qk, qk, v, cu, S, rng=rng, impl="reference", **settings)
    gpu = ops.attention_varlen(qk.cuda(), qk.cuda(), v.cuda(), cu.cuda(), S, rng=rng.cuda(), impl=impl, **settings)
    assert torch.equal(cpu == 0, gpu.cpu() == 0) and (cpu == 0).any()


def test_a_model_has_the_losses_and_gradients_of_the_cpu():
    """With dropout: the masks are the same, so only rounding differs."""
    cpu, data, rng = tiny().train(), batch(), ops.new_rng(0)
    gpu = copy.deepcopy(cpu).cuda()
    losses = [cpu(data, rng=rng).loss, gpu(on_cuda(data), rng=rng.cuda()).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gpu.bank.grads.cpu(), cpu.bank.grads, rtol=1e-3, atol=1e-5
    )  # sums of hundreds of fp32 terms


@pytest.mark.parametrize("impl", ops.available()["duplicate_layers_"]["cuda"])
def test_duplication_follows_the_current_stream(impl):
    bank = torch.zeros(4, 1 << 22, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            bank[0] += 1  # still running when the duplication is queued
        ops.duplicate_layers_(bank, [0, 0, 0, 0], impl=impl)
    torch.cuda.current_stream().wait_stream(side)
    assert (bank == 20).all()


@pytest.mark.parametrize("impl", ops.available()["duplicate_layers_"]["cuda"])
def test_duplication_in_a_cuda_graph(impl):
    bank = torch.arange(8.0, device="cuda").repeat_interleave(1024).view(8, 1024)
    start = bank.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.duplicate_layers_(bank, [0, 1, 2, 3, 0, 1, 2, 3], impl=impl)  # before capture, as torch asks for
    torch.cuda.current_stream().wait_stream(side)
    bank.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.duplicate_layers_(bank, [0, 1, 2, 3, 0, 1, 2, 3], impl=impl)
    bank.copy_(start)
    graph.replay()
    assert torch.equal(bank, start[[0, 1, 2, 3, 0, 1, 2, 3]])


def test_offsets_pass_32_bits():
    """Rows of more than 2^31 bytes: an int offset would wrap."""
    columns = (1 << 29) + 4096
    if torch.cuda.mem_get_info()[0] < 3 * 4 * columns:
        pytest.skip("wants 6.5 GB of free device memory")
    bank = torch.zeros(3, columns, device="cuda")
    bank[0, -1] = 7
    ops.duplicate_layers_(bank, [0, 0, 0])
    assert bank[:, -1].tolist() == [7, 7, 7]
