"""`pytest benchmarks --benchmark-only`: the declarations through pytest-benchmark, for its JSON and its compare.

test_op         each implementation and peer that computes the right thing; one tiny case an op, every shape with --full-shapes
test_host_cost  what a call of ours costs the host: implementation chosen by "auto", inputs so small that little else is left
"""

from __future__ import annotations

import functools

import pytest
import torch

from stackbert_kernels import ops

from .declared import BENCHES
from .harness import BOTH, FORWARD, STEP, Bench, Case, check_all, copied, input_sets, plan, timed
from .table import is_ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def contenders(bench: Bench) -> list[str]:
    """Everything that might run: what cannot is skipped with its reason when its turn comes."""
    available = next(op for op in ops.OPS if op.name == bench.op).available()[DEVICE]
    usable = [name for name in available if DEVICE == "cuda" or name != "triton"]
    return [*(usable if usable == ["reference"] else usable[:-1]), *(peer.name for peer in bench.peers)]


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full-shapes", default=False)
    if metafunc.function is test_op:
        metafunc.parametrize(
            ("bench", "case", "direction", "name"),
            [
                pytest.param(bench, case, direction, name, id=f"{bench.op}-{case}-{direction}-{name}")
                for bench, case in plan(BENCHES, DEVICE, quick=not full)
                for direction in case.directions
                for name in contenders(bench)
            ],
        )
    elif metafunc.function is test_host_cost:
        metafunc.parametrize(
            ("bench", "direction"),
            [
                pytest.param(bench, direction, id=f"{bench.op}-{direction}")
                for bench in BENCHES
                for direction in ((STEP,) if STEP in tiny(bench).directions else (FORWARD, BOTH))
            ],
        )


def tiny(bench: Bench) -> Case:
    return bench.cases(DEVICE, True)[0]


@pytest.fixture(scope="session")
def checked():
    """checked(bench, case) -> inputs and what is right on them. Kept for the tests of one case, which follow each other."""
    pairs = {
        (bench.op, str(case)): (bench, case)
        for quick in (True, False)
        for bench, case in plan(BENCHES, DEVICE, quick=quick)
    }

    @functools.lru_cache(maxsize=1)
    def prepare(op: str, name: str):
        bench, case = pairs[op, name]
        torch.manual_seed(0)
        smaller = bench.checked(case)
        return input_sets(bench, case, DEVICE), check_all(bench, smaller, bench.inputs(smaller, DEVICE), DEVICE)

    return lambda bench, case: prepare(bench.op, str(case))


def test_op(benchmark, checked, bench: Bench, case: Case, direction: str, name: str):
    sets, right = checked(bench, case)
    if name in right.absent:
        pytest.skip(f"{name} absent: {right.absent[name]}")
    if name in right.wrong:
        pytest.fail(f"{name} gets no time: {right.wrong[name]}")
    if is_ours(name):
        if name not in right.ours:
            pytest.skip(f"{name} does not take this case")
        make = functools.partial(_ours, bench, name)
    else:
        make = next(peer.make for peer in right.peers if peer.name == name)
    call = timed(case, direction, make, [copied(t) for t in sets] if direction == STEP else sets)
    benchmark.group = f"{bench.op} {case} {direction}"
    benchmark.extra_info.update(bytes=bench.bytes_moved(case, direction), flops=bench.flops(case, direction))
    benchmark(_to_its_end, call)


def _ours(bench: Bench, impl: str, case: Case, inputs):
    return bench.ours(case, inputs, impl)


def _to_its_end(call) -> None:
    call(0)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def test_host_cost(benchmark, bench: Bench, direction: str):
    case = tiny(bench)
    call = timed(case, direction, functools.partial(_ours, bench, "auto"), [bench.inputs(case, DEVICE)])
    benchmark.group = f"host {direction}"
    if DEVICE == "cuda":  # an empty queue before each call: a full one would make the host wait
        benchmark.pedantic(call, (0,), setup=torch.cuda.synchronize, rounds=300, warmup_rounds=20)
    else:
        benchmark(call, 0)
