"""The declarations: one for every op, BERT's shapes, floors as on paper, and every implementation right by the benchmark's own check."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention, bench_optimizer, harness, lengths
from benchmarks.__main__ import main
from benchmarks.declared import BENCHES
from benchmarks.harness import BACKWARD, BOTH, FORWARD, FROZEN, STEP, Bench, Case
from benchmarks.table import is_ours
from stackbert_kernels import ops

ROOT = Path(__file__).parents[2]
BY_OP = {bench.op: bench for bench in BENCHES}
COPY, MATMUL = 4.3e12, 790e12  # bytes and FLOPs a second of an H200


def test_every_op_has_one_declaration():
    assert sorted(bench.op for bench in BENCHES) == sorted(op.name for op in ops.OPS)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.op)
def test_what_a_declaration_names_exists(bench: Bench):
    assert (ROOT / bench.test).is_file()
    assert (ROOT / "stackbert_kernels/ops" / bench.folder / "op.py").is_file()
    assert (ROOT / "csrc" / bench.folder).is_dir()
    assert (ROOT / f"benchmarks/bench_{bench.folder}.py").is_file()
    names = [peer.name for peer in bench.peers]
    assert names[0] == harness.BASELINE and len(set(names)) == len(names) and not any(map(is_ours, names))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.op)
def test_cases_are_told_apart_and_have_a_floor(bench: Bench, device: str):
    cases = bench.cases(device, False)
    assert len({str(case) for case in cases}) == len(cases)
    assert len(bench.cases(device, True)) == 1 and not any(case.main for case in bench.cases("cpu", False))
    for case in cases:
        for direction in case.directions:
            assert bench.bytes_moved(case, direction) > 0 and bench.flops(case, direction) >= 0


def test_a_gpu_measures_the_shapes_of_bert():
    def of(op: str, *names: str) -> set:
        return {tuple(case[name] for name in names) for case in BY_OP[op].cases("cuda", False)}

    attention = BY_OP["attention"].cases("cuda", False)
    assert {(case["H"], case["S"]) for case in attention if case["mix"] == "equal"} >= {
        *((12, S) for S in (128, 256, 384, 512)),
        (16, 128),
        (16, 512),
    }
    assert {case["D"] for case in attention} == {64} and "natural" in {case["mix"] for case in attention}
    assert {case["T"] for case in attention} == {65536}
    for op in ("layer_norm", "dropout_add_layer_norm", "dropout_add", "dropout"):
        assert of(op, "R", "C") == {(65536, 768), (65536, 1024)}
    assert of("bias_gelu", "R", "C") == {(65536, 3072), (65536, 4096)}
    assert of("masked_lm_loss", "R", "C", "V") == {(9830, 768, 30528), (9830, 1024, 30528)}
    assert of("embedding_layer_norm", "T", "C", "V") == {(65536, 768, 30528), (65536, 1024, 30528)}
    assert {L for (L,) in of("duplicate_layers_", "L")} == {3, 6, 12}
    sizes = {round(bench_optimizer.elements(case) / 1e6) for case in BY_OP["adamw_"].cases("cuda", False)}
    assert sizes == {110, 336}
    for op in ("attention", "dropout_add_layer_norm"):
        assert {case.p for case in BY_OP[op].cases("cuda", False)} == {0.0, 0.1}
    for op in ("attention", "dropout_add_layer_norm", "layer_norm", "bias_gelu", "masked_lm_loss"):
        assert {case.dtype for case in BY_OP[op].cases("cuda", False)} == {torch.bfloat16, torch.float16}


def test_the_most_important_comes_first():
    planned = [(bench.op, case) for bench, case in harness.plan(BENCHES, "cuda")]
    first = [op for op, _ in planned[: len(BENCHES) + 1]]  # attention has two main cases
    assert first == ["attention", *(bench.op for bench in BENCHES)]
    assert first[2:6] == ["dropout_add_layer_norm", "masked_lm_loss", "bias_gelu", "adamw_"]
    assert not any(case.main for _, case in planned[len(first) :])
    assert [(c["S"], c.p, c.dtype) for _, c in planned[:2]] == [(128, 0.1, torch.bfloat16), (512, 0.1, torch.bfloat16)]
    assert [op for op, case in planned if case.compile and not case.main] == [
        "attention"
    ] * 2  # FlexAttention, without dropout
    assert all(case.compile for _, case in planned if case.main)


def microseconds(bench: Bench, case: Case, direction: str) -> float:
    return 1e6 * max(bench.bytes_moved(case, direction) / COPY, bench.flops(case, direction) / MATMUL)


# What an H200 needs at least for 65,536 tokens in bf16, in us, each worked out by hand: tensors of 65,536 x 768 are 100.7 MB, and so on.
@pytest.mark.parametrize(
    ("op", "sizes", "p", "direction", "floor"),
    [
        ("attention", {"H": 12, "S": 128}, 0.0, FORWARD, 94),
        ("attention", {"H": 12, "S": 128}, 0.0, BACKWARD, 188),
        ("attention", {"H": 12, "S": 512}, 0.0, FORWARD, 130),
        ("attention", {"H": 12, "S": 512}, 0.1, FORWARD, 130),
        ("attention", {"H": 12, "S": 512}, 0.1, BACKWARD, 326),
        ("attention", {"H": 16, "S": 128}, 0.0, FORWARD, 126),
        ("attention", {"H": 16, "S": 128}, 0.0, BACKWARD, 251),
        ("attention", {"H": 16, "S": 512}, 0.1, FORWARD, 174),
        ("attention", {"H": 16, "S": 512}, 0.1, BACKWARD, 435),
        ("dropout_add_layer_norm", {"C": 768}, 0.1, BOTH, 187.5),
        ("dropout_add_layer_norm", {"C": 768}, 0.0, BOTH, 164),
        ("dropout_add_layer_norm", {"C": 1024}, 0.1, BOTH, 250),
        ("bias_gelu", {"C": 3072}, 0.0, FORWARD, 187),
        ("bias_gelu", {"C": 3072}, 0.0, BACKWARD, 281),
        ("bias_gelu", {"C": 4096}, 0.0, FORWARD, 250),
        ("bias_gelu", {"C": 4096}, 0.0, BACKWARD, 375),
        ("adamw_", {"L": 12}, 0.0, STEP, 717),
        ("adamw_", {"L": 24}, 0.0, STEP, 2189),
        ("duplicate_layers_", {"L": 6}, 0.0, STEP, 237),
    ],
)
def test_floors(op, sizes, p, direction, floor):
    bench = BY_OP[op]
    wanted = next(
        c for c in bench.cases("cuda", False) if sizes.items() <= c.sizes.items() and c.sizes.get("mix") != "natural"
    )
    assert microseconds(bench, replace(wanted, p=p), direction) == pytest.approx(
        floor, rel=0.006
    )  # of two or three digits


def test_floors_of_the_loss():
    """Three products of 9,830 x 768 x 30,528; two where the decoder is frozen."""
    bench = BY_OP["masked_lm_loss"]
    case = bench.cases("cuda", False)[0]
    assert microseconds(bench, case, BOTH) == pytest.approx(3 * 2 * 9830 * 768 * 30528 / 790e6, rel=1e-12)
    frozen = replace(case, options={"weight": "frozen"})
    assert bench.flops(frozen, BOTH) * 3 == 2 * bench.flops(case, BOTH) and bench.flops(
        frozen, FROZEN
    ) * 3 == bench.flops(case, BOTH)


def test_flops_of_a_natural_mix_are_those_of_its_sequences():
    case = bench_attention._case(1000, 2, 128, "natural", torch.bfloat16, 0.1)
    of = lengths.natural(1000, 128)
    assert sum(of) == 1000 and max(of) <= 128 and len(set(of)) > 1
    assert bench_attention.flops(case, FORWARD) == sum(4 * 2 * S * S * 64 for S in of)
    assert bench_attention.flops(case, BACKWARD) == 2.5 * bench_attention.flops(case, FORWARD)


def test_lengths():
    assert lengths.equal(65536, 384) == [384] * 170
    of = lengths.natural(65536, 512)
    assert sum(of) == 65536 and max(of) == 512 and 50 < sorted(of)[len(of) // 2] < 150


def test_what_is_too_large_for_float64_is_checked_on_less():
    natural = next(case for case in BY_OP["attention"].cases("cuda", False) if case["mix"] == "natural")
    assert BY_OP["attention"].checked(natural)["T"] == 16384 and BY_OP["attention"].checked(natural)["S"] == 512
    equal = BY_OP["attention"].cases("cuda", False)[0]
    assert BY_OP["attention"].checked(equal) == equal


OPTIONS = {"bias_gelu": {"form": "tanh"}, "masked_lm_loss": {"weight": "frozen"}, "adamw_": {"copies": "bf16"}}
VARIANTS = [
    pytest.param(bench, replace(case, dtype=dtype, p=p), id=f"{bench.op}-{harness.dtype_name(dtype)}-p={p}")
    for bench in BENCHES
    for case in bench.cases("cpu", True)
    for dtype in ((torch.float32,) if STEP in case.directions else (torch.float32, torch.bfloat16))
    for p in ((0.0, 0.1) if case.p else (0.0,))
] + [
    pytest.param(BY_OP[op], replace(BY_OP[op].cases("cpu", True)[0], options=options), id=f"{op}-{options}")
    for op, options in OPTIONS.items()
]


@pytest.mark.parametrize(("bench", "case"), VARIANTS)
def test_the_check_finds_every_implementation_right(bench, case, monkeypatch):
    op = next(op for op in ops.OPS if op.name == bench.op)
    fast = [
        impl for impl in op.available()["cpu"] if impl != "triton"
    ]  # interpreted; its own tests are in python_tests/ops
    monkeypatch.setattr(harness, "implementations", lambda *_: fast)
    checked = harness.check_all(bench, case, bench.inputs(case, "cpu"), "cpu")
    assert checked.wrong == {} and checked.ours == fast and checked.peers[0].name == "torch"


def test_quick_runs_every_declaration_as_declared(capsys):
    assert main(["--quick", "--repeats", "2", "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    declared = [(b, c, d) for b in BENCHES for c in b.cases("cpu", True) for d in c.directions]
    assert [(r["op"], r["case"], r["dtype"], r["p"], r["options"], r["direction"]) for r in rows] == [
        (b.op, c.name, harness.dtype_name(c.dtype), c.p, dict(c.options), d) for b, c, d in declared
    ]
    assert [(r["bytes"], r["flops"]) for r in rows] == [(b.bytes_moved(c, d), b.flops(c, d)) for b, c, d in declared]
    assert result["problems"] == [] and result["quick"] is True
    for row in rows:
        assert row["wrong"] == {} and row["ours"] in ("native", "reference")
        assert {row["ours"], "torch"} <= set(row["seconds"]) and row["ratios"]["torch"]["median"] > 0
        assert row["bound"] in row["ceilings"] and row["share"] > 0
        assert all(reason for reason in row["absent"].values())


def pytest_benchmarks(*arguments) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_through_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "out.json"
    few = ["-k", "dropout-", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-json={path}"]
    ran = pytest_benchmarks(*few)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    measured = {entry["name"]: entry for entry in json.loads(path.read_text())["benchmarks"]}
    case = BY_OP["dropout"].cases("cuda" if torch.cuda.is_available() else "cpu", True)[0]
    assert {f"test_op[dropout-{case}-forward-torch]", f"test_host_cost[dropout-{BOTH}]"} <= set(measured)
    forward = measured[f"test_op[dropout-{case}-forward-torch]"]
    assert (
        forward["extra_info"]["bytes"] == BY_OP["dropout"].bytes_moved(case, FORWARD) and forward["stats"]["median"] > 0
    )


def test_without_pytest_benchmark_everything_is_skipped():
    ran = pytest_benchmarks("-p", "no:benchmark", "-rs")
    assert ran.returncode == 0 and "wants pytest-benchmark" in ran.stdout and "passed" not in ran.stdout


def test_frozen_passes_move_no_more_than_those_that_save():
    for bench in BENCHES:
        for case in bench.cases("cuda", False):
            if FROZEN in case.directions and FORWARD in case.directions:
                assert bench.bytes_moved(case, FROZEN) <= bench.bytes_moved(case, FORWARD)
