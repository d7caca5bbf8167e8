"""The tuning run: variants differ from the kept configuration in one entry, wrong ones get no time, and what is kept stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from benchmarks import bench_dropout, harness, tune
from benchmarks.__main__ import main
from benchmarks.compiled import ARCHITECTURES
from benchmarks.declared import BENCHES
from stackbert_kernels.ops import _triton

TUNABLE = tune.tunable(BENCHES)


@dataclass(frozen=True)
class Kernel:
    warps: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class Kernels:
    forward: Kernel
    backward: Kernel


def test_a_variant_replaces_one_entry():
    kept = Kernels(Kernel(4), Kernel(8))
    found = tune.variants({"forward": (Kernel(4), Kernel(2, 64)), "backward": (Kernel(8), Kernel(1))}, kept)
    assert found == {
        "kept": kept,
        "forward warps 2, maxnreg 64": Kernels(Kernel(2, 64), Kernel(8)),
        "backward warps 1": Kernels(Kernel(4), Kernel(1)),
    }
    assert tune.variants((Kernel(4), Kernel(2)), Kernel(4)) == {"kept": Kernel(4), "warps 2": Kernel(2)}
    in_table = tune.variants((Kernel(4), Kernel(2)), {"a": Kernel(4), "b": Kernel(1)}, "a")
    assert in_table["warps 2"] == {"a": Kernel(2), "b": Kernel(1)}


@pytest.mark.parametrize("bench", TUNABLE, ids=lambda bench: bench.op)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_names_a_few(bench, arch):
    module = import_module(f"stackbert_kernels.ops.{bench.folder}.triton_kernel")
    found = tune.variants(module.CANDIDATES, module.CONFIGURATIONS[arch], getattr(module, "TUNED", None))
    assert 2 <= len(found) <= 16 and len({str(value) for value in found.values()}) == len(found)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.op)
def test_what_is_tuned_reads_its_configuration_and_nothing_else_does(bench, monkeypatch):
    if not _triton.INTERPRETED:
        pytest.skip("runs Triton's interpreter on the CPU, which TRITON_INTERPRET=1 switches on")
    tables = []

    def configuration(table, device, read=_triton.configuration):
        tables.append(table)
        return read(table, device)

    monkeypatch.setattr(_triton, "configuration", configuration)
    case = bench.cases("cpu", True)[0]
    harness.results(harness.bound(bench.ours(case, inputs := bench.inputs(case, "cpu"), "triton"), inputs))
    module = import_module(f"stackbert_kernels.ops.{bench.folder}.triton_kernel")
    assert any(table is module.CONFIGURATIONS for table in tables) == (bench in TUNABLE)


@pytest.fixture
def case():
    if not _triton.INTERPRETED:
        pytest.skip("runs Triton's interpreter on the CPU, which TRITON_INTERPRET=1 switches on")
    return bench_dropout.cases("cpu", quick=True)[0]


def test_variants_are_timed_in_turn_and_nothing_is_changed(case):
    module = import_module("stackbert_kernels.ops.dropout.triton_kernel")
    before = dict(module.CONFIGURATIONS)
    rows = tune.tune(bench_dropout.DROPOUT, case, "cpu", repeats=2)
    assert [row["direction"] for row in rows] == list(case.directions)
    for row in rows:
        assert len(row["seconds"]) == len(module.CANDIDATES) and not row["failed"]
        assert row["ratios"]["kept"]["median"] == 1.0 and set(row["ratios"]) == set(row["seconds"])
    assert before == module.CONFIGURATIONS
    lines = tune.table_rows(rows)
    assert len(lines) == 2 * len(module.CANDIDATES) and lines[0]["us"] <= lines[1]["us"]


def test_wrong_and_failing_variants_get_no_time(case, monkeypatch):
    module = import_module("stackbert_kernels.ops.dropout.triton_kernel")
    kept = module.CONFIGURATIONS[80]
    doubling, failing = replace(kept, num_warps=2), replace(kept, num_warps=3)
    monkeypatch.setattr(module, "CANDIDATES", (kept, doubling, failing))
    at_work = []

    def ours(case, t, impl):
        call = bench_dropout.ours(case, t, impl)

        def run():
            at_work.append(module.CONFIGURATIONS[80])
            if impl == "triton" and module.CONFIGURATIONS[80] == failing:
                raise RuntimeError("out of resource: shared memory")
            return call() * (2 if impl == "triton" and module.CONFIGURATIONS[80] == doubling else 1)

        return run

    rows = tune.tune(replace(bench_dropout.DROPOUT, ours=ours), case, "cpu", repeats=2)
    failed = rows[0]["failed"]
    assert list(rows[0]["seconds"]) == ["kept"] and len(failed) == 2
    by_warps = {name.split()[-1]: why for name, why in failed.items()}
    assert "output is off by" in by_warps["2"] and by_warps["3"] == "RuntimeError: out of resource: shared memory"
    assert {doubling, failing, kept} == set(at_work)
    assert len(tune.failures(rows)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "no candidates for 'no_such_op'; there are some for attention"),
        (["--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_bad_use_is_one_line(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu(capsys):
    assert main(["tune"]) == 2
    assert "sees no GPU here" in capsys.readouterr().err
