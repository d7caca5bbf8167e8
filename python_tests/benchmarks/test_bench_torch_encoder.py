"""The benchmark of the patched encoder: every setting runs, padding is counted, and what computes something else gets no time."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_torch_encoder as bench
from benchmarks.__main__ import main
from benchmarks.results_file import read
from stackbert_kernels.patch import torch_encoder


def test_every_setting_runs(tmp_path, capsys):
    assert (
        main(["torch_encoder", "--device", "cpu", "--quick", "--repeats", "2", "--json", "--out", str(tmp_path)]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == read(tmp_path / "torch_encoder.json") and printed["kind"] == "torch_encoder"
    assert [row["case"] for row in printed["rows"]] == [s.name for s in bench.settings(bench.SIZES["quick"])]
    for row in printed["rows"]:
        assert row["ratios"]["torch"]["median"] > 0 and not row["wrong"]
        assert (
            row["tokens"] < row["padded_tokens"] if "natural" in row["case"] else row["tokens"] == row["padded_tokens"]
        )


def test_what_is_wrong_gets_no_time(monkeypatch):
    original = torch_encoder.EncoderLayer._feed_forward

    def a_little_more(self, x, rng):
        y, bias = original(self, x, rng)
        return 1.001 * y, bias

    monkeypatch.setattr(torch_encoder.EncoderLayer, "_feed_forward", a_little_more)
    size = bench.SIZES["quick"]
    for setting in (bench.settings(size)[0], bench.settings(size)[5]):
        row = bench.measure(size, setting, "cpu", repeats=2)
        assert row["ours"] is None and "is off by" in row["wrong"][bench.OURS] and row["ratios"] == {}
        assert bench.table_rows([row])[0]["times as fast"] is None


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
    assert main(["torch_encoder", *arguments]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks torch_encoder: {message}\n"
