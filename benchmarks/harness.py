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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stackbert_kernels import ops

from .clock import Stats, copy_ceiling, interleave, matmul_ceiling, ratio

FORWARD, BACKWARD, BOTH, FROZEN, STEP = "forward", "backward", "forward + backward", "frozen forward", "step"
COPY, MATMUL = "copy", "matmul"  # the ceilings, among the candidates
INPUT_SETS = {"cuda": 3, "cpu": 1}
ROTATED_BYTES = 1 << 30  # a set of inputs above this leaves nothing in a cache: one is enough
ROW_SECONDS = {"cuda": 1e9, "cpu": 1.5}  # on a CPU, rounds stop after so long
BASELINE = "torch"  # the peer that every declaration has: plain PyTorch, the measure of accuracy


class Absent(Exception):
    """A peer cannot run here: not installed, or it does not support this case. The message says why."""


class Wrong(Exception):
    """A candidate's results differ from float64 by more than its dtype explains."""


@dataclass(frozen=True)
class Case:
    """One thing to time: sizes by name, and the directions in which it is timed.

    FORWARD keeps what backward needs, FROZEN is the forward pass under no_grad, STEP has no gradient at all.
    main     measured before the other cases of every op
    compile  whether compiling a peer is worth its time; `plan` has the last word
    """

    name: str
    sizes: Mapping[str, object]
    dtype: torch.dtype
    p: float = 0.0
    directions: tuple[str, ...] = (FORWARD, BACKWARD)
    options: Mapping[str, object] = field(default_factory=dict)
    main: bool = False
    compile: bool = False

    def __getitem__(self, size: str):
        return self.sizes[size]

    def __str__(self) -> str:
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        return f"{self.name} {dtype_name(self.dtype)} p={self.p:g}{options}"


Inputs = dict[str, object]  # tensors and settings by name; `grad` is the incoming gradient of the output
Results = dict[str, Tensor]  # the output, and the gradient of every leaf by its name; or what a step wrote, by name
Call = Callable[[], Tensor | Results]


@dataclass(frozen=True)
class Bound:
    """A call on tensors of its own layout: `as_ours` turns its results into what ours give. A plain Call works on the inputs themselves."""

    call: Call
    leaves: dict[str, Tensor]
    grad: Tensor | None
    as_ours: Callable[[Results], Results]


def bound(candidate: Call | Bound, inputs: Inputs) -> Bound:
    if isinstance(candidate, Bound):
        return candidate
    return Bound(candidate, leaves(inputs), inputs.get("grad"), lambda results: results)


@dataclass(frozen=True)
class Peer:
    """`make(case, inputs)` binds the peer to one set of inputs, and raises Absent where it cannot run."""

    name: str
    make: Callable[[Case, Inputs], Call | Bound]


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
    checked(case)                 the case that is checked in place of one too large for float64
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
    checked: Callable[[Case], Case] = lambda case: case


def dtype_name(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(name := str(dtype)[6:], name)


def implementations(bench: Bench, case: Case, inputs: Inputs, device: str) -> list[str]:
    """Ours that can run this case, without the reference where there is anything better."""
    op = next(op for op in ops.OPS if op.name == bench.op)
    tensor = next(v for v in inputs.values() if torch.is_tensor(v) and v.is_floating_point())
    usable = [i for i in op.available()[device] if i not in op.explain(tensor).why_not]
    if device == "cpu":  # there Triton is interpreted, for tests
        usable = [i for i in usable if i != "triton"]
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


def results(candidate: Bound) -> Results:
    """As ours lay them out."""
    out = candidate.call()
    if not torch.is_tensor(out):
        return {name: value.detach() for name, value in out.items()}
    if not candidate.leaves:
        return {"output": out.detach()}
    gradients = torch.autograd.grad(out, list(candidate.leaves.values()), candidate.grad)
    return candidate.as_ours({"output": out.detach(), **dict(zip(candidate.leaves, gradients, strict=True))})


def largest_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute error of each result; infinite where a shape differs or something is not finite."""

    def error(a: Tensor, e: Tensor) -> float:
        if a.shape != e.shape or not bool(torch.isfinite(a).all()):
            return float("inf")
        return float((a.double() - e).abs().max()) if a.numel() else 0.0

    return {name: error(actual[name], e) for name, e in exact.items()}


def check(name: str, case: Case, actual: Results, exact: Results, baseline: dict[str, float], slack: float) -> None:
    """At most `slack` times PyTorch's own error for the output, half as much again for gradients, and one ulp of the largest value.

    A scalar is a mean of values of the case's dtype: PyTorch's error may be far below theirs by luck, so the ulp is that of the case.
    Dropout has a second ulp: its scale is no power of two, so that each kept value is rounded, which PyTorch without dropout does not do.
    """
    for result, error in largest_errors(actual, exact).items():
        largest = float(exact[result].abs().max()) if exact[result].numel() else 0.0
        dtype = actual[result].dtype if exact[result].dim() else case.dtype
        ulp = torch.finfo(dtype).eps * largest * (2 if case.p else 1)
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


@contextmanager
def _one_thread():
    """For the reference's many small operations: where others use the machine, threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_all(bench: Bench, case: Case, inputs: Inputs, device: str) -> Checked:
    exact_inputs = copied(inputs, torch.float64)
    without = replace(case, p=0.0)

    def by_reference(case: Case, inputs: Inputs) -> Results:
        with _one_thread():
            return results(bound(bench.ours(case, inputs, "reference"), inputs))

    exact = by_reference(without, exact_inputs)
    checked = Checked([], [], {}, {})

    baseline = None
    for peer in bench.peers:
        own = copied(inputs)
        try:
            candidate = bound(peer.make(case, own), own)
            if case.p:
                candidate = bound(peer.make(without, own), own)
            actual = results(candidate)
            if baseline is None:
                if peer.name != BASELINE:
                    raise ValueError(f"{bench.op}: the first peer must be {BASELINE!r}, got {peer.name!r}")
                baseline = largest_errors(actual, exact)
            check(peer.name, without, actual, exact, baseline, PEER_SLACK)
            checked.peers.append(peer)
        except Absent as reason:
            checked.absent[peer.name] = str(reason)
        except Wrong as reason:
            checked.wrong[peer.name] = str(reason)
        except Exception as error:  # somebody else's code: it never makes our benchmark fail
            checked.absent[peer.name] = f"{type(error).__name__}: {_first_line(error)}"
        if baseline is None:
            raise RuntimeError(f"{bench.op} {case}: plain PyTorch failed: {checked.absent.get(peer.name)}")

    if case.p:
        # PyTorch draws other masks, so its error with dropout is not known: that without, scaled as what is kept is; or that of our
        # reference, which is plain PyTorch with this mask.
        exact = by_reference(case, exact_inputs)
        plain = largest_errors(by_reference(case, copied(inputs)), exact)
        baseline = {name: max(e / (1.0 - case.p), plain[name]) for name, e in baseline.items()}
    for impl in implementations(bench, case, inputs, device):
        own = copied(inputs)
        try:
            actual = results(bound(bench.ours(case, own, impl), own))
            check(impl, case, actual, exact, baseline, OURS_SLACK)
            checked.ours.append(impl)
        except Wrong as reason:
            checked.wrong[impl] = str(reason)
        except Exception as error:
            checked.wrong[impl] = f"{impl} raised {type(error).__name__}: {_first_line(error)}"
    return checked


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:160]


# Time.


def timed(
    case: Case, direction: str, make: Callable[[Case, Inputs], Call | Bound], sets: list[Inputs]
) -> Callable[[int], object]:
    """call(round) for one candidate, on the sets of inputs in turn."""
    calls = [_in_direction(direction, bound(make(case, inputs), inputs)) for inputs in sets]
    return lambda i: calls[i % len(calls)]()


def _in_direction(direction: str, candidate: Bound) -> Callable[[], object]:
    call, wanted, grad = candidate.call, list(candidate.leaves.values()), candidate.grad
    if direction in (FORWARD, STEP):
        return call
    if direction == FROZEN:
        return torch.no_grad()(call)
    if direction == BOTH:
        return lambda: torch.autograd.grad(call(), wanted, grad)
    out = call()
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def input_sets(bench: Bench, case: Case, device: str) -> list[Inputs]:
    """The sets of inputs that the calls of a case rotate through."""
    first = bench.inputs(case, device)
    nbytes = sum(v.nbytes for v in first.values() if torch.is_tensor(v))
    more = INPUT_SETS[device] - 1 if nbytes <= ROTATED_BYTES else 0
    return [first, *(bench.inputs(case, device) for _ in range(more))]


def measure(bench: Bench, case: Case, device: str, *, repeats: int = 30, seconds: float = 1e9) -> list[dict]:
    """The rows of a case, one a direction."""
    torch.manual_seed(0)
    if device == "cuda" or case.compile:
        torch.compiler.reset()  # what earlier cases compiled counts towards the limit after which torch silently runs eagerly
    smaller = bench.checked(case)
    sets = input_sets(bench, case, device)
    checked = check_all(bench, smaller, sets[0] if smaller == case else bench.inputs(smaller, device), device)
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
                for i in range(len(own)):
                    call(i)
                if device == "cuda":
                    torch.cuda.synchronize()  # what it did wrong shows here
                calls[peer.name] = call
            except Exception as error:
                absent[peer.name] = f"{type(error).__name__}: {_first_line(error)}"
        ceilings = {}
        if nbytes := bench.bytes_moved(case, direction):
            calls[COPY], ceilings[COPY] = copy_ceiling(device)
        if flops := bench.flops(case, direction):
            calls[MATMUL], ceilings[MATMUL] = matmul_ceiling(device, case.dtype)
        longest = min(ROW_SECONDS[device], seconds / len(case.directions))
        stats = interleave(calls, device, repeats=repeats, seconds=longest)
        rows.append(_row(bench, case, direction, checked, absent, stats, nbytes, flops, ceilings))
        calls = call = own = None  # their graphs and buffers make room for the next direction
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


def plan(
    benches: Sequence[Bench],
    device: str,
    *,
    quick: bool = False,
    keep: Callable[[Case], bool] = lambda case: True,
    compile: bool = False,
) -> list[tuple[Bench, Case]]:
    """Every case of every declaration; first the main ones and at least one of each op. On a GPU peers are compiled for these and where the case says so; with
    `compile` for all of them."""
    declared = [[(bench, case) for case in bench.cases(device, quick) if keep(case)] for bench in benches]
    first = [(bench, case) for pairs in declared for i, (bench, case) in enumerate(pairs) if case.main or i == 0]
    later = [(bench, case) for pairs in declared for i, (bench, case) in enumerate(pairs) if not case.main and i > 0]
    return [
        (bench, replace(case, compile=compile or (device == "cuda" and not quick and (case.main or case.compile))))
        for bench, case in (*first, *later)
    ]


def run(
    benches: Sequence[Bench],
    device: str,
    *,
    quick: bool = False,
    repeats: int = 30,
    minutes: float | None = None,
    keep: Callable[[Case], bool] = lambda case: True,
    compile: bool = False,
    on_rows: Callable[[list[dict]], None],
    on_case: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Every case of the plan; `on_rows` gets each case's rows as soon as they exist.

    Returns what was left out or failed, a line each: time was up, or a case raised.
    """
    cases = plan(benches, device, quick=quick, keep=keep, compile=compile)
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
            if device == "cuda" and (lost := _gpu_lost()):
                return [*problems, f"{len(cases) - i - 1} further cases: not run, the GPU answers {lost}"]
    return problems


def _gpu_lost() -> str | None:
    """What an error has left behind: after an illegal access nothing runs in this process any more."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return None
