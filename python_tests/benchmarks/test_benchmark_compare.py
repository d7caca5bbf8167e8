"""`python -m benchmarks compare A B`: what counts as slower, what is noise, and what the exit code says."""

import copy
import json

import pytest
from result_samples import MACHINE, op_row

from benchmarks.__main__ import main


@pytest.fixture
def compare(tmp_path, capsys):
    """compare(A, B, *options) -> (exit code, stdout, stderr), where A and B are lists of rows or whole results."""

    def call(a, b, *options):
        paths = []
        for name, result in (("a", a), ("b", b)):
            if isinstance(result, list):
                result = {"format": 1, "kind": "ops", "machine": MACHINE, "rows": result}
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(result))
        code = main(["compare", *map(str, paths), *options], prog="bench")
        return code, *capsys.readouterr()

    return call


def verdicts(compare, a, b, *options):
    code, out, _ = compare(a, b, "--json", *options)
    return code, {(row["op"], row["direction"], row["impl"]): row["verdict"] for row in json.loads(out)["rows"]}


def test_slower_faster_and_the_same(compare):
    a = [op_row(times={"native": 100e-6, "triton": 100e-6, "torch": 100e-6}), op_row(op="gelu", times={"native": 1e-4})]
    b = [op_row(times={"native": 110e-6, "triton": 104e-6, "torch": 300e-6}), op_row(op="gelu", times={"native": 8e-5})]
    code, found = verdicts(compare, a, b)
    assert code == 1
    assert found == {
        ("layer_norm", "forward", "native"): "slower",
        ("layer_norm", "forward", "triton"): "same",  # 4% is under the limit; torch is a peer, and not judged
        ("gelu", "forward", "native"): "faster",
    }
    assert verdicts(compare, b, a)[1]["layer_norm", "forward", "native"] == "faster"
    assert verdicts(compare, a, b, "--over", "12")[0] == 0
    assert verdicts(compare, a, b, "--over", "3")[1]["layer_norm", "forward", "triton"] == "within noise"


def test_a_change_within_the_spread_is_noise(compare):
    a, b = [op_row(times={"native": 100e-6}, spread=0.1)], [op_row(times={"native": 120e-6}, spread=0.1)]
    assert verdicts(compare, a, b) == (0, {("layer_norm", "forward", "native"): "within noise"})
    calm = [op_row(times={"native": 120e-6}, spread=0.01)]
    assert verdicts(compare, a, calm)[0] == 1  # 110 is the p80 of A, 118.8 the p20 of B


def test_a_machine_that_is_slower_as_a_whole_is_noise(compare):
    a = [op_row(times={"native": 100e-6}, copy=4e12)]
    assert verdicts(compare, a, [op_row(times={"native": 200e-6}, copy=2e12)])[0] == 0
    assert verdicts(compare, a, [op_row(times={"native": 200e-6}, copy=3e12)])[0] == 1


def test_rows_are_matched_by_all_that_names_them(compare):
    varied = {"case": "1 x 1", "dtype": "fp16", "p": 0.0, "direction": "backward", "options": {"approximate": "tanh"}}
    for name, value in varied.items():
        base = [op_row(op="gelu", times={"native": 1e-4})]
        other = op_row(op="gelu", times={"native": 9e-4}, **{name: value})
        code, out, _ = compare(base, [*base, other])
        assert code == 0 and "1 only in B, 1 same" in out
        assert "1 only in A, 1 same" in compare([*base, other], base)[1]


def test_what_became_wrong_fails(compare):
    a = [op_row(times={"native": 1e-4, "triton": 1e-4})]
    b = [op_row(times={"native": 1e-4}, wrong={"triton": "off by 1"})]
    code, found = verdicts(compare, a, b)
    assert code == 1 and found["layer_norm", "forward", "triton"] == "wrong now"


def test_different_machines_are_compared_in_floors(compare):
    """Twice as fast a memory and twice as fast a kernel: nothing changed. The same seconds there: half as good."""
    a = [op_row(times={"native": 100e-6}, copy=4e12)]
    machine = MACHINE | {"gpu": "NVIDIA B200"}
    b = {"format": 1, "kind": "ops", "machine": machine, "rows": [op_row(times={"native": 50e-6}, copy=8e12)]}
    code, out, _ = compare(a, b)
    assert code == 0 and "1 same" in out and "warning: different machines (gpu NVIDIA H200, NVIDIA B200)" in out
    b["rows"] = [op_row(times={"native": 100e-6}, copy=8e12)]
    code, out, _ = compare(a, b)
    assert code == 1 and "A floors" in out and "B / A" in out


def test_the_report_for_a_person(compare):
    a = [op_row(times={"native": 100e-6, "torch": 100e-6}), op_row(op="gelu", times={"native": 1e-4})]
    b = {"format": 1, "kind": "ops", "machine": MACHINE | {"torch": "2.12.0"}, "quick": True, "rows": copy.deepcopy(a)}
    b["rows"][0] = op_row(times={"native": 130e-6, "torch": 110e-6})
    code, out, err = compare(a, b)
    assert code == 1 and not err
    assert "warning: torch differs: 2.11.0, 2.12.0" in out and "warning: B is a quick run" in out
    line = next(line for line in out.splitlines() if line.startswith("layer_norm"))
    assert line.split()[-5:] == ["native", "100", "130", "1.3", "slower"]
    assert "1 slower, 1 same; limit 5%" in out
    assert "control: the peers took x1.100" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: A.json, B.json"),
        (("{none}", "{ops}"), "none.json: cannot be read: No such file"),
        (("{text}", "{ops}"), "text.json: wanted a JSON result file"),
        (("{old}", "{ops}"), "old.json: wanted a result file of format 1"),
        (("{gpu}", "{ops}"), "gpu.json: wanted ops.json or train_step.json, got a result of kind 'gpu'"),
        (("{ops}", "{step}"), "two results of one benchmark are wanted, got ops and train_step"),
        (("{ops}", "{ops}", "--over", "-1"), "--over must be a percentage of at least 0, got -1"),
        (("{ops}", "{ops}", "--over", "much"), "argument --over: invalid float value: 'much'"),
        (("{ops}", "{empty}"), "have no row in common"),
    ],
)
def test_bad_use_is_one_line(arguments, message, tmp_path, capsys):
    result = {"format": 1, "kind": "ops", "machine": MACHINE, "rows": [op_row()]}
    files = {
        "ops": json.dumps(result), "text": "not JSON", "old": '{"machine": {}, "rows": []}',
        "gpu": json.dumps({"format": 1, "kind": "gpu", "machine": MACHINE, "phases": []}),
        "step": json.dumps(result | {"kind": "train_step"}), "empty": json.dumps(result | {"rows": []}),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content)
    named = {name: str(tmp_path / f"{name}.json") for name in (*files, "none")}
    assert main(["compare", *(argument.format(**named) for argument in arguments)], prog="bench") == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("bench compare: ") and message in err
