"""The sweep with the settings of this folder: every preset is a sweep that can be begun; pieces on other machines go on from what was kept."""

from __future__ import annotations

import json
import random
import tarfile
from dataclasses import replace

import pytest

from benchmarks import bench_sweep
from benchmarks.__main__ import main
from benchmarks.bench_sweep import PRESETS
from stackbert_kernels import sweep as sweeps
from stackbert_kernels.recipes import RECIPES, Bert2bertOptions
from stackbert_kernels.sweep import settings as sweep_settings
from stackbert_kernels.sweep import work as working
from stackbert_kernels.train import loop


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(loop, "exportable", lambda run, _: "sources" in run.directory.parts)
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda *_: 20)
    monkeypatch.setattr(working, "TIMED_STEPS", 2)
    words = random.Random(0)
    lines = (" ".join(words.choices("abc acb bac bca cab cba".split(), k=12)) + "." for _ in range(300))  # noqa: SIM905
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(lines))
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_sweep(text, name):
    preset = PRESETS[name]
    options = bench_sweep.parser("sweep").parse_args([str(text), "--out", str(text.parent / "out"), "--jobs", "1"])
    sweep = sweeps.checked(bench_sweep.sweep_of(options, preset))
    assert sweep.methods == preset.recipes and all(sweep.config(m, 1000).steps == 1000 for m in sweep.methods)
    plan = sweeps.outline(sweep)
    assert f"{len(preset.recipes) * preset.seeds} runs, 0 of them finished" in plan and "tuning: " in plan
    if name != "pretend":
        assert preset.recipes == tuple(RECIPES) and preset.config.model.layers >= 8


def test_options_replace_what_the_preset_says(text):
    given = f"{text} --out out --recipes mslt --minutes 2 --seeds 4 --jobs 1 --tune 1e-2 --tune-minutes 1 --lr mslt=3e-3 --seed 7 --threads 3"
    sweep = bench_sweep.sweep_of(bench_sweep.parser("sweep").parse_args(given.split()), PRESETS["cpu"])
    assert (sweep.methods, sweep.seconds, sweep.seeds, sweep.tune_seconds) == (("mslt",), 120.0, 4, 60.0)
    assert sweep.tune == (1e-2,) and sweep.rates == {"mslt": 3e-3} and sweep.options == {}
    assert (sweep.base.seed, sweep.base.threads, sweep.base.model) == (7, 3, PRESETS["cpu"].config.model)

    def rates(line: str) -> dict[str, float]:
        return bench_sweep.sweep_of(bench_sweep.parser("sweep").parse_args(line.split()), PRESETS["cpu"]).rates

    known = PRESETS["cpu"].rates["albert"]
    assert rates(f"{text} --out out --lr mslt=3e-3") == {"mslt": 3e-3, "albert": known}
    assert rates(f"{text} --out out --lr albert=3e-3") == {"albert": 3e-3} != {"albert": known}


def test_pieces_on_machines_that_are_given_back(text, monkeypatch, capsys):
    """The first piece has only time to tune; the second makes the runs in an empty folder, without the text; the third finds all done, and
    what the sources had cost, though nothing is where it was."""
    recipes = ("baseline", "bert2bert")
    preset = replace(PRESETS["pretend"], recipes=recipes, options={"bert2bert": Bert2bertOptions(share=0.0)})
    monkeypatch.setitem(PRESETS, "pretend", preset)
    state = text.parent / "state.tar.gz"
    line = f"sweep --preset pretend --minutes 5 --tune-minutes 0.5 --lr bert2bert=1e-3 --state {state}"
    made = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda config, out, **o: made.append(out) or train(config, out, **o))

    def piece(number, *more):
        made.clear()
        code = main([*line.split(), "--out", str(text.parent / f"piece{number}"), *more])
        names = ["/".join(out.parts[out.parts.index(f"piece{number}") + 1 :]) for out in made]
        return code, names, *capsys.readouterr()

    code, names, _, err = piece(1, str(text), "--stop-after", "2")
    assert code == 0 and err.endswith("0 of 2 runs finished; the same command goes on\n"), err
    assert names[-2:] == ["tuning/baseline-lr0.001", "tuning/baseline-lr0.003"]
    with tarfile.open(state) as archive:
        assert archive.getnames() == ["sweep.json"]

    code, names, out, err = piece(2)
    assert code == 0 and names == ["baseline-seed0", "sources/bert2bert-seed0", "bert2bert-seed0"], err
    assert "Cost until held-out loss" in out and err.endswith("2 of 2 runs finished\n")
    compared = (text.parent / "piece2" / "compare.json").read_text()
    for part in ("piece1", "piece2"):
        (text.parent / part).rename(text.parent / f"gone-{part}")

    code, names, out, err = piece(3, "--json")
    assert code == 0 and names == [] and err.count("finished before") == 2
    again, first = json.loads(out)["comparison"], json.loads(compared)
    spent = [{m["name"]: m["spent"] for m in result["methods"]} for result in (again, first)]
    assert spent[0] == spent[1] and again["notes"] == first["notes"]
    assert (json.loads(out)["runs"], json.loads(out)["finished"]) == (2, 2)

    # Other tokens are another comparison.
    other = text.with_name("other.txt")
    other.write_text("\n\n".join(reversed(text.read_text().split("\n\n"))))
    state.with_name(state.name + ".tokens").unlink()
    code, _, _, err = piece(4, str(other))
    assert code == 2 and "holds runs of other tokens than" in err


def test_bad_use_is_one_line(text, capsys):
    for given, said in (
        ("--lr fast", "--lr: wanted RECIPE=number, got 'fast'"),
        ("--lr mslt=x", "--lr: wanted RECIPE=number, got 'mslt=x'"),
        ("--recipes fast", "invalid choice: 'fast'"),
        ("--seeds 0", "sweep: seeds must be >= 1, got 0"),
        ("--preset large", "invalid choice: 'large'"),
    ):
        code = main(["sweep", str(text), "--preset", "pretend", "--out", str(text.parent / "out"), *given.split()])
        assert code == 2 and said in (err := capsys.readouterr().err) and err.count("\n") == 1
    broken = text.with_name("broken")
    broken.write_text("no archive")
    code = main(["sweep", str(text), "--preset", "pretend", "--out", str(text.parent / "out"), "--state", str(broken)])
    assert code == 2 and "--state" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["leads out", "absolute", "link"])
def test_a_state_that_would_write_elsewhere_is_refused(text, capsys, kind):
    state, aim = text.parent / "state.tar.gz", text.parent / "elsewhere"
    with tarfile.open(state, "w:gz") as archive:
        member = tarfile.TarInfo({"leads out": "../elsewhere", "absolute": str(aim), "link": "sweep.json"}[kind])
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, str(text)
        archive.addfile(member)
    code = main(["sweep", str(text), "--preset", "pretend", "--out", str(text.parent / "out"), "--state", str(state)])
    assert code == 2 and "is no file of a sweep" in capsys.readouterr().err and not aim.exists()
