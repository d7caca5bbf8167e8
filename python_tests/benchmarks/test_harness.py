"""The harness: what is wrong gets no time, everyone takes turns, shares and ratios are what they say, bad use is one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import clock, declared, harness
from benchmarks.__main__ import main
from benchmarks.clock import Stats
from benchmarks.harness import BACKWARD, BOTH, FORWARD, FROZEN, STEP, Absent, Bench, Bound, Case, Peer

CASE = Case("16 x 8", {"R": 16, "C": 8}, torch.float32, 0.1)


def doubled(scale: float = 2.0):
    return lambda case, t: lambda: scale * t["x"]


def raising(error: Exception):
    def make(case, t):
        raise error

    return make


def transposed(case, t, as_ours=lambda results: {name: r.t() for name, r in results.items()}):
    """A peer whose tensors are laid out in another way."""
    x = t["x"].detach().t().contiguous().requires_grad_()
    return Bound(lambda: 2 * x, {"x": x}, t["grad"].t(), as_ours)


def out_of_memory_with_dropout(case, t):
    return lambda: raising(MemoryError("no room"))(case, t) if case.p else 2 * t["x"]


PEERS = (
    Peer("torch", doubled()),
    Peer("other layout", transposed),
    Peer("wrong", doubled(2.01)),
    Peer("wrong shape", lambda case, t: transposed(case, t, as_ours=lambda results: results)),
    Peer("not here", raising(Absent("not installed"))),
    Peer("broken", raising(ImportError("undefined symbol\nand more"))),
    Peer("no dropout", lambda case, t: raising(Absent("has no dropout"))(case, t) if case.p else doubled()(case, t)),
    Peer("late", out_of_memory_with_dropout),
)


def bench(ours=None, peers=PEERS, cases=(CASE,)) -> Bench:
    """2 x, whose right implementation is called native or reference."""
    return Bench(
        op="layer_norm",
        folder="layer_norm",
        cases=lambda device, quick: list(cases),
        inputs=lambda case, device: {
            "x": torch.randn(16, 8).to(case.dtype).requires_grad_(),
            "grad": torch.randn(16, 8),
        },
        ours=ours or (lambda case, t, impl: doubled(2.01 if impl == "triton" else 2.0)(case, t)),
        peers=peers,
        bytes_moved=lambda case, direction: 1000,
        flops=lambda case, direction: 2000,
        test="python_tests/ops/test_layer_norm.py",
    )


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setitem(clock.COPY_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(clock.MATMUL_SIZE, "cpu", 8)


@pytest.fixture
def two_implementations(monkeypatch):
    monkeypatch.setattr(harness, "implementations", lambda *_: ["native", "triton"])


# What is timed.


def test_what_is_wrong_gets_no_time_and_is_named(two_implementations):
    rows = harness.measure(bench(), CASE, "cpu", repeats=2)
    assert [row["direction"] for row in rows] == [FORWARD, BACKWARD]
    for row in rows:
        assert row["ours"] == "native"
        assert set(row["wrong"]) == {"triton", "wrong", "wrong shape"}
        assert set(row["seconds"]) == {"native", "torch", "other layout", "copy", "matmul"}
        assert "triton: output is off by" in row["wrong"]["triton"] and "rounding" in row["wrong"]["triton"]


def test_an_absent_peer_says_why(two_implementations):
    row = harness.measure(bench(), CASE, "cpu", repeats=2)[0]
    assert row["absent"] == {
        "not here": "not installed",
        "broken": "ImportError: undefined symbol",
        "no dropout": "has no dropout",
        "late": "MemoryError: no room",
    }
    without = harness.measure(bench(), replace(CASE, p=0.0), "cpu", repeats=2)[0]
    assert "no dropout" in without["seconds"]


def test_a_wrong_gradient_is_found(two_implementations):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2.01 * dy

    def ours(case, t, impl):
        return (lambda: Wrong.apply(t["x"])) if impl == "native" else doubled()(case, t)

    row = harness.measure(bench(ours), CASE, "cpu", repeats=2)[0]
    assert row["ours"] == "triton" and "native: x is off by" in row["wrong"]["native"]


def test_an_implementation_that_raises_or_gives_nan_is_wrong(two_implementations):
    def ours(case, t, impl):
        return {"native": raising(RuntimeError("no kernel")), "triton": doubled(float("nan"))}.get(impl, doubled())(
            case, t
        )

    row = harness.measure(bench(ours), CASE, "cpu", repeats=2)[0]
    assert row["ours"] is None and "native raised RuntimeError: no kernel" in row["wrong"]["native"]
    assert "inf" in row["wrong"]["triton"] and not {"native", "triton"} & set(row["seconds"])


def test_a_failing_baseline_fails_the_case():
    with pytest.raises(RuntimeError, match="plain PyTorch failed: ImportError: gone"):
        harness.measure(bench(peers=(Peer("torch", raising(ImportError("gone"))),)), CASE, "cpu")
    with pytest.raises(RuntimeError, match="the first peer must be 'torch', got 'other'"):
        harness.measure(bench(peers=(Peer("other", doubled()),)), CASE, "cpu")


def test_a_step_has_state_of_its_own_for_each_contender(monkeypatch):
    """Each adds 1 to what it was given; were they to share it, the second would be wrong."""
    monkeypatch.setattr(harness, "implementations", lambda *_: ["native"])

    def step(case, t, impl=None):
        return lambda: {"state": t["state"].add_(1)}

    declaration = replace(
        bench(), inputs=lambda case, device: {"state": torch.zeros(4)}, ours=step, peers=(Peer("torch", step),)
    )
    row = harness.measure(declaration, replace(CASE, p=0.0, directions=(STEP,)), "cpu", repeats=2)[0]
    assert row["wrong"] == {} and set(row["seconds"]) == {"native", "torch", "copy", "matmul"}


@pytest.mark.parametrize(
    ("direction", "wanted"),
    [(FORWARD, ("forward",)), (FROZEN, ("forward",)), (BACKWARD, ("backward",)), (BOTH, ("forward", "backward"))],
)
def test_directions(direction, wanted):
    ran = []

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ran.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            ran.append("backward")
            return 2 * dy

    t = bench().inputs(CASE, "cpu")
    results = []
    call = harness.timed(CASE, direction, lambda case, t: lambda: results.append(y := Recorded.apply(t["x"])) or y, [t])
    ran.clear()
    for i in range(2):
        call(i)
    assert ran == [*wanted, *wanted]
    assert results[-1].requires_grad == (direction != FROZEN)


def test_inputs_rotate_and_large_ones_do_not(monkeypatch):
    monkeypatch.setitem(harness.INPUT_SETS, "cpu", 3)
    sets = harness.input_sets(bench(), CASE, "cpu")
    assert len(sets) == 3 and not torch.equal(sets[0]["x"], sets[1]["x"])
    seen = []
    call = harness.timed(CASE, FORWARD, lambda case, t: lambda: seen.append(t["x"]), sets)
    for i in range(4):
        call(i)
    assert [x is t["x"] for x, t in zip(seen, [*sets, sets[0]], strict=True)] == [True] * 4
    monkeypatch.setattr(harness, "ROTATED_BYTES", 100)
    assert len(harness.input_sets(bench(), CASE, "cpu")) == 1


def test_triton_is_not_timed_on_a_cpu():
    x = {"x": torch.randn(4, 8)}
    for op in ("layer_norm", "dropout"):
        assert "triton" not in harness.implementations(replace(bench(), op=op), CASE, x, "cpu")


# What is made of the time.


def stats(**samples) -> dict[str, Stats]:
    return {name: Stats.of(values) for name, values in samples.items()}


def test_shares_and_ratios_of_known_samples():
    """1,000 bytes where the copy moves 500 bytes a second in the slow round and 1,000 in the fast ones: by rounds, not by medians."""
    checked = harness.Checked(["native", "triton"], [PEERS[0]], {"x": "y"}, {})
    known = stats(
        native=(4.0, 2.0, 2.0),
        triton=(8.0, 2.0, 4.0),
        torch=(12.0, 6.0, 6.0),
        copy=(4.0, 2.0, 2.0),
        matmul=(1.0, 1.0, 1.0),
    )
    row = harness._row(bench(), CASE, BOTH, checked, {"x": "y"}, known, 1000, 2000, {"copy": 2000, "matmul": 8000})
    assert (
        row["share"] == 0.5 and row["bound"] == "copy"
    )  # 1,000 bytes take half the time of the copy's 2,000, and ours as long as it
    assert row["gb_per_s"] == 1000 / 2.0 / 1e9 and row["tflop_per_s"] == 2000 / 2.0 / 1e12
    assert row["ratios"]["torch"]["median"] == 3.0 and row["ratios"]["triton"]["median"] == 2.0
    assert row["ceilings"] == {"copy": 1000.0, "matmul": 8000.0}
    assert row["seconds"]["native"] == {"median": 2.0, "p20": 2.0, "p80": 3.2, "samples": 3}
    busy = harness._row(bench(), CASE, BOTH, checked, {}, known, 10, 8000, {"copy": 2000, "matmul": 8000})
    assert busy["bound"] == "matmul" and busy["share"] == 0.5


def test_contenders_take_turns_in_alternating_order():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "abc"}
    taken = clock.interleave(calls, "cpu", repeats=3, warmup=1)
    warm, rounds = order[:3], order[3:]
    assert [name for name, _ in warm] == list("abc")
    assert "".join(name for name, _ in rounds) == "abccbaabc" and [i for _, i in rounds] == [0] * 3 + [1] * 3 + [2] * 3
    assert {len(s.samples) for s in taken.values()} == {3}


def test_rounds_end_with_the_time_but_two_are_run():
    calls = []
    taken = clock.interleave({"a": calls.append}, "cpu", repeats=50, warmup=3, seconds=0.0)
    assert len(taken["a"].samples) == 2 and calls == [0, 0, 1]  # one to warm up


class FakeCuda:
    """What the clock uses of torch.cuda: a stream that takes 2 ms for a call."""

    def __init__(self, monkeypatch):
        self.log = log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def elapsed_time(self, end):
                return 2.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("sleep", cycles)), raising=False)
        flush = type("Flush", (), {"sum": lambda _: log.append("flush")})()
        monkeypatch.setattr(clock, "_buffer", lambda *_: flush)


def test_a_gpu_call_is_timed_behind_a_sleep_and_a_flush(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    taken = clock.interleave({n: lambda i, n=n: cuda.log.append(n) for n in "ab"}, "cuda", repeats=2, warmup=1)
    assert cuda.log[:4] == ["a", "wait", "b", "wait"]
    sleep = ("sleep", clock.SLEEP_CYCLES)
    one = [[sleep, "flush", "record", name, "record"] for name in "ab"]
    assert cuda.log[4:] == [*one[0], *one[1], "wait", *one[1], *one[0], "wait"]
    assert taken["a"].samples == (0.002, 0.002)


def test_a_call_that_is_slow_to_queue_gets_a_longer_sleep(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    now = iter(range(1000))
    monkeypatch.setattr(
        clock.time, "perf_counter", lambda: next(now)
    )  # a second passes between any two looks at the clock
    clock.interleave({"a": lambda i: None}, "cuda", repeats=2, warmup=1)
    assert ("sleep", int(1.5 * clock.CYCLES_PER_SECOND)) in cuda.log


# Runs.


@pytest.fixture
def fake_measure(monkeypatch):
    """measure() takes ten seconds of a clock that does nothing else; it fails for a case called "bad"."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def measure(bench, case, device, *, repeats, seconds):
        now[0] += 10.0
        if case.name == "bad":
            raise RuntimeError("out of memory\nTried to allocate")
        return [{"case": case.name, "seconds": seconds}]

    monkeypatch.setattr(harness, "measure", measure)


def several(*names: str) -> list[Bench]:
    return [bench(cases=[replace(CASE, name=name, main=name == "main") for name in names])]


def test_the_main_cases_come_first_and_what_the_time_left_out_is_named(fake_measure):
    rows = []
    problems = harness.run(several("a", "b", "main", "c"), "cpu", minutes=0.3, on_rows=rows.extend)
    assert [row["case"] for row in rows] == ["a", "main"]
    assert problems == [f"layer_norm {name} fp32 p=0.1: not run, the time was up" for name in "bc"]
    assert rows[0]["seconds"] == 2 * 18 / 4 and rows[1]["seconds"] == 2 * 8 / 3


def test_a_failing_case_is_named_and_the_others_run(fake_measure):
    rows, shown = [], []
    problems = harness.run(several("bad", "good"), "cpu", on_rows=rows.extend, on_case=shown.append)
    assert problems == ["layer_norm bad fp32 p=0.1: RuntimeError: out of memory"]
    assert [row["case"] for row in rows] == ["good"] and shown[0] == "layer_norm bad fp32 p=0.1"


def test_a_lost_gpu_ends_the_run(fake_measure, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    problems = harness.run(several("bad", "a", "b"), "cuda", on_rows=lambda rows: None)
    assert problems[1:] == [
        "2 further cases: not run, the GPU answers RuntimeError: CUDA error: an illegal memory access was encountered"
    ]


def test_compiling_is_for_the_main_cases_of_a_gpu_or_asked_for():
    def compiled(device, **options):
        return [case.name for _, case in harness.plan(several("a", "main"), device, **options) if case.compile]

    assert compiled("cpu") == [] and compiled("cuda") == ["main"] and compiled("cuda", quick=True) == []
    assert compiled("cpu", compile=True) == ["a", "main"]


# The command.


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments, benches=None):
        if benches:
            monkeypatch.setattr(declared, "BENCHES", tuple(benches))
        code = main([*arguments, "--device", "cpu"] if "--device" not in arguments else list(arguments), prog="bench")
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer_morn"], "unknown op 'layer_morn'; ops are attention, "),
        (["--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--repeats", "many"], "argument --repeats: invalid int value: 'many'"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["layer_norm", "--dtype", "fp16"], "nothing to measure on cpu with --dtype fp16"),
        (["--out", "/proc/version/x"], "--out /proc/version/x: "),
        (["--quiet"], "unrecognized arguments: --quiet"),
    ],
)
def test_bad_use_is_one_line(command, arguments, message):
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and err.startswith(f"bench: {message}") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(command):
    code, _, err = command("--device", "cuda")
    assert code == 2 and err.count("\n") == 1 and "sees no GPU here" in err


def test_only_some_dtypes(command):
    code, out, _ = command("--list", "--dtype", "bf16")
    lines = out.splitlines()
    assert code == 0 and lines and all(" bf16 " in line for line in lines)
    assert len(command("--list", "--dtype", "bf16", "fp32")[1].splitlines()) > len(lines)


def test_a_wrong_implementation_fails_the_command(command, monkeypatch):
    monkeypatch.setattr(harness, "implementations", lambda *_: ["native", "triton"])
    code, out, _ = command("--repeats", "2", benches=[bench()])
    assert code == 1 and "layer_norm: triton got no time: triton: output is off by" in out
    code, out, _ = command("--repeats", "2", benches=[bench(ours=lambda case, t, impl: doubled()(case, t))])
    assert code == 0 and "layer_norm: wrong got no time" in out and "not here absent: not installed" in out
