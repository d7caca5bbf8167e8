"""The doctor: complete, readable, and it notices what is broken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from stackbert_kernels import doctor, ops
from stackbert_kernels.ops import _library


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.doctor()


def test_every_op_has_a_case():
    assert set(doctor.cases()) == set(ops.available())


def test_everything_works_here(report):
    failed = [r for r in report["self_test"]["results"] if not r["passed"]]
    assert report["passed"] and not failed
    tested = {(r["op"], r["impl"], r["dtype"]) for r in report["self_test"]["results"] if r["device"] == "cpu"}
    assert tested == {(op, i, d) for op, by in ops.available().items() for i in by["cpu"] for d in doctor.TOLERANCE}


def test_the_report_is_plain_json(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert report["ops"]["dropout"]["cpu"]["auto"] == ops.available()["dropout"]["cpu"][0]


def test_the_text_names_what_matters(report):
    text = doctor.render(report)
    for wanted in (
        "torch",
        "cpu:",
        "masked_lm_loss",
        "not triton: the interpreter of Triton is for tests",
        "self-test passed",
    ):
        assert wanted in text
    if report["build"]["compiled"]:
        assert report["build"]["isa"] in text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x * 1.5, "relative error"),
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_kernel_is_found(broken, message):
    tensors, call = doctor.cases()["dropout"]
    exact = doctor._outputs(call, tensors, "cpu", "float64", "reference")

    def broken_call(x, impl):
        return broken(x)

    result = doctor._judge("dropout", "native", "cpu", "float32", broken_call, tensors, exact)
    assert not result["passed"]
    text = doctor.render({**empty_report(), "self_test": {"seconds": 0.0, "results": [result], "error": None}})
    assert "self-test FAILED: 0 of 1" in text and "dropout native cpu float32" in text and message in text


def empty_report() -> dict:
    return {"versions": {}, "build": {}, "devices": [], "ops": {}, "passed": False}


def test_without_the_compiled_module_it_says_why(monkeypatch):
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "WHY_NO_NATIVE", "the compiled module cannot be imported: no such file")
    found = {**empty_report(), "build": doctor._build(), "ops": doctor._ops(["cpu"]), "self_test": {"error": "x"}}
    text = doctor.render(found)
    assert "none: the compiled module cannot be imported: no such file" in text
    assert found["ops"]["masked_lm_loss"]["cpu"]["auto"] == "reference"
    assert "not native: the compiled module cannot be imported" in text


def test_without_torch_it_still_reports():
    """In a process where torch cannot be imported."""
    script = """
import sys
sys.modules["torch"] = None
from stackbert_kernels.doctor import doctor, render
report = doctor()
assert not report["passed"]
print(render(report))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "self-test FAILED: stackbert_kernels.ops cannot be imported" in done.stdout and "torch" in done.stdout


def test_importing_it_loads_nothing_heavy():
    script = "import sys, stackbert_kernels.doctor; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
