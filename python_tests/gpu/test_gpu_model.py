"""The whole model on a GPU beside itself on the CPU."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from gpu_devices import devices
from model.samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.doctor import doctor


def on(device, values):
    tensors = {f.name: getattr(values, f.name) for f in fields(values)}
    return replace(values, **{name: t.to(device.kind) for name, t in tensors.items() if torch.is_tensor(t)})


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("device", devices())
def test_losses_and_gradients_of_the_cpu(device, impl):
    """With dropout: the masks are the same, so only rounding differs."""
    cpu, data, rng = tiny().train(), batch(), ops.new_rng(0)
    cpu.impl = "reference"
    there = copy.deepcopy(cpu).to(device.kind)
    there.impl = impl
    losses = [cpu(data, rng=rng).loss, there(on(device, data), rng=rng.to(device.kind)).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        there.bank.grads.cpu(), cpu.bank.grads, rtol=1e-3, atol=1e-5
    )  # sums of hundreds of terms


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_doctor_finds_every_implementation_right():
    results = [r for r in doctor()["self_test"]["results"] if r["device"].startswith("cuda")]
    assert results and not [r for r in results if not r["passed"]]
