"""A benchmark is a declaration; the harness checks it against float64, then times ours and the peers in turn.

    BENCH = Bench(op="layer_norm", folder="layer_norm", cases=cases, inputs=inputs, ours=ours, peers=PEERS,
                  bytes_moved=bytes_moved, flops=flops, test="python_tests/ops/test_layer_norm.py")

What is wrong gets no time. Dropout is checked by our own reference, which draws the same mask; a peer draws others, so it is checked with
the dropout switched off. Each row of a result says how long ours and each peer took, what share that is of the ceiling which was measured
in the same rounds (a large copy for bytes, a large matrix product for FLOPs), and how many times faster than each peer ours is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stackbert_kernels import ops

from .clock import Stats, copy_ceiling, interleave, matmul_ceiling, ratio

FORWARD, BACKWARD, BOTH, FROZEN, STEP = "forward", "backward", "forward + backward", "frozen forward", "step"
COPY, MATMUL = "copy", "matmul"  # the ceilings, among the candidates
INPUT_SETS = {"cuda": 3, "cpu": 1}
BASELINE = "torch"  # the peer that every declaration has: plain PyTorch, the measure of accuracy


class Absent(Exception):
    """A peer cannot run here: not installed, or it does not support this case. The message says why."""


class Wrong(Exception):
    """A candidate's results differ from float64 by more than its dtype explains."""


@dataclass(frozen=True)
class Case:
    """One thing to time: sizes by name, and the directions in which it is timed.

    FORWARD keeps what backward needs, FROZEN is the forward pass under no_grad, STEP has no gradient at all.
    """

    name: str
    sizes: Mapping[str, object]
    dtype: torch.dtype
    p: float = 0.0
    directions: tuple[str, ...] = (FORWARD, BACKWARD)
    options: Mapping[str, object] = field(default_factory=dict)

    def __getitem__(self, size: str):
        return self.sizes[size]

    def __str__(self) -> str:
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        return f"{self.name} {dtype_name(self.dtype)} p={self.p:g}{options}"


Inputs = dict[str, object]  # tensors and settings by name; `grad` is the incoming gradient of the output
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """`make(case, inputs)` binds the peer to one set of inputs, and raises Absent where it cannot run."""

    name: str
    make: Callable[[Case, Inputs], Call]


@dataclass(frozen=True)
class Bench:
    """The declaration of an op's benchmark.

    cases(device, quick)          what to time there; quick: a few small ones
    inputs(case, device)          one set of random inputs; floating leaves that require grad are differentiated
    ours(case, inputs, impl)      binds our op
    bytes_moved(case, direction)  the fewest bytes: each input read once, each output written once
    flops(case, direction)        the arithmetic of matrix products, 0 where memory is the bound
    folder                        of its sources, in csrc/ and stackbert_kernels/ops/
    test                          the file that proves it
    """

    op: str
    folder: str
    cases: Callable[[str, bool], list[Case]]
    inputs: Callable[[Case, str], Inputs]
    ours: Callable[[Case, Inputs, str], Call]
    peers: Sequence[Peer]
    bytes_moved: Callable[[Case, str], int]
    flops: Callable[[Case, str], int]
    test: str


def dtype_name(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(name := str(dtype)[6:], name)


def implementations(bench: Bench, case: Case, inputs: Inputs, device: str) -> list[str]:
    """Ours that can run this case, without the reference where there is anything better."""
    op = next(op for op in ops.OPS if op.name == bench.op)
    tensor = next(v for v in inputs.values() if torch.is_tensor(v) and v.is_floating_point())
    usable = [i for i in op.available()[device] if i not in op.explain(tensor).why_not]
    return [i for i in usable if i != "reference"] or usable


# Correctness.


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {name: v for name, v in inputs.items() if torch.is_tensor(v) and v.requires_grad}


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """A copy whose leaves require grad as these do; `dtype` for every floating tensor."""

    def copy(value):
        if not torch.is_tensor(value):
            return value
        new = value.detach().to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)
        return new.requires_grad_(value.requires_grad)

    return {name: copy(value) for name, value in inputs.items()}


def results(call: Call, inputs: Inputs) -> dict[str, Tensor]:
    """The output and the gradient of every leaf, by name."""
    out = call()
    wanted = leaves(inputs)
    if not wanted:
        return {"output": out.detach().clone()}
    gradients = torch.autograd.grad(out, list(wanted.values()), inputs["grad"])
    return {"output": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def largest_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute error of each result; infinite where a shape differs or something is not finite."""

    def error(a: Tensor, e: Tensor) -> float:
        if a.shape != e.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        return float((a.double() - e).abs().max()) if a.numel() else 0.0

    return {name: error(actual[name], e) for name, e in exact.items()}


def check(
    name: str, actual: dict[str, Tensor], exact: dict[str, Tensor], baseline: dict[str, float], slack: float
) -> None:
    """At most `slack` times PyTorch's own error for the output, half as much again for gradients, and one ulp of the largest value."""
    for result, error in largest_errors(actual, exact).items():
        largest = float(exact[result].abs().max()) if exact[result].numel() else 0.0
        ulp = torch.finfo(actual[result].dtype).eps * largest
        allowed = slack * (1.0 if result == "output" else 1.5) * baseline[result] + ulp
        if not error <= allowed:
            raise Wrong(f"{name}: {result} is off by {error:.3g}, at most {allowed:.3g} is explained by rounding")


OURS_SLACK, PEER_SLACK = 2.0, 8.0


@dataclass
class Checked:
    """The candidates that computed the right thing, and why the others are out."""

    ours: list[str]
    peers: list[Peer]
    absent: dict[str, str]
    wrong: dict[str, str]


def check_all(bench: Bench, case: Case, inputs: Inputs, device: str) -> Checked:
    exact_inputs = copied(inputs, torch.float64)
    without = replace(case, p=0.0)
    exact = results(bench.ours(without, exact_inputs, "reference"), exact_inputs)
    checked = Checked([], [], {}, {})

    baseline = None
    for peer in bench.peers:
        own = copied(inputs)
        try:
            call = peer.make(without, own)
            actual = results(call, own)
            if baseline is None:
                if peer.name != BASELINE:
                    raise ValueError(f"{bench.op}: the first peer must be {BASELINE!r}, got {peer.name!r}")
                baseline = largest_errors(actual, exact)
            check(peer.name, actual, exact, baseline, PEER_SLACK)
            if case.p:
                peer.make(case, own)
            checked.peers.append(peer)
        except Absent as reason:
            checked.absent[peer.name] = str(reason)
        except Wrong as reason:
            checked.wrong[peer.name] = str(reason)
        except Exception as error:  # somebody else's code: it never makes our benchmark fail
            checked.absent[peer.name] = f"{type(error).__name__}: {_first_line(error)}"
    if baseline is None:
        raise RuntimeError(f"{bench.op} {case}: plain PyTorch failed: {checked.absent.get(BASELINE)}")

    if case.p:
        exact = results(bench.ours(case, exact_inputs, "reference"), exact_inputs)
        baseline = {
            name: error / (1.0 - case.p) for name, error in baseline.items()
        }  # what is kept is scaled up, its error too
    for impl in implementations(bench, case, inputs, device):
        own = copied(inputs)
        try:
            check(impl, results(bench.ours(case, own, impl), own), exact, baseline, OURS_SLACK)
            checked.ours.append(impl)
        except Wrong as reason:
            checked.wrong[impl] = str(reason)
    return checked


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:160]


# Time.


def timed(
    case: Case, direction: str, bind: Callable[[Case, Inputs], Call], sets: list[Inputs]
) -> Callable[[int], object]:
    """call(round) for one candidate, on the sets of inputs in turn."""
    calls = [_in_direction(direction, bind(case, inputs), inputs) for inputs in sets]
    return lambda i: calls[i % len(calls)]()


def _in_direction(direction: str, call: Call, inputs: Inputs) -> Callable[[], object]:
    wanted = list(leaves(inputs).values())
    if direction in (FORWARD, STEP):
        return call
    if direction == FROZEN:
        return torch.no_grad()(call)
    if direction == BOTH:
        return lambda: torch.autograd.grad(call(), wanted, inputs["grad"])
    out = call()
    return lambda: torch.autograd.grad(out, wanted, inputs["grad"], retain_graph=True)


def measure(bench: Bench, case: Case, device: str, *, repeats: int = 30, seconds: float = 1e9) -> list[dict]:
    """The rows of a case, one a direction."""
    torch.manual_seed(0)
    sets = [bench.inputs(case, device) for _ in range(INPUT_SETS[device])]
    checked = check_all(bench, case, sets[0], device)
    rows = []
    for direction in case.directions:
        calls = {
            impl: timed(case, direction, lambda c, i, impl=impl: bench.ours(c, i, impl), sets) for impl in checked.ours
        }
        absent = dict(checked.absent)
        for peer in checked.peers:
            own = [copied(inputs) for inputs in sets] if direction == STEP else sets
            try:
                call = timed(case, direction, peer.make, own)
                call(0)
                calls[peer.name] = call
            except Exception as error:
                absent[peer.name] = f"{type(error).__name__}: {_first_line(error)}"
        ceilings = {}
        if nbytes := bench.bytes_moved(case, direction):
            calls[COPY], ceilings[COPY] = copy_ceiling(device)
        if flops := bench.flops(case, direction):
            calls[MATMUL], ceilings[MATMUL] = matmul_ceiling(device, case.dtype)
        stats = interleave(calls, device, repeats=repeats, seconds=seconds / len(case.directions))
        rows.append(_row(bench, case, direction, checked, absent, stats, nbytes, flops, ceilings))
        del calls
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


def _row(
    bench: Bench, case: Case, direction: str, checked: Checked, absent: dict[str, str], stats: dict[str, Stats],
    nbytes: int, flops: int, ceilings: dict[str, int],
) -> dict:  # fmt: skip
    """What is written down about one case in one direction. Rates are those of `ours`: the implementation that impl="auto" takes."""
    row = {
        "op": bench.op, "case": case.name, "sizes": dict(case.sizes), "dtype": dtype_name(case.dtype), "p": case.p,
        "options": dict(case.options), "direction": direction, "bytes": nbytes, "flops": flops,
        "ours": checked.ours[0] if checked.ours else None,
        "seconds": {name: s.as_dict() for name, s in stats.items()},
        "absent": absent, "wrong": checked.wrong,
        "ceilings": {name: amount / stats[name].median for name, amount in ceilings.items()},
    }  # fmt: skip
    if not checked.ours:
        return row
    ours = checked.ours[0]
    floor = {COPY: nbytes, MATMUL: flops}
    shares = {
        name: Stats.of([
            floor[name] / amount * a / b for a, b in zip(stats[name].samples, stats[ours].samples, strict=True)
        ])
        for name, amount in ceilings.items()
    }  # fmt: skip
    bound = max(shares, key=lambda name: shares[name].median) if shares else None
    peers = [peer.name for peer in checked.peers if peer.name in stats]
    return row | {
        "bound": bound,
        "share": shares[bound].median if bound else None,
        "gb_per_s": nbytes / stats[ours].median / 1e9,
        "tflop_per_s": flops / stats[ours].median / 1e12,
        "ratios": {name: ratio(stats, name, ours).as_dict() for name in (*peers, *checked.ours[1:])},
    }


def run(
    benches: Sequence[Bench],
    device: str,
    *,
    quick: bool = False,
    repeats: int = 30,
    minutes: float | None = None,
    keep: Callable[[Case], bool] = lambda case: True,
    on_rows: Callable[[list[dict]], None],
    on_case: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Every case of every declaration, most important first; `on_rows` gets each case's rows as soon as they exist.

    Returns what was left out or failed, a line each: time was up, or a case raised.
    """
    cases = [(bench, case) for bench in benches for case in bench.cases(device, quick) if keep(case)]
    end = time.perf_counter() + 60 * minutes if minutes else None
    problems = []
    for i, (bench, case) in enumerate(cases):
        left = end - time.perf_counter() if end else None
        if left is not None and left <= 0:
            problems.append(f"{bench.op} {case}: not run, the time was up")
            continue
        on_case(f"{bench.op} {case}")
        # A case may use twice its even share: later ones are shorter, and what is not used flows on.
        seconds = 2 * left / (len(cases) - i) if left is not None else 1e9
        try:
            on_rows(measure(bench, case, device, repeats=repeats, seconds=seconds))
        except Exception as error:
            problems.append(f"{bench.op} {case}: {type(error).__name__}: {_first_line(error)}")
            gc.collect()
    return problems
