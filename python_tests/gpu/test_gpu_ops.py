"""Every op and implementation: against float64, the same bits on every repeat, on another stream, in a CUDA graph, forward only."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from gpu_cases import DTYPES, STEP, Case, cases, exact, inputs, integers, results, rng_on
from gpu_devices import SEES_GPU, takes, targets
from torch import Tensor

from stackbert_kernels import doctor, ops

# The largest error as a multiple of the dtype's epsilon, in terms of the largest exact value. Row ops compute in fp32 and round once, in fp32 after
# sums of up to a thousand terms; matrix products round probabilities or logits in between. The ops' own tests hold them to PyTorch's
# error; here a broken kernel has to be told from a sound one on another machine: a wrong mask bit or index is at 50 or more.
EPSILONS = {
    "attention": {"fp32": 40, "bf16": 16, "fp16": 16},
    "masked_lm_loss": {"fp32": 40, "bf16": 16, "fp16": 16},
}
ROW_EPSILONS = {"fp32": 40, "bf16": 3, "fp16": 3}


def parameters(*, dtypes=("fp32",), only=lambda case: True) -> list:
    """`device, impl, case, dtype` for all that there is. What an implementation does not take is a skip on a GPU, where that is news."""
    return list(chain.from_iterable(_of(target, dtypes, only) for target in targets()))


def _of(target, dtypes, only) -> list:
    device, op, impl = target.values
    return [
        pytest.param(device, impl, case, dtype, id=f"{target.id}-{case.name}-{dtype}", marks=target.marks)
        for case in cases(op, device.kind)
        for dtype in dtypes
        if only(case) and (device.kind == "cuda" or rehearsed(case, impl, dtype))
    ]


def rehearsed(case: Case, impl: str, dtype: str) -> bool:
    """Triton's interpreter is right in fp32 alone, and slow: one case of each op."""
    if impl == "triton" and (dtype != "fp32" or case is not cases(case.op, "cpu")[0]):
        return False
    return not takes(case.op, impl, torch.empty(2, 2, dtype=DTYPES[dtype]))


def taken(case: Case, device, impl: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Its tensors on the device; the test is skipped where the implementation, as it says itself, does not take them."""
    tensors = inputs(case, device.kind, DTYPES[dtype])
    reason = takes(case.op, impl, next(iter(tensors.values())))
    if reason:
        pytest.skip(reason)
    return tensors, integers(case, device.kind)


def assert_same_bits(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, w in wanted.items():
        if not torch.equal(actual[name], w):
            pytest.fail(f"{name} differs in {(actual[name] != w).sum()} of {w.numel()} elements")


def assert_near(actual: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, epsilons: float) -> None:
    assert actual.keys() == wanted.keys()
    for name, e in wanted.items():
        a = actual[name]
        assert a.shape == e.shape and torch.isfinite(a).all(), f"{name}: wrong shape or not finite"
        error = (a.double().cpu() - e).abs().max().item()
        allowed = epsilons * torch.finfo(dtype).eps * e.abs().max().item()
        assert error <= allowed, f"{name}: off by {error:.2e}, rounding explains {allowed:.2e}"


@pytest.mark.gpu
def test_there_is_a_gpu():
    """Else the tests below are rehearsals alone."""
    if not SEES_GPU:
        pytest.skip("torch sees no CUDA device")
    assert any(target.values[0].kind == "cuda" for target in targets())


def test_the_doctor_calls_every_op():
    """An op without a case of its own is tested with the doctor's."""
    assert set(doctor.cases()) == set(ops.available())


@pytest.mark.parametrize(("device", "impl", "case", "dtype"), parameters(dtypes=tuple(DTYPES)))
def test_oracle(device, impl, case, dtype):
    tensors, whole = taken(case, device, impl, dtype)
    actual = results(case, tensors, whole, rng_on(device.kind), impl)
    assert_near(actual, exact(case, device.kind), DTYPES[dtype], EPSILONS.get(case.op, ROW_EPSILONS)[dtype])


@pytest.mark.parametrize(("device", "impl", "case", "dtype"), parameters(dtypes=("fp32", "bf16")))
def test_repeats_give_the_same_bits(device, impl, case, dtype):
    tensors, whole = taken(case, device, impl, dtype)
    first = results(case, tensors, whole, rng_on(device.kind), impl)
    for _ in range(device.repeats - 1):
        assert_same_bits(results(case, tensors, whole, rng_on(device.kind), impl), first)


@pytest.mark.parametrize(("device", "impl", "case", "dtype"), parameters(only=lambda case: not case.big))
def test_forward_only_gives_the_same_bits(device, impl, case, dtype):
    tensors, whole = taken(case, device, impl, dtype)
    trained = case.call(tensors, whole, rng_on(device.kind), impl).detach()
    with torch.no_grad():
        alone = case.call(tensors, whole, rng_on(device.kind), impl)
    assert_same_bits({"output": alone}, {"output": trained})


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "another stream"])
@pytest.mark.parametrize(("device", "impl", "case", "dtype"), parameters(only=lambda case: not case.big))
def test_follows_the_current_stream(device, impl, case, dtype, side):
    """The inputs arrive late on the stream: a kernel on any other one would read what was there before, NaN."""
    tensors, whole = taken(case, device, impl, dtype)
    rng = rng_on(device.kind)
    wanted = results(case, tensors, whole, rng, impl)
    late = {name: torch.full_like(t, float("nan")).requires_grad_() for name, t in tensors.items()}
    device.synchronize()

    def queued() -> dict[str, Tensor]:
        device.delay()
        with torch.no_grad():
            for name, t in late.items():
                t.copy_(tensors[name])
        return {name: result.clone() for name, result in results(case, late, whole, rng, impl).items()}

    if side:
        with device.other_stream():
            actual = queued()
    else:
        actual = queued()
    device.synchronize()
    assert_same_bits(actual, wanted)


@pytest.mark.parametrize(
    ("device", "impl", "case", "dtype"), parameters(only=lambda case: case.static and not case.big)
)
def test_in_a_graph(device, impl, case, dtype):
    """Captured once, replayed on other values and at later steps: the results are those of calls outside the graph, with new masks."""
    tensors, whole = taken(case, device, impl, dtype)
    start = {name: t.detach().clone() for name, t in tensors.items()}
    rng = rng_on(device.kind)
    names: list[str] = []

    def step() -> list[Tensor]:
        found = results(case, tensors, whole, rng, impl)
        names[:] = found
        return list(found.values())

    outputs, replay = device.captured(step)
    seen = []
    for i, factor in enumerate((1.0, -1.0, -1.0)):
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(factor * start[name])
        rng[1].fill_(STEP + i)
        replay()
        device.synchronize()
        replayed = {name: output.clone() for name, output in zip(names, outputs, strict=True)}
        assert_same_bits(replayed, results(case, tensors, whole, rng_on(device.kind, STEP + i), impl))
        seen.append(replayed["output"])
    if case.random:
        assert not torch.equal(seen[1], seen[2]), "the same mask at two steps"
    if case.op != "layer_norm" or case.tensors["x"].numel() > 1:
        assert not torch.equal(seen[0], seen[1]), "the graph kept the values of its capture"
