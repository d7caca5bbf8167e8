"""The comparison, from files as runs leave them. Losses fall with the logarithm of the step, so interpolation on log-compute is exact."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stackbert_kernels.cli import main
from stackbert_kernels.compare.comparison import compare, loss_at, spent_to
from stackbert_kernels.compare.figure import draw, spread
from stackbert_kernels.compare.runs import Run, Source, Spent, _named, read_run
from stackbert_kernels.compare.table import text
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, Stage, TrainConfig, to_dict
from stackbert_kernels.plan import head_cost, layer_flops, step_cost

STEPS, EVERY, TOKENS = 100, 10, 64
BASE = TrainConfig(
    model=ModelConfig(layers=4, hidden=32, heads=2, vocab_size=100, max_position=16),
    data=DataConfig(text=("text.txt",), seq_len=16, batch_tokens=TOKENS),
    optim=OptimConfig(warmup=5),
    steps=STEPS,
)
GROWN = replace(
    BASE,
    recipe="mslt",
    stages=(Stage(steps=60, depth=2), Stage(steps=40, depth=4, train_from=2, grow="copy_top", embeddings="freeze")),
)
DIGESTS = {"tokenizer.json": "t", "heldout.0.tokens": "h", "train.0.tokens": "r"}


def write_run(
    path: Path, config: TrainConfig = BASE, *, loss=lambda step: 10 - math.log(step), flops: float = 1e9, seconds: float = 0.1,
    last: int = STEPS, unigram: float = 8.0, digests: dict | None = DIGESTS, extra: tuple[dict, ...] = (), end: bool = True,
) -> Path:  # fmt: skip
    """A run of `config` that evaluates every ten steps, up to `last`; `flops` and `seconds` are those of a step."""
    lines = [*extra]
    for step in range(EVERY, last + 1, EVERY):
        stage = next(i for i in range(len(config.stages)) if step <= sum(s.steps for s in config.stages[: i + 1]))
        window = {"depth": config.stages[stage].depth, "train_from": config.stages[stage].train_from}
        place = {
            "step": step,
            "stage": stage,
            **window,
            "tokens": step * TOKENS,
            "flops": step * flops,
            "seconds": step * seconds,
        }
        lines.append({"event": "step", **place, "loss": 5.0, "lr": max(1e-6, 1e-3 * (1 - step / STEPS)), "skipped": 0})
        scores = {
            "eval_loss": loss(step),
            "eval_accuracy": step / 1000,
            "unigram_loss": unigram,
            "unigram_accuracy": 0.05,
        }
        lines.append({"event": "eval", **place, **scores})
    if last == STEPS and end:
        lines.append(lines[-1] | {"event": "end", "stage_seconds": [seconds] * len(config.stages)})
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if digests:
        (path / "data").mkdir()
        files = {name: {"bytes": 1, "sha256": digest} for name, digest in digests.items()}
        (path / "data" / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return path


def seeds(path: Path, config: TrainConfig = BASE, offsets=(0.0,), **changes) -> list[Path]:
    """A run for each offset of the loss."""
    return [
        write_run(path.with_name(f"{path.name}-{i}"), replace(config, seed=i), loss=lambda s, o=o: 10 + o - math.log(s), **changes)
        for i, o in enumerate(offsets)
    ]  # fmt: skip


def by_name(result: dict) -> dict[str, dict]:
    return {entry["name"]: entry for entry in result["methods"]}


# What is read off


def test_cost_to_the_target_and_losses_at_equal_cost(tmp_path):
    """The method is 0.1 below at every step for half the FLOPs: it is at the baseline's end after exp(-0.1) of the steps."""
    base = seeds(tmp_path / "base")
    method = seeds(tmp_path / "method", GROWN, (-0.1,), flops=0.5e9, seconds=0.08)
    result = compare([*base, *method])
    entries = by_name(result)
    assert list(entries) == ["mslt", "baseline"]  # the better one first
    assert result["target"] == {"loss": pytest.approx(10 - math.log(100)), "method": "baseline", "runs": 1}
    to = entries["mslt"]["to_target"]
    share = math.exp(-0.1)
    assert to["reached"] and to["runs_that_reached"] == 1
    assert to["flops"] == pytest.approx(share * 0.5e11) and to["flops_saved"] == pytest.approx(1 - share / 2)
    assert to["tokens"] == pytest.approx(share * 6400) and to["tokens_saved"] == pytest.approx(1 - share)
    assert to["seconds"] == pytest.approx(share * 8) and to["seconds_saved"] == pytest.approx(1 - 0.8 * share)
    assert entries["baseline"]["to_target"]["flops"] == pytest.approx(1e11)
    assert entries["baseline"]["to_target"]["flops_saved"] == 0

    assert result["equal"] == {"flops": 0.5e11, "tokens": 6400, "seconds": 8.0}  # what the cheapest run spent
    at = entries["baseline"]["at_equal"]
    assert at["flops"]["mean"] == pytest.approx(10 - math.log(50)) and at["flops"]["mid_decay"]
    assert at["tokens"]["mean"] == pytest.approx(10 - math.log(100)) and not at["tokens"]["mid_decay"]
    assert at["seconds"]["mean"] == pytest.approx(10 - math.log(80)) and at["seconds"]["mid_decay"]
    assert entries["mslt"]["at_equal"]["flops"]["mean"] == pytest.approx(9.9 - math.log(100))
    assert entries["mslt"]["stage_ends"] == [5] and entries["baseline"]["stage_ends"] == []
    json.dumps(result, allow_nan=False)


CURVE = [{"flops": x, "loss": loss} for x, loss in ((1.0, 8.0), (4.0, 6.0), (8.0, 7.0), (16.0, 4.0))]


@pytest.mark.parametrize(
    ("spent", "loss"), [(0.9, None), (1.0, 8.0), (2.0, 7.0), (4.0, 6.0), (32**0.5, 6.5), (16.0, 4.0), (16.1, None)]
)
def test_a_loss_between_evaluations(spent, loss):
    assert loss_at(CURVE, "flops", spent) == (None if loss is None else pytest.approx(loss))


@pytest.mark.parametrize(("loss", "spent"), [(9, 1), (8, 1), (7, 2), (6, 4), (5.5, 8 * 2**0.5), (4, 16), (3.9, None)])
def test_the_first_time_that_a_loss_is_reached(loss, spent):
    assert spent_to(CURVE, "flops", loss) == (None if spent is None else pytest.approx(spent))


def test_what_never_reaches_the_target_says_so(tmp_path):
    result = compare([*seeds(tmp_path / "base"), *seeds(tmp_path / "slow", GROWN, (0.2,))])
    to = by_name(result)["mslt"]["to_target"]
    assert not to["reached"] and to["flops"] is to["flops_saved"] is to["flops_range"] is to["seconds"] is None
    assert [entry["name"] for entry in result["methods"]] == ["baseline", "mslt"]
    line = next(line for line in text(result).split("Cost until")[1].splitlines() if "mslt" in line)
    assert line.count("never reached") == 3 and "0 of 1" in line


def test_seeds_become_mean_and_range(tmp_path):
    """One seed of the method reaches the target, one does not, their mean just does; the target is the mean of the baseline's."""
    base = seeds(tmp_path / "base", offsets=(-0.1, 0.1))
    method = seeds(tmp_path / "method", GROWN, (-0.4, 0.2))
    result = compare([*method, *base])
    assert result["target"]["loss"] == pytest.approx(10 - math.log(100)) and result["target"]["runs"] == 2
    entry = by_name(result)["mslt"]
    assert entry["seeds"] == [0, 1] and entry["to_target"]["runs_that_reached"] == 1
    assert entry["to_target"]["flops"] == pytest.approx(1e11 * math.exp(-0.1))
    assert (
        entry["to_target"]["flops_range"] == [pytest.approx(1e11 * math.exp(-0.3))] * 2
    )  # against seed 0 of the baseline
    assert list(entry["final_against_baseline"].values()) == pytest.approx([-0.1, -0.3, 0.1])
    final = entry["final_loss"]
    assert [final["mean"], final["min"], final["max"]] == pytest.approx(
        [9.9 - math.log(100), 9.6 - math.log(100), 10.2 - math.log(100)]
    )
    assert entry["curve"][-1]["low"] == final["min"] and entry["curve"][-1]["high"] == final["max"]
    assert by_name(result)["baseline"]["to_target"]["reached"]  # by the definition of the target
    assert by_name(result)["baseline"]["to_target"]["runs_that_reached"] == 2
    assert "5.295 ±0.300  -0.100 ±0.200  " in text(result)


def test_only_seeds_that_all_have_count(tmp_path):
    """The third seed's held-out text is harder; that the method has not met it yet is no merit."""
    base = seeds(tmp_path / "base", offsets=(0.0, 0.1, 0.9))
    method = seeds(tmp_path / "method", GROWN, (0.1, 0.2))
    result = compare([*base, *method])
    assert by_name(result)["baseline"]["seeds"] == [0, 1] and not by_name(result)["mslt"]["to_target"]["reached"]
    assert result["target"]["loss"] == pytest.approx(10.05 - math.log(100)) and result["target"]["runs"] == 2
    assert "! baseline: seed 2 left out, not every method has finished it" in text(result)
    apart = compare([base[0], method[1]])
    assert by_name(apart)["mslt"]["seeds"] == [1] and "! different seeds: " in text(apart)


# Sources, teachers, earlier runs


def source_event(path, **cost) -> dict:
    return {"event": "source", "step": 0, "role": "source", "path": str(path), **cost}


def test_a_free_source_changes_costs_and_no_loss(tmp_path):
    small = write_run(tmp_path / "small", flops=2e8, seconds=0.05)
    base = seeds(tmp_path / "base")
    method = seeds(tmp_path / "method", GROWN, (-0.1,), flops=5e8, extra=(source_event(small / "model"),))
    counted, free = compare([*base, *method]), compare([*base, *method], free_source=True)
    ours, theirs = by_name(counted)["mslt"], by_name(free)["mslt"]
    assert ours["before"] == {"flops": 2e10, "tokens": 6400, "seconds": 5.0}
    assert theirs["before"] == {"flops": 0, "tokens": 0, "seconds": 0}
    share = math.exp(-0.1)
    assert ours["to_target"]["seconds"] - theirs["to_target"]["seconds"] == pytest.approx(5.0, rel=0.01)
    assert theirs["to_target"]["flops"] == pytest.approx(5e10 * share)
    for same in ("final_loss", "final_accuracy", "seeds", "steps"):
        assert ours[same] == theirs[same]
    assert [p["loss"] for p in ours["curve"]] == [p["loss"] for p in theirs["curve"]] and counted["target"] == free[
        "target"
    ]
    assert by_name(counted)["baseline"]["spent"] == by_name(free)["baseline"]["spent"]
    assert f"source {small / 'model'} is counted: 2e+10 FLOPs, 5 s" in text(counted)
    assert "is taken as free" in text(free) and "sources are free" in text(free)


def test_a_source_has_sources(tmp_path):
    first = write_run(tmp_path / "first", flops=1e8)
    second = write_run(tmp_path / "second", flops=2e8, extra=(source_event(first),))
    third = write_run(tmp_path / "third", extra=(source_event(second), source_event(tmp_path / "third")))
    spent = {source.path: source.spent for source in read_run(third).sources}
    assert spent[str(second)].flops == pytest.approx(3e10)
    assert spent[str(third)] is None  # itself: nothing is counted in a circle
    here, there = tmp_path / "here", tmp_path / "there"
    write_run(here, extra=(source_event(there),))
    write_run(there, extra=(source_event(here),))
    circle = read_run(write_run(tmp_path / "outside", extra=(source_event(here),))).sources[0]
    assert circle.spent.flops == pytest.approx(2e11)  # each of the two once


def test_a_source_without_its_run(tmp_path):
    known = source_event("/gone", role="teacher", flops=7.0, seconds=3.0)
    run = write_run(tmp_path / "run", extra=(known, source_event("/unknown")))
    assert read_run(run).sources == (
        Source("teacher", "/gone", Spent(7.0, 0.0, 3.0)),
        Source("source", "/unknown", None),
    )
    assert "source /unknown has no record of its cost, which is left out" in text(compare([run]))


def test_a_configuration_that_names_a_source():
    config = {
        "recipe": "x",
        "options": {"source": "runs/a", "teacher": ""},
        "stages": [{"teacher": "runs/b/model"}],
        "source": 3,
    }
    assert list(_named(config)) == [("source", "runs/a"), ("teacher", "runs/b/model")]


def test_a_budget_below_the_cost_of_the_source(tmp_path):
    """At the baseline's whole budget the method has not begun."""
    costly = source_event("/gone", flops=9e12, tokens=9e9, seconds=9e3)
    result = compare([*seeds(tmp_path / "base"), *seeds(tmp_path / "method", GROWN, extra=(costly,))])
    assert by_name(result)["mslt"]["at_equal"] == {"flops": None, "tokens": None, "seconds": None}
    assert text(result) and by_name(result)["mslt"]["to_target"]["flops_saved"] < -80


# How time and FLOPs are counted


def test_seconds_as_the_sweep_timed_the_steps(tmp_path):
    """Of a run that a busy machine slowed down, and of the model that it began from."""
    source = write_run(tmp_path / "sources" / "mslt-seed0", BASE, seconds=7.0)
    run = write_run(tmp_path / "mslt-seed0", replace(GROWN, source=str(source)), seconds=9.0)
    entry = {"seconds_per_step": [0.25, 0.5], "source_seconds_per_step": [2.0]}
    (tmp_path / "sweep.json").write_text(json.dumps({"methods": {"mslt": entry}}))
    first = GROWN.stages[0].steps
    timed = read_run(run, clock="timed")
    for point in timed.curve:
        assert point.spent.seconds == 0.25 * min(point.step, first) + 0.5 * max(0, point.step - first)
    assert timed.sources[0].spent.seconds == 2.0 * STEPS
    passed = read_run(run)
    assert passed.curve[-1].spent.seconds == 9.0 * STEPS and passed.sources[0].spent.seconds == 7.0 * STEPS
    assert [p.spent.flops for p in passed.curve] == [p.spent.flops for p in timed.curve]
    result = compare([run], clock="timed")
    assert result["clock"] == "timed" and "when it was timed" in text(result)
    with pytest.raises(ConfigError, match="is no run of a sweep that timed its steps: take --clock passed"):
        compare([run, *seeds(tmp_path / "elsewhere" / "base")], clock="timed")


# How FLOPs are counted


@pytest.mark.parametrize(("counting", "backward"), [("b1", 1.0), ("b2", 2.0)])
def test_flops_by_layers_are_the_sum_over_steps(tmp_path, counting, backward):
    run = read_run(write_run(tmp_path / "run", GROWN), counting)
    head = head_cost(GROWN.model, GROWN.data)
    a_step = [
        step_cost(s.depth, s.train_from, head=head, backward=backward) for s in GROWN.stages for _ in range(s.steps)
    ]
    for point in run.curve:
        assert point.spent.flops == pytest.approx(sum(a_step[: point.step]) * TOKENS * layer_flops(GROWN))
    result = compare([tmp_path / "run"], counting=counting)
    assert result["counting"] == counting and f"(b = {backward:g})" in text(result)
    executed = read_run(tmp_path / "run")
    assert [p.loss for p in executed.curve] == [p.loss for p in run.curve] and executed.curve[-1].spent.flops == 1e11


# What is not ranked, refused or pointed at


def test_a_run_stopped_in_mid_decay_is_flagged_and_not_ranked(tmp_path):
    base = seeds(tmp_path / "base", offsets=(0.0, 0.1))
    stopped = write_run(tmp_path / "stopped", replace(GROWN, seed=1), last=50)
    result = compare([*base, stopped])
    assert [entry["name"] for entry in result["methods"]] == ["baseline"]
    flagged = result["not_ranked"][0]
    assert (flagged["name"], flagged["why"]) == ("mslt, seed 1", "stopped in mid-decay, after step 50 of 100")
    printed = text(result)
    assert f"! mslt, seed 1 is not ranked: stopped in mid-decay, after step 50 of 100 ({stopped})" in printed
    finished = write_run(tmp_path / "finished", replace(GROWN, seed=0))
    result = compare([*base, stopped, finished])  # its sister counts alone, and so does the baseline's of that seed
    assert by_name(result)["baseline"]["seeds"] == [0]
    assert by_name(result)["mslt"]["seeds"] == [0] and len(result["not_ranked"]) == 1
    with pytest.raises(ConfigError, match="the baseline mslt has no finished run"):
        compare([*base, stopped], baseline="mslt")


def test_all_steps_without_the_end(tmp_path):
    base = seeds(tmp_path / "base")
    assert compare([*base, write_run(tmp_path / "cut", GROWN, end=False)])["not_ranked"][0]["name"] == "mslt, seed 0"
    lost = write_run(tmp_path / "lost", GROWN, loss=lambda step: None if step == STEPS else 5.0)
    assert compare([*base, lost])["not_ranked"][0]["why"] == "its last held-out loss is not finite"


def test_a_rate_that_did_not_decay_is_pointed_at(tmp_path):
    base = seeds(tmp_path / "base")
    constant = write_run(tmp_path / "constant", GROWN)
    lines = [json.loads(line) for line in (constant / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"lr": 1e-3} if line["event"] == "step" else line for line in lines]
    (constant / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "! mslt: its rate had not decayed when it ended (100% of the highest)" in text(compare([*base, constant]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digests": DIGESTS | {"tokenizer.json": "x"}}, "has another tokenizer than"),
        ({"digests": DIGESTS | {"heldout.0.tokens": "x"}}, "has another held-out text than"),
        ({"digests": None, "unigram": 7.5}, "has another text or tokenizer than"),
        (
            {"config": replace(GROWN, data=replace(GROWN.data, mask_rate=0.3))},
            "was evaluated in another way than .*: mask_rate 0.3 and 0.15: their losses cannot be compared",
        ),
    ],
)
def test_losses_that_mean_different_things_are_refused(tmp_path, changes, message):
    base = seeds(tmp_path / "base")
    with pytest.raises(ConfigError, match=message):
        compare([*base, write_run(tmp_path / "other", **{"config": GROWN} | changes)])


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"digests": DIGESTS | {"train.0.tokens": "x"}}, "! the runs were trained on different texts"),
        ({"digests": None}, "! the prepared text of other is not there any more"),
        ({"config": replace(GROWN, precision="bf16")}, "! different precision: bf16 (mslt), fp32 (baseline)"),
        ({"config": replace(GROWN, data=replace(GROWN.data, short_seq_len=8))}, "! different short_seq_len: 8 (mslt), 0 (baseline)"),
        ({"config": replace(GROWN, model=replace(GROWN.model, hidden=64))}, "! different hidden: 64 (mslt), 32 (baseline)"),
        ({"config": replace(GROWN, seed=4)}, "! different seeds: 4 (mslt), 0 (baseline)"),
        ({"config": replace(GROWN, optim=OptimConfig(lr=3e-4, warmup=20))}, "! different share of steps to warm up: 0.2 (mslt)"),
        ({}, "! a method with one run says nothing about chance: take three seeds"),
    ],
)  # fmt: skip
def test_what_a_reader_must_know_is_said(tmp_path, changes, note):
    other = write_run(tmp_path / "other", **{"config": GROWN} | changes)
    printed = text(compare([other, *seeds(tmp_path / "base")]))
    assert note in printed


def test_the_plateau_stands_beside_the_losses(tmp_path):
    runs = [*seeds(tmp_path / "base"), *seeds(tmp_path / "method", GROWN)]
    assert "without context (unigram): loss 8.000, accuracy 0.050" in text(compare(runs))
    assert "not clearly below" not in text(compare(runs))
    low = [*seeds(tmp_path / "low", unigram=5.4)]
    assert "! baseline ended at 5.395, not clearly below the loss without context (5.400)" in text(compare(low))


# Methods and the baseline


def test_methods_of_one_recipe_are_named_by_what_differs(tmp_path):
    fast = replace(BASE, optim=OptimConfig(lr=2e-3, warmup=5))
    runs = [*seeds(tmp_path / "slow"), *seeds(tmp_path / "fast", fast)]
    with pytest.raises(
        ConfigError, match=r"several methods could be the baseline: baseline lr=0.0001, baseline lr=0.002"
    ):
        compare(runs)
    result = compare(runs, baseline=str(runs[1]))
    assert result["target"]["method"] == "baseline lr=0.002"
    assert compare(runs, baseline="baseline lr=0.0001")["target"]["method"] == "baseline lr=0.0001"
    other = replace(GROWN, stages=(Stage(steps=50, depth=2), Stage(steps=50, depth=4, grow="copy_top")))
    runs = [write_run(tmp_path / "a", GROWN), write_run(tmp_path / "b", other), *runs[:1]]
    assert set(by_name(compare(runs))) == {"mslt (a)", "mslt (b)", "baseline"}
    runs = [write_run(tmp_path / "a" / "run", GROWN), write_run(tmp_path / "b" / "run", other)]
    assert set(by_name(compare(runs))) == {"mslt (a/run)", "mslt (b/run)"}


def test_what_changes_no_number_makes_no_method(tmp_path):
    runs = seeds(tmp_path / "base", offsets=(0.0, 0.1))
    other = replace(BASE, seed=7, keep=9, log_every=3, data=replace(BASE.data, text=("elsewhere",)))
    result = compare([*runs, write_run(tmp_path / "other", other)])
    assert by_name(result)["baseline"]["seeds"] == [0, 1, 7]


def test_without_a_baseline_the_first_run_is_it(tmp_path):
    first = replace(GROWN, recipe="stacking")
    result = compare([write_run(tmp_path / "a", first), write_run(tmp_path / "b", GROWN)])
    assert result["target"]["method"] == "stacking"


# The command


def run_main(arguments, capsys) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "runs"
    seeds(folder / "base", offsets=(0.0, 0.05))
    seeds(folder / "method", GROWN, (-0.1, 0.02))
    write_run(folder / "cut", replace(GROWN, seed=5), last=40)
    code, out, err = run_main(["compare", folder, "--out", tmp_path / "out"], capsys)
    assert code == 0 and err == "" and str(tmp_path / "out" / "compare.png") in out
    assert max(map(len, out.split("!")[0].splitlines())) <= 130  # reads without wrapping
    code, again, _ = run_main(["compare", folder, "--json", "--baseline", "mslt", "--flops", "b1"], capsys)
    result = json.loads(again)
    assert code == 0 and result["target"]["method"] == "mslt" and result["counting"] == "b1"
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored == json.loads(json.dumps(compare([folder])))
    assert (tmp_path / "out" / "compare.png").read_bytes() == draw(stored)  # the JSON has all that the figure shows


def test_names_beside_the_figure_keep_their_order_and_never_overlap():
    for heights in ([0.5], [0.1, 0.9], [0.3, 0.3, 0.3], [0.1, 0.12, 0.13, 0.5, 0.52, 0.9]):
        moved = spread(heights, 0.05)
        assert all(b - a > 0.05 - 1e-9 for a, b in itertools.pairwise(moved))
        assert sum(moved) == pytest.approx(sum(heights))  # a group stays centred
    assert spread([0.1, 0.9], 0.05) == [0.1, 0.9]
    assert spread([0.3, 0.31, 0.335], 0.02) == pytest.approx([0.295, 0.315, 0.335])


def test_what_most_methods_share_is_said_shortly(tmp_path):
    """Of four methods, three have one rate: they are the others."""
    for i, name in enumerate(("baseline", "mslt", "stacking", "core")):
        write_run(tmp_path / name, replace(BASE, recipe=name, optim=replace(BASE.optim, lr=2e-3 if i == 1 else 1e-3)))
    assert "! different lr: 0.002 (mslt), 0.001 (the others)" in text(compare([tmp_path]))


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.png").write_bytes(b"old")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run_main(["compare", run, "--out", tmp_path / "out"], capsys)
    assert code == 0 and err.count("\n") == 1 and "matplotlib" in err
    assert not (tmp_path / "out" / "compare.png").exists() and (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare: wanted at least one run directory, got none"),
        (["nothing"], "compare: nothing must be a run directory (config.json and metrics.jsonl) or a folder of them"),
        (["run", "run"], "compare: run is named twice"),
        (["run", "run/."], "is named twice"),
        (["run", "--baseline", "fast"], "baseline must be one of the runs or one of the methods baseline, got 'fast'"),
        (["begun"], "compare: begun has no evaluation with a finite loss yet"),
        (["run", "begun"], "compare: begun has no evaluation with a finite loss yet"),
        (["folder"], "compare: no run has an evaluation with a finite loss yet (2 begun)"),
        (["broken"], "compare: broken holds no run that can be read: "),
        (["run", "--flops", "b3"], "'b3'"),
        (["run", "--out", "run/config.json"], "cannot be written"),
    ],
)
def test_bad_use_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    write_run(Path("begun"), last=0)
    write_run(Path("folder/a"), last=0)
    write_run(Path("folder/b"), last=0)
    (write_run(Path("broken")) / "config.json").write_text("{}}")
    code, out, err = run_main(["compare", *arguments], capsys)
    assert code == 2 and out == "" and err.startswith("stackbert: ") and err.count("\n") == 1
    assert message in err


def test_a_run_of_a_folder_that_has_just_begun_is_left_out(tmp_path, capsys):
    """A sweep can be looked at while it goes on."""
    seeds(tmp_path / "runs" / "base")
    write_run(tmp_path / "runs" / "begun", GROWN, last=0)
    code, out, err = run_main(["compare", tmp_path / "runs"], capsys)
    assert code == 0 and err == ""
    assert f"! {tmp_path / 'runs' / 'begun'} has no evaluation with a finite loss yet: left out" in out


def test_a_run_is_read_as_it_stands(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert isinstance(run, Run) and run.unigram == (8.0, 0.05) and run.last_rate < 0.25
    assert run.fingerprint == {"tokenizer": "t", "held-out text": "h", "training text": "r"}
