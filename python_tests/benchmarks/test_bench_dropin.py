"""The benchmark of patched transformers models: every setting runs, padding is counted, and what computes something else gets no time."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_dropin as bench
from benchmarks.__main__ import main
from benchmarks.results_file import read
from stackbert_kernels.patch import blocks

SIZE = bench.SIZES["quick"]


def test_every_setting_runs(tmp_path, capsys):
    arguments = ["--device", "cpu", "--size", "quick", "--repeats", "2", "--json", "--out", str(tmp_path)]
    assert main(["dropin", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read(tmp_path / "dropin.json") and printed["kind"] == "dropin"
    cases = [setting.name for setting in bench.settings(SIZE, SIZE.full)]
    assert [row["case"] for row in printed["rows"]] == 2 * cases
    for row in printed["rows"]:
        short = "short" in row["case"]
        assert row["ours"] == (bench.UNPAD if short else bench.PATCHED) and not row["wrong"]
        assert row["tokens"] < row["padded_tokens"] if short else row["tokens"] == row["padded_tokens"]
        assert row["speed_up"][row["ours"]]["median"] > 0
    text = bench.report(printed)
    assert all(case in text for case in cases)


def test_lengths_are_those_of_sentences():
    lengths = [n for seed in range(40) for n in bench.short(bench.BATCH, seed)]
    assert 12 < sum(lengths) / len(lengths) < 14 and min(lengths) >= 3 and max(lengths) <= 66


def test_what_is_wrong_gets_no_time(monkeypatch):
    monkeypatch.setattr(blocks, "dense_gelu", lambda dense, activation, x: 1.001 * activation(dense(x)))
    row = bench.measure(SIZE, bench.settings(SIZE, SIZE.full)[1], "cpu", "fp32", repeats=2)
    assert row["ours"] is None and "is off by" in row["wrong"][bench.PATCHED] and bench.PATCHED not in row["seconds"]
    assert "fp32: ours patched: fp32: " in bench.report({"rows": [row], "problems": []})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert main(["dropin", *arguments]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks dropin: {message}\n"
