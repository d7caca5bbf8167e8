"""The training-step benchmark: what is wrong gets no time, what is missing is named, and FLOPs are those that a counter counts."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_train_step, results_file
from benchmarks.__main__ import main
from benchmarks.training_step import HF, HF_COMPILED, Samples, Setting, few, field_of, parameter_flops
from stackbert_kernels.config import ModelConfig

TINY = ModelConfig(layers=4, hidden=32, heads=2, vocab_size=96)
SETTING = Setting("tiny", TINY, "S=16", (16,) * 4, "fp32")
NATURAL = Setting("tiny", TINY, "natural <= 16", (16, 16, 11, 16, 4), "bf16")
SMALL = {"layers": 4, "hidden": 32, "heads": 2, "vocab": 96, "seq-len": 16, "tokens": 64, "repeats": 2}
ARGUMENTS = ["train_step", "--device", "cpu", *(f"--{name}={value}" for name, value in SMALL.items())]
FAST = ("native", "reference")  # the Triton interpreter is too slow for a whole model


def measure(setting: Setting, field=None) -> dict:
    field = field or field_of(setting.config, "cpu", FAST)
    return bench_train_step.measure(field, setting, "cpu", repeats=2)


def ours(row: dict) -> set[str]:
    return {name for name in row["tokens_per_second"] if name.startswith("ours")}


@pytest.mark.parametrize("setting", [SETTING, NATURAL], ids=lambda s: s.kind)
def test_a_row(setting):
    pytest.importorskip("transformers")
    row = measure(setting)
    assert row["wrong"] == {} and HF_COMPILED not in row["seconds"]
    timed = {HF, *ours(row)}
    assert row["ours"] in timed and "ours reference" in timed
    assert set(row["seconds"]) == timed | {"matmul"}
    assert set(row["mfu"]) == set(row["mfu_6n"]) == set(row["tokens_per_second"]) == set(row["speed_up"]) == timed
    assert set(row["ratios"]) == timed - {row["ours"]}
    assert row["tokens"] == sum(setting.lengths) <= row["padded_tokens"]
    for (
        name
    ) in timed:  # medians of ratios against ratios of medians: alike up to the machine's noise, whatever the units
        seconds = row["seconds"][name]["median"]
        assert row["tokens_per_second"][name] == pytest.approx(row["tokens"] / seconds)
        assert 0.1 < row["mfu"][name] / (row["flops"] / seconds / row["ceilings"]["matmul"]) < 10
        assert row["mfu_6n"][name] / row["mfu"][name] == pytest.approx(
            parameter_flops(setting.model, setting.config.data.seq_len) * setting.tokens / setting.flops
        )


def test_only_what_is_padded_has_a_mask():
    assert "attention_mask" not in Samples.random((8, 8), 96, "cpu").padded
    padded = Samples.random((8, 5), 96, "cpu").padded
    assert padded["attention_mask"].sum(1).tolist() == [8, 5]
    assert (padded["input_ids"][1, 5:] == 0).all() and (padded["labels"][1, 5:] == -100).all()


def test_the_check_reads_few_tokens():
    long = Setting("tiny", TINY, "S=16", (16,) * 1000, "fp32")
    assert few(long, "cpu").lengths == (16,) * 256


class Planted:
    """Looks like a candidate, and differs in one respect."""

    def __init__(self, candidate, loss):
        self.model, self.optimizer, self.update = candidate.model, candidate.optimizer, candidate.update
        self.loss = lambda samples: loss(candidate.loss(samples))


def raises(loss):
    raise ValueError("planted")


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda loss: 1.01 * loss, "loss in fp32 is"),
        (lambda loss: 1.01 * loss - 0.01 * loss.detach(), "gradient norm in fp32 is"),
        (lambda loss: loss * float("nan"), "loss in fp32 is nan"),
        (raises, "ValueError: planted"),
    ],
    ids=["loss", "gradient", "nan", "error"],
)
def test_what_is_wrong_gets_no_time(loss, reason):
    field = field_of(SETTING.config, "cpu", FAST)
    right = "ours reference"
    wrong = next(name for name in field.candidates if name.startswith("ours") and name != right)
    field.candidates[wrong] = Planted(field.candidates[wrong], loss)
    row = measure(SETTING, field)
    assert row["wrong"][wrong].startswith(reason)
    assert wrong not in row["seconds"] and ours(row) == {right} and row["ours"] == right


def test_a_wrong_bf16_path_gets_no_time():
    setting = Setting("tiny", TINY, "S=16", (16,) * 4, "bf16")
    field = field_of(setting.config, "cpu", FAST)
    field.candidates[field.ours] = Planted(
        field.candidates[field.ours], lambda loss: loss * (1.05 if torch.is_autocast_enabled("cpu") else 1.0)
    )
    assert measure(setting, field)["wrong"][field.ours].startswith("loss in bf16 is")


def test_a_peer_that_fails_is_absent():
    pytest.importorskip("transformers")
    field = field_of(SETTING.config, "cpu", FAST)
    field.candidates[HF_COMPILED] = Planted(field.candidates[HF], raises)
    row = bench_train_step.measure(field, SETTING, "cpu", compiled=True, repeats=2)
    assert row["absent"][HF_COMPILED] == "ValueError: planted" and HF in row["seconds"] and not row["wrong"]


def test_a_compiled_model_of_another_loss_is_wrong():
    pytest.importorskip("transformers")
    field = field_of(SETTING.config, "cpu", FAST)
    field.candidates[HF_COMPILED] = Planted(field.candidates[HF], lambda loss: 1.2 * loss)
    row = bench_train_step.measure(field, SETTING, "cpu", compiled=True, repeats=2)
    assert row["wrong"][HF_COMPILED].startswith("Wrong: loss with dropout is")


def test_without_transformers_ours_is_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    row = measure(SETTING)
    assert "transformers" in row["absent"][HF] and HF not in row["seconds"]
    assert row["ours"] in row["seconds"] and row["speed_up"] == {} and not row["wrong"]


def test_flops_are_those_of_a_counter():
    """6N and attention against torch's count of BertForMaskedLM, which computes all logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, attn_implementation="eager"
    )  # fmt: skip
    samples = Samples.random(SETTING.lengths, 96, "cpu")
    with FlopCounterMode(display=False) as counter:
        transformers.BertForMaskedLM(config)(**samples.padded).loss.backward()
    assert parameter_flops(TINY, 16) * SETTING.tokens == counter.get_total_flops()
    assert SETTING.flops < counter.get_total_flops()


def test_the_command(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    result = results_file.read(tmp_path / "train_step.json")
    steps = [row for row in result["rows"] if row["op"] == "train_step"]
    stages = [row for row in result["rows"] if row["op"] == "mslt_stage"]
    assert [row["case"] for row in steps] == ["small S=16", "small natural <= 16"]
    assert [(row["sizes"]["depth"], row["sizes"]["train_from"]) for row in stages] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 3),
        (4, 0),
    ]
    assert stages[-1]["of_full_step"]["median"] == stages[-1]["predicted"] == 1
    assert all(0 < row["predicted"] < 1 for row in stages[:-1])
    for row in result["rows"]:
        assert row["ours"] in row["seconds"] and row["kernels"] and row["dtype"] == "fp32"
    assert result["kind"] == "train_step" and result["problems"] == []
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")
    for text in ("HF eager", "ours reference absent: left out", "HF compiled absent: left out on CPUs", "joint", "MFU"):
        assert text in printed.out


def test_a_compiled_peer_joins_the_others(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    assert main([*ARGUMENTS, "--compile", "yes", "--out", str(tmp_path)]) == 0
    steps = [row for row in results_file.read(tmp_path / "train_step.json")["rows"] if row["op"] == "train_step"]
    assert [row["case"] for row in steps] == ["small S=16", "small natural <= 16"]
    for row in steps:
        assert {HF, HF_COMPILED, row["ours"]} <= set(row["seconds"]) and row["compile_seconds"] > 0


def test_what_does_not_fit_the_time_is_named(tmp_path, capsys):
    assert main([*ARGUMENTS, "--minutes", "0.00001"]) == 0
    printed = capsys.readouterr().out
    assert "small natural <= 16 fp32: not run, the time was up" in printed
    assert "by MSLT stage: not run, the time was up" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seq-len", "1024"], "--seq-len must be 8 to 512, got 1024"),
        (["--tokens", "100"], "--tokens must be at least two sequences of 128, got 100"),
        (["--heads", "3"], "hidden must be divisible by heads, got hidden 128, heads 3"),
        (["--sizes", "huge"], "argument --sizes: invalid choice: 'huge'"),
    ],
)
def test_bad_use_is_one_line(arguments, line, capsys):
    assert main(["train_step", "--device", "cpu", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"python -m benchmarks train_step: {line}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_bad_use(capsys):
    assert main(["train_step", "--device", "cuda"]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train_step", "--help"])
    assert end.value.code == 0 and "MFU" in capsys.readouterr().out
