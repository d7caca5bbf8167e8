"""RESULTS.md: what it says, when it is out of date, and how a figure of older sources is found out."""

import json
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from result_samples import MACHINE, op_row

from benchmarks import figure, history, machine, report, targets
from benchmarks.__main__ import main
from benchmarks.declared import BENCHES
from benchmarks.harness import dtype_name
from stackbert_kernels import ops

CPU = MACHINE | {"device": "cpu", "gpu": None, "commit": None, "dirty": None}
FOLDERS = {bench.op: bench.folder for bench in BENCHES}


def content(*rows, facts=MACHINE, sources=None, **more):
    return {
        "format": 1,
        "kind": "ops",
        "machine": facts,
        "sources": sources or {},
        "rows": list(rows),
        "problems": [],
        **more,
    }


@pytest.fixture
def page(tmp_path):
    """page(folder=content or {file: content}, ...) -> the text that `report` writes for these results."""

    def make(**machines):
        for name, files in machines.items():
            folder = tmp_path / "results" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, result in (files if "format" not in files else {"ops.json": files}).items():
                (folder / file).write_text(json.dumps(result))
        (tmp_path / "results").mkdir(exist_ok=True)
        assert run(tmp_path) == 0
        return (tmp_path / "RESULTS.md").read_text()

    return make


def run(folder, *options):
    return main(
        ["report", "--results", str(folder / "results"), "--out", str(folder / "RESULTS.md"), *options], prog="bench"
    )


def test_the_page_of_this_repository_is_up_to_date():
    """After a change of an op, of a declaration or of a result: python -m benchmarks report"""
    if report.needs_history(report.RESULTS) and not history.whole():
        pytest.skip("some results are placed by their commits, and there is no whole history")
    assert report.outdated(report.RESULTS, report.PAGE) is None


def test_the_first_line_says_whether_a_gpu_was_measured(page):
    assert "not yet measured on a GPU" in page().splitlines()[0]
    assert "not yet measured on a GPU" in page(xeon=content(op_row(), facts=CPU)).splitlines()[0]
    both = page(h200=content(op_row()))
    assert both.splitlines()[0] == "# Results: measured on NVIDIA H200"
    assert both.index("## h200") < both.index("## xeon")


def test_what_was_measured_is_on_the_page(page):
    rows = (
        op_row(times={"native": 104e-6, "triton": 130e-6, "torch": 208e-6}),
        op_row(direction="backward", times={"torch": 3e-4}, wrong={"native": "off by 1"}),
    )
    text = page(h200=content(*rows, problems=["gelu big: not run, the time was up"]))
    assert "| 65536 x 768 | bf16 | 0.1 | forward | native | 104 | 3846 GB/s | 0.962 | 1.25 | 2 |" in text
    assert "| 65536 x 768 | bf16 | 0.1 | backward | wrong: no time | - |" in text
    for line in ("- layer_norm: native got no time: off by 1", "- gelu big: not run, the time was up"):
        assert line in text
    assert "2026-11-22, commit `0123456789ab`; NVIDIA H200, torch 2.11.0, Triton 3.6.0, Python 3.12.1." in text


def test_a_run_on_a_gpu_shows_what_it_proved(page):
    kernel = {"kernel": "layer_norm_fwd<bf16>", "arch": "sm_90a", "registers": 40, "shared": 0, "stack": 0}
    phases = {
        "build": {"state": "passed", "seconds": 80.2, "limit": 90, "lines": ["GNU 13, 1 kernel"], "kernels": [kernel]},
        "tests": {
            "state": "failed",
            "seconds": 100.0,
            "limit": 120,
            "reason": "2 failed",
            "failures": ["test_mask[bf16]"],
        },
        "ops": {"state": "passed", "seconds": 120.0, "limit": 130, "file": "ops.json", "lines": ["shown elsewhere"]},
    }
    text = page(h200={"gpu.json": {"format": 1, "kind": "gpu", "machine": MACHINE, "pretend": False, "phases": phases}})
    assert "| tests | failed | 100 | 2 failed |" in text and "- tests: test_mask[bf16]" in text
    assert "| layer_norm_fwd<bf16> | 40 | 0 | 0 |" in text
    assert "GNU 13, 1 kernel" in text and "shown elsewhere" not in text


def test_whole_training_is_shown_as_it_was_printed(page, monkeypatch):
    for kind, title in report.TRAINING.items():
        module = import_module(f"benchmarks.bench_{kind}")
        monkeypatch.setattr(module, "report", lambda result: f"the table of {result['kind']}")
        text = page(h200={f"{kind}.json": content() | {"kind": kind}})
        assert f"### {title}\n\n```text\nthe table of {kind}\n```" in text


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (content(op_row(), quick=True), "ops.json: is of a quick run, which measures nothing"),
        (content(op_row(), pretend=True), "ops.json: is of a pretend run, which measures nothing"),
        ({"machine": {}, "rows": []}, "ops.json: wanted a result file of format 1 with a machine"),
        (None, "--results: no such folder"),
    ],
)
def test_bad_use_is_one_line(result, message, tmp_path, capsys):
    if result:
        (tmp_path / "results" / "h200").mkdir(parents=True)
        (tmp_path / "results" / "h200" / "ops.json").write_text(json.dumps(result))
    for options in ((), ("--check",)):
        assert run(tmp_path, *options) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("bench report: ") and message in err
    assert not (tmp_path / "RESULTS.md").exists()


def test_an_installed_copy_has_no_results(monkeypatch, capsys):
    monkeypatch.setattr(machine, "ROOT", Path("/nowhere"))
    assert main(["report"], prog="bench") == 2
    assert capsys.readouterr().err.startswith("bench report: this is an installed copy")


def test_check_sees_every_difference(page, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(tmp_path, "--check") == 2  # no results at all
    result = content(op_row())
    page(h200=result)
    picture = tmp_path / "results" / "h200" / "layer_norm.png"
    assert "![layer_norm](results/h200/layer_norm.png)" in (tmp_path / "RESULTS.md").read_text() and picture.exists()
    assert run(tmp_path, "--check") == 0

    before = picture.read_bytes()
    page(h200=content(op_row(times={"native": 99e-6})))
    after = picture.read_bytes()
    assert after != before and run(tmp_path, "--check") == 0
    picture.write_bytes(before)
    capsys.readouterr()
    assert run(tmp_path, "--check") == 1 and "layer_norm.png is not of these results" in capsys.readouterr().out
    picture.write_bytes(after)

    (tmp_path / "results" / "h200" / "ops.json").write_text(json.dumps(content(op_row(times={"native": 98e-6}))))
    assert run(tmp_path, "--check") == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "RESULTS.md:" in said and "run python -m benchmarks report" in said


def test_pictures_are_drawn_once(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    page(h200=content(op_row()))
    monkeypatch.setattr(figure, "draw", lambda *a: pytest.fail("drawn again"))
    page(h200=content(op_row()))


def test_the_page_depends_on_nothing_else(page, tmp_path, monkeypatch):
    text = page(h200=content(op_row()))
    monkeypatch.chdir("/")
    assert page(h200=content(op_row())) == text
    assert str(tmp_path) not in text and str(machine.ROOT) not in text


def test_every_target_is_of_one_declared_case():
    rows = [
        {"op": b.op, "dtype": dtype_name(c.dtype), "p": c.p, "sizes": c.sizes, "options": c.options, "direction": d, "flops": b.flops(c, d)}
        for b in BENCHES for c in b.cases("cuda", False) for d in c.directions
    ]  # fmt: skip
    for target in targets.TARGETS:
        assert target.op in {op.name for op in ops.OPS}
        if target.op in FOLDERS:
            assert sum(target.means(row) for row in rows) == 1, target


def test_targets_are_met_or_missed():
    attention = {"case": "512 x 128", "options": {}, "op": "attention"}
    sizes = {"H": 12, "S": 128, "mix": "equal"}
    forward = op_row(**attention, times={"native": 100e-6, "triton": 126.5e-6}) | {"sizes": sizes}
    backward = op_row(**attention, direction="backward", times={"native": 345e-6}, wrong={"triton": "x"}) | {
        "sizes": sizes
    }
    loss = op_row(
        op="masked_lm_loss", p=0.0, direction="forward + backward", times={"native": 2000e-6}, nbytes=0, flops=8e11, matmul=8e14,
        options={"weight": "trained"},
    ) | {"sizes": {"C": 768}}  # fmt: skip
    gelu = op_row(op="bias_gelu", p=0.0, times={"native": 200e-6}, nbytes=720e6, options={"form": "erf"}) | {
        "sizes": {"C": 3072}
    }
    lines = {(line["op"], line["pass"], line["impl"]): line for line in targets.judged([forward, backward, loss, gelu])}
    assert lines["attention", "forward", "native"][""] == "met"
    assert lines["attention", "forward", "triton"][""] == "missed by 10%"
    assert lines["attention", "backward", "native"][""] == "missed by 50%"
    assert lines["attention", "backward", "triton"][""] == "wrong: no time"
    # 1,000 us of products and 320 us: 2,000 us are 52% too many; 180 us of copying in 200 us are 90%, above 85%.
    assert lines["masked_lm_loss", "forward + backward", "native"][""] == "missed by 52%"
    assert lines["bias_gelu", "forward", "native"][""] == "met"
    assert lines["bias_gelu", "backward", None][""] == "not measured"


def test_targets_stand_beside_results_of_that_gpu_only(page):
    assert "### Targets" in page(h200=content(op_row()))
    assert "### Targets" not in page(h200=content(op_row(), facts=MACHINE | {"gpu": "NVIDIA A100"}))


def test_compiled_kernels_are_a_row_each(page, tmp_path):
    rows = [
        {"kernel": "dropout 768", "arch": arch, "registers": 30 + i, "spills": 0, "shared": 1024, "instructions": 294 + i,
         "products": {"HGMMA": 8}, "accesses": {"LDG.E.128": 2, "STG.E.128": 1}, "narrow": 0, "broken": []}
        for i, arch in enumerate((80, 90, 100))
    ]  # fmt: skip
    facts = {name: MACHINE[name] for name in ("triton", "python", "date", "commit", "dirty")} | {"device": "cuda"}
    compiled = {"format": 1, "kind": "compiled", "machine": facts, "sources": {"dropout": "0"}, "rows": rows}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "compiled.json").write_text(json.dumps(compiled))
    text = page()
    assert (
        "| dropout 768 | 30 / 0 / 1024 | 31 / 0 / 1024 | 32 / 0 / 1024 | 295 | 8 HGMMA | 2 LDG.E.128, 1 STG.E.128 |"
        in text
    )
    assert "**Changed since: dropout.**" in text and "not yet measured on a GPU" in text.splitlines()[0]


def test_compiled_cuda_kernels_of_a_name_are_a_row(page, tmp_path):
    rows = [
        {"file": "dropout_cuda.cu", "kernel": "dropout_kernel", "arch": arch, "instances": 6, "registers": [30, 40], "stack": stack, "broken": []}
        for arch, stack in (("80", 8), ("90a", 0))
    ]  # fmt: skip
    rows[1] |= {"instructions": [200, 200], "wide": 3, "products": ["HMMA"]}
    facts = {name: MACHINE[name] for name in ("python", "date", "commit", "dirty")} | {"device": "cuda", "cuda": "13.0"}
    compiled = {"format": 1, "kind": "compiled_cuda", "machine": facts, "rows": rows}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "compiled_cuda.json").write_text(json.dumps(compiled))
    text = page()
    assert "| dropout_kernel | dropout_cuda.cu | 6 | 30 to 40 | 30 to 40 | 8 | 200 | 3 | HMMA |" in text
    assert "nvcc 13.0, " in text


# Staleness.


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with the sources of two ops in three commits; `commits` are their names, the first one the oldest."""
    git = shutil.which("git")
    if not git:
        pytest.skip("no git")

    def call(*arguments):
        who = ("-c", "user.name=someone", "-c", "user.email=someone@example.com", "-c", "commit.gpgsign=false")
        return subprocess.run(
            [git, "-C", root, *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    class Tree:
        def __init__(self):
            self.commits = []

        def write(self, path, text):
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def commit(self, message):
            call("add", "--all")
            call("commit", "-q", "--allow-empty", "-m", message)
            self.commits.append(call("rev-parse", "HEAD"))

    root = tmp_path / "tree"
    root.mkdir()
    call("init", "-q")
    monkeypatch.setattr(machine, "ROOT", root)
    made = Tree()
    made.write("csrc/gelu/gelu.h", "one")
    made.write("csrc/layer_norm/layer_norm.h", "one")
    made.write("csrc/common/dtype.h", "one")
    made.write("stackbert_kernels/ops/gelu/op.py", "one")
    made.commit("one")
    made.write("csrc/gelu/gelu_cuda.cu", "two")
    made.commit("two")
    made.write("README.md", "three")
    made.commit("three")
    return made


OPS = {"bias_gelu": "gelu", "layer_norm": "layer_norm"}


def measured(device="cuda", **facts):
    sources = {op: machine.digest(folder, device) for op, folder in OPS.items()}
    return content(facts=MACHINE | {"device": device, "commit": None, **facts}, sources=sources)


def test_an_op_has_changed_when_its_sources_have(tree):
    result = measured()
    assert history.changed(result, OPS) == []
    tree.write("csrc/gelu/notes.md", "no source")
    assert history.changed(result, OPS) == []
    tree.write("csrc/gelu/gelu.h", "changed, and not committed")
    assert history.changed(result, OPS) == ["bias_gelu"]
    tree.write("csrc/common/dtype.h", "shared")
    assert history.changed(result, OPS) == ["bias_gelu", "layer_norm"]
    assert history.changed(measured() | {"sources": {"gone": "0"}}, OPS) == ["gone"]


def test_kernels_of_the_other_device_do_not_count(tree):
    on_gpu, on_cpu = measured("cuda"), measured("cpu")
    tree.write("csrc/gelu/gelu_cuda.cu", "changed")
    tree.write("stackbert_kernels/ops/gelu/triton_kernel.py", "new")
    assert history.changed(on_gpu, OPS) == ["bias_gelu"] and history.changed(on_cpu, OPS) == []
    tree.write("csrc/layer_norm/layer_norm_cpu.cpp", "new")
    assert history.changed(on_gpu, OPS) == ["bias_gelu"] and history.changed(on_cpu, OPS) == ["layer_norm"]


def test_a_copy_without_history_is_found_again_by_its_digests(tree):
    result = measured()  # its sources are those of the second and the third commit
    assert history.commit_of(result, OPS) == tree.commits[1]
    tree.write("csrc/gelu/gelu.h", "four")
    tree.commit("four")
    assert history.commit_of(result, OPS) == tree.commits[1]
    assert history.commit_of(measured(commit="0123"), OPS) == "0123"
    told = history.commits("gelu", tree.commits[1])
    assert len(told) == 1 and told[0].endswith(" four")
    tree.write("csrc/gelu/gelu.h", "never committed")
    assert history.commit_of(measured(), OPS) is None


def test_a_result_without_digests_is_judged_by_its_commit(tree):
    result = measured(commit=tree.commits[0]) | {"sources": {}}
    assert history.changed(result, OPS) == ["bias_gelu"]
    assert history.changed(measured(commit="f" * 40) | {"sources": {}}, OPS) is None


def test_without_history_only_what_needs_none_is_checked(page, tmp_path, monkeypatch, capsys):
    page(h200=content(op_row(), sources={"layer_norm": "0"}))
    monkeypatch.setattr(history, "whole", lambda: False)
    (tmp_path / "RESULTS.md").write_text("changed")
    assert run(tmp_path, "--check") == 1
    page(h200=content(op_row(), sources={"layer_norm": "0"}, facts=MACHINE | {"commit": None}))
    (tmp_path / "RESULTS.md").write_text("changed")
    capsys.readouterr()
    assert run(tmp_path, "--check") == 0 and "cannot be checked here" in capsys.readouterr().out


def test_nothing_breaks_without_git_or_sources(tree, monkeypatch):
    result = measured()
    monkeypatch.setenv("PATH", "")
    assert history.commit_of(result, OPS) is None and history.changed(result, OPS) == []
    assert history.commits("gelu", tree.commits[0]) == [] and not history.whole()
    monkeypatch.setattr(machine, "ROOT", Path("/nowhere"))
    assert machine.digest("gelu", "cpu") is None and history.changed(measured(), OPS) is None


def test_a_stale_figure_is_seen_to_be_stale(page):
    digests = {op: machine.digest(folder, "cuda") for op, folder in FOLDERS.items()}
    rows = [op_row(op=op) for op in ("layer_norm", "bias_gelu")]
    fresh = {op: digests[op] for op in ("layer_norm", "bias_gelu")}
    text = page(h200=content(*rows, sources=fresh))
    assert "No op has changed since." in text and "### bias_gelu\n" in text
    text = page(h200=content(*rows, sources=fresh | {"bias_gelu": "0123456789abcdef"}))
    assert "**Changed since: bias_gelu.**" in text
    assert "### bias_gelu (its sources have changed since)" in text and "### layer_norm\n" in text


def test_only_sources_make_a_tree_dirty(tmp_path, monkeypatch):
    """What an earlier benchmark of the same command wrote does not."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    files = {name: tmp_path / name for name in ("csrc/a.cu", "benchmarks/results/m/ops.json", "README.md")}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    for name, dirty in (("benchmarks/results/m/ops.json", False), ("README.md", False), ("csrc/a.cu", True)):
        files[name].write_text("after")
        assert machine.machine("cpu")["dirty"] is dirty
