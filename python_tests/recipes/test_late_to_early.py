"""specs/late_to_early.md: stages, the pull in time, teachers of both kinds, what is refused, and whole runs."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from model.samples import batch, tiny
from train.processes import ranks
from train.runs import assert_goes_on_bitwise, assert_same_state, log_of, settings, state_after, trained

from stackbert_kernels.cli import main
from stackbert_kernels.compare.runs import read_run
from stackbert_kernels.config import Alignment, ConfigError, OptimConfig, Stage, TeacherShape, TrainConfig, from_dict
from stackbert_kernels.data.batches import Batch
from stackbert_kernels.data.prepare import tokenizer
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import (
    cost_table,
    flops_per_token,
    plan,
    pull,
    relative_step_cost,
    teacher_flops,
    trainable_parameters,
)
from stackbert_kernels.recipes import LateToEarlyOptions as Options
from stackbert_kernels.recipes import baseline, late_to_early
from stackbert_kernels.sweep import settings as sweep_settings
from stackbert_kernels.sweep import work as working
from stackbert_kernels.train import loop
from stackbert_kernels.train import step as one_step
from stackbert_kernels.train.budget import timing_of
from stackbert_kernels.train.teacher import Pull, load_teacher

BASE = TrainConfig(steps=1000)


# Stages and the pull


def test_two_stages():
    config = late_to_early(BASE)
    assert config.stages == (
        Stage(steps=300, depth=12, align=Alignment(2, 0.1, 300), name="aligned"),
        Stage(steps=700, depth=12, name="all layers"),
    )
    (whole,) = late_to_early(BASE, Options(stop=1.0, early=7, weight=3.0)).stages
    assert (whole.steps, whole.align) == (1000, Alignment(7, 3.0, 1000))


@pytest.mark.parametrize(("layers", "layer"), [(24, 3), (12, 2), (8, 1), (4, 1), (1, 1)])
def test_the_layer_of_any_depth(layers, layer):
    config = late_to_early(replace(BASE, model=replace(BASE.model, layers=layers), stages=()))
    assert config.stages[0].align.layer == layer and config.stages[-1].depth == layers


def test_the_pull_falls_in_a_straight_line():
    """The spec's table: at 0, 25, 50, 100 and 150% of the stop."""
    align = Alignment(1, 0.1, 200)
    assert [pull(align, t) for t in (0, 50, 100, 200, 300)] == pytest.approx([0.1, 0.075, 0.05, 0, 0])
    aligned, plain = plan(late_to_early(BASE))
    assert aligned.pull(0) == 0.1 and aligned.pull(150) == pytest.approx(0.05) and aligned.pull(299) > 0
    assert plain.pull(300) == plain.pull(999) == 0
    later = replace(aligned, first=500, last=800)  # steps are those of the stage
    assert later.pull(575) == pytest.approx(0.075)


REFUSED = [
    (lambda: Options(early=-1), "late_to_early: early must be >= 0, got -1"),
    (lambda: Options(weight=-0.1), "late_to_early: weight must be >= 0 and finite, got -0.1"),
    (lambda: Options(stop=0.0), "late_to_early: stop must be in (0, 1], got 0.0"),
    (lambda: late_to_early(BASE, Options(early=13)), "late_to_early: early must be one of 12, got 13"),
    (lambda: late_to_early(replace(BASE, steps=1, stages=())),
     "late_to_early: steps must leave each part (stop 0.3) at least 1, got steps 1"),
    (lambda: Alignment(0, 0.1, 5), "align: layer and until must be >= 1 with weight 0.1, got layer 0, until 5"),
    (lambda: Stage(steps=5, depth=4, train_from=2, embeddings="freeze", align=Alignment(2, 0.1, 5)),
     "align: layer must be one that learns, of 3 to 4, got 2"),
    (lambda: Stage(steps=5, depth=4, align=Alignment(1, 0.1, 4)),
     "align: a stage ends where its teacher does: until must be >= steps, got until 4, steps 5"),
    (lambda: Stage(steps=5, depth=4, submodel=2, embeddings="freeze", align=Alignment(1, 0.1, 5)),
     "align: the layer must be there in every step: not with submodel 2"),
    (lambda: Stage(steps=5, depth=4, pool=2, align=Alignment(1, 0.1, 5)),
     "align: the teacher has a vector for every token: not with pool 2"),
    (lambda: replace(BASE, stages=(Stage(steps=500, depth=12, align=Alignment(1, 0.1, 500)),
                                   Stage(steps=500, depth=6, hidden=384, heads=6, inner=1536, grow="coalesce"),
                                   Stage(steps=1, depth=12, grow="decoalesce")), steps=1001),
     "stages[1]: coalesce cannot follow a stage with a teacher"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


def test_cost():
    """The teacher's forward pass, and three products of the projection; all layers of the teacher see all tokens."""
    config = late_to_early(replace(BASE, teacher_shape=TeacherShape(3, 256, 1024)))
    aligned, plain = config.stages
    S = config.data.seq_len
    forward = 3 * (8 * 256**2 + 4 * 256 * 1024 + 4 * S * 256)
    assert teacher_flops(config, aligned) == forward and teacher_flops(config, plain) == 0
    more = flops_per_token(config, aligned) - flops_per_token(config, plain)
    assert more == pytest.approx(forward + 6 * 256 * 768)
    assert relative_step_cost(config, plain) == 1 < relative_step_cost(config, aligned) < 1.02
    assert trainable_parameters(config, aligned) - trainable_parameters(config, plain) == 256 * 768
    assert "teacher: 3 layers, hidden 256, forward in 300 steps: 0.0" in cost_table(config)
    same = replace(config, teacher_shape=TeacherShape(3, 768, 3072))
    assert trainable_parameters(same, aligned) == trainable_parameters(same, plain)
    last = late_to_early(replace(BASE, teacher_shape=same.teacher_shape), Options(early=12)).stages[0]
    assert flops_per_token(same, last) > flops_per_token(same, aligned)  # computed everywhere


def test_a_stage_is_timed_with_its_teacher():
    config = timing_of(lambda steps: late_to_early(replace(BASE, steps=steps, stages=()), Options(stop=0.01)), 30)
    assert [stage.steps for stage in config.stages] == [30, 30] and config.stages[0].align.until == 30


# Teachers


@pytest.fixture
def teacher(shards, tmp_path):
    """A transformers checkpoint of 3 layers with hidden 16, and the tokenizer of the shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    words = tokenizer(shards)
    shape = transformers.BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertForMaskedLM(shape).save_pretrained(tmp_path / "teacher")
    words.save(str(tmp_path / "teacher" / "tokenizer.json"))
    return tmp_path / "teacher"


def taught(shards, teacher, options=Options(stop=0.5), **changes):  # noqa: B008 (frozen)
    return late_to_early(replace(settings(shards, **changes), teacher=str(teacher)), options)


def test_the_teacher_computes_what_transformers_does(shards, teacher):
    """Frozen, without dropout, and without memory for gradients; the last hidden state at every token."""
    transformers = pytest.importorskip("transformers")
    config = taught(shards, teacher)
    assert load_teacher(config, config.stages[1], torch.device("cpu")) is None
    model = load_teacher(config, config.stages[0], torch.device("cpu"))
    assert not model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.bank.grads.numel() == 0
    tokens = batch((16,), vocab_size=model.config.vocab_size)
    twin = transformers.BertModel.from_pretrained(teacher, add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = twin(tokens.input_ids[None], token_type_ids=tokens.token_types[None]).last_hidden_state[0]
    torch.testing.assert_close(one_step.teacher_vectors(model, tokens), theirs, rtol=1e-5, atol=1e-5)


def sample(lengths, seed=0):
    tokens = batch(lengths, seed=seed)
    return Batch(**vars(tokens), sample_ids=torch.arange(len(lengths)))


def parts_of(whole, cut):
    """`whole` as two batches of which the first has `cut` sequences."""
    end = int(whole.cu_seqlens[cut])
    found = []
    for a, b, first, last in ((0, end, 0, cut), (end, whole.tokens, cut, whole.sequences)):
        inside = (whole.masked >= a) & (whole.masked < b)
        ends = whole.cu_seqlens[first : last + 1] - a
        found.append(Batch(
            input_ids=whole.input_ids[a:b], token_types=whole.token_types[a:b], positions=whole.positions[a:b], cu_seqlens=ends,
            max_seqlen=int(ends.diff().max()), masked=whole.masked[inside] - a, labels=whole.labels[inside], pair_labels=None,
            sample_ids=whole.sample_ids[first:last],
        ))  # fmt: skip
    return found


def test_cutting_a_step_changes_nothing():
    """Loss, alignment and gradients of a batch in one piece and in two of very different sizes, in float64."""
    model = tiny(dropout=0.0, attention_dropout=0.0).double()
    model.project_to(16)
    other = tiny(seed=5, layers=2, hidden=16).double()
    whole, found = sample((9, 2, 24, 13)), []
    for parts in ([whole], parts_of(whole, 2)):
        model.zero_grad()
        total, _, aligned = loop.backward(model, parts, 0, BASE, pull=Pull(other, 2, 0.7))
        gradients = [model.bank.grads.clone(), model.word.grad.clone(), model.projection.grad.clone()]
        found.append([total, aligned, *gradients])
    for one, two in zip(*found, strict=True):
        # the two scalars are added up in float32
        torch.testing.assert_close(one, two, rtol=1e-9 if one.dim() else 1e-6, atol=1e-13 if one.dim() else 1e-6)
    assert all(p.grad is None for name, p in other.named_parameters() if not name.startswith("bank."))
    assert not other.bank.grads.any() and -1 <= found[0][1] < 1


def test_the_gradient_is_that_of_the_weighted_sum():
    """In float64: of the loss without a teacher, and beside it the weight times what an alignment of weight 1 adds."""
    model, other, found = tiny(dropout=0.0, attention_dropout=0.0).double(), tiny(seed=5, layers=2).double(), {}
    for weight in (None, 1.0, 0.3):
        model.zero_grad()
        pull = None if weight is None else Pull(other, 2, weight)
        loop.backward(model, [sample((9, 2, 24, 13))], 0, BASE, pull=pull)
        found[weight] = model.bank.grads.clone()
    added = found[1.0] - found[None]
    assert added[:2].abs().max() > 1e-3 and not added[2:].any()
    torch.testing.assert_close(found[0.3], found[None] + 0.3 * added, rtol=1e-10, atol=1e-14)


# What is refused


def refusal(text, tmp_path, teacher, capsys, *options: str) -> str:
    line = f"pretrain {text} --out {tmp_path / 'run'} --recipe late_to_early --layers 4 --hidden 32 --heads 2 --seq-len 16 "
    line += "--batch-tokens 64 --max-position 24 --steps 20 --dry-run" + (f" --teacher {teacher}" if teacher else "")
    assert main([*line.split(), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and not (tmp_path / "run").exists()
    return printed.err.strip().removeprefix("stackbert: ")


def test_one_line_before_any_work(shards, teacher, tmp_path, capsys):
    def refused(*options, at=teacher, text=shards):
        return refusal(text, tmp_path, at, capsys, *options)

    def edit(file, **changes):
        path = teacher / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    assert (
        refused(at=None) == "late_to_early: --teacher must name a finished run or a transformers directory with a BERT"
    )
    assert refused(at=tmp_path / "none").endswith("must be a run or a transformers directory, got no config.json")
    said = refused("--recipe", "baseline")
    assert said == f"teacher: recipe baseline learns from text alone, late_to_early from a teacher, got {teacher}"
    assert refused("--seq-len", "24") == "teacher: it must have a position for each of seq_len 24 tokens, got 16"
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text(json.dumps({"stages": [], "recipe": "baseline", "model": {}}))
    assert refused(at=begun) == f"teacher: {begun} is a run that has written no model/ yet"

    words = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = (next(k for k, v in vocabulary.items() if v == n) for n in (10, 11))
    edit("tokenizer.json", model=words["model"] | {"vocab": vocabulary | {a: 11, b: 10}})
    assert refused() == f"teacher: {shards} has other words than {teacher / 'tokenizer.json'}"
    text, own = tmp_path / "text.txt", tmp_path / "vocab.txt"
    text.write_text("ban bar bas bat.\n")
    own.write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    said = refused("--vocab", str(own), text=text)
    assert said == f"teacher: {own} has other words than {teacher / 'tokenizer.json'}"
    (teacher / "tokenizer.json").unlink()
    assert refused() == f"teacher: {teacher} has no tokenizer.json or vocab.txt to compare its words with ours by"
    edit("config.json", vocab_size=len(vocabulary) - 1)
    assert refused() == f"teacher: it must know all {len(vocabulary)} words, got {len(vocabulary) - 1}"
    edit("config.json", vocab_size=len(vocabulary), type_vocab_size=1)
    assert refused("--objective", "mlm+sop") == "teacher: objective mlm+sop needs 2 token types, got 1"
    edit("config.json", model_type="roberta")
    assert "must hold a BERT, got model_type 'roberta'" in refused()


# Runs


def test_a_run_goes_on_bitwise(shards, teacher, tmp_path, quick, monkeypatch):
    """In both stages and between them. The teacher runs once a part until it stops, then never, and is freed; the projection learns, has
    moments, and goes with it; log and FLOPs know both."""
    calls, alive, vectors = [], [], one_step.teacher_vectors

    def counted(model, part):
        calls.append(part.tokens)
        assert not torch.is_grad_enabled() or not any(p.requires_grad for p in model.parameters())
        alive[:] = [weakref.ref(model)]
        return vectors(model, part)

    monkeypatch.setattr(one_step, "teacher_vectors", counted)
    evaluate = loop.evaluate

    def evaluated(*arguments):
        freed.append(bool(alive) and alive[0]() is None)
        return evaluate(*arguments)

    freed: list[bool] = []
    monkeypatch.setattr(loop, "evaluate", evaluated)
    config = taught(shards, teacher, optim=OptimConfig(lr=1e-2, accumulate=2), eval_every=5)
    straight = assert_goes_on_bitwise(config, tmp_path, (5, 10, 11))
    assert freed[:4] == [False, False, True, True]  # after steps 5, 10, 15 and 20 of the straight run
    assert len(calls) == 2 * 10 + 2 * 5  # and after step 5 of the one that went on there, none after steps 10 and 11

    known = from_dict(state_after(straight, 20)[1]["config"])
    assert known.teacher_shape == TeacherShape(3, 16, 40)
    states = {step: state_after(straight, step) for step in (4, 5, 10, 11)}
    for step, (tensors, _) in states.items():
        there = {"projection"} if step <= 10 else set()
        assert {name for name in tensors["model"] if "projection" in name} == there
        assert ("projection.exp_avg" in tensors["optimizer"]) == bool(there)
    assert not torch.equal(*(states[step][0]["model"]["projection"] for step in (4, 5)))
    assert float(states[10][0]["optimizer"]["projection.step"]) == 10
    for step, stage in ((5, 0), (11, 1)):
        before = state_after(straight, step - 1)[1]["state"]
        more, tokens = (states[step][1]["state"][name] - before[name] for name in ("flops", "tokens"))
        assert more == pytest.approx(flops_per_token(known, known.stages[stage]) * tokens)
    steps = [event for event in log_of(straight) if event["event"] == "step"]
    assert all((-1 <= event["alignment"] < 1) if event["stage"] == 0 else "alignment" not in event for event in steps)
    assert steps[2]["alignment"] < steps[0]["alignment"]  # it is learned


def train_without_transformers(config, out):
    """Whose import takes longer than the run: the teacher is a model of our own, of the same width."""
    words = config.model.vocab_size
    shape = replace(config.model, layers=2, hidden=16, heads=1, inner=40, vocab_size=words, dropout=0.0)
    loop.load_teacher = lambda _, stage, device: Bert(shape, seed=5).eval() if stage.align.weight else None
    return loop.train(config, out, progress=False)["status"]


def test_two_ranks_are_one_process_with_two_parts_bitwise(shards, teacher, tmp_path, quick, monkeypatch):
    """The projection's gradient is summed like any other, and the alignment is the mean over the tokens of all ranks."""
    monkeypatch.setattr(loop, "load_teacher", loop.load_teacher)  # put back what the run replaces
    words = tokenizer(shards).get_vocab_size()

    def config(parts):
        made = taught(
            shards,
            teacher,
            optim=OptimConfig(lr=1e-2, accumulate=parts),
            checkpoint_every=20,
            log_every=1,
            device="cpu",
        )
        return replace(made, model=replace(made.model, dropout=0.0, attention_dropout=0.0, vocab_size=words))

    two, one = tmp_path / "two", tmp_path / "one"
    outcomes = ranks(2, train_without_transformers, config(1), two, folder=tmp_path / "results")
    assert outcomes == ["finished"] * 2 and train_without_transformers(config(2), one) == "finished"
    ours, theirs = (state_after(out, 20)[0] for out in (two, one))
    assert all(
        torch.equal(tensor, ours[file][name]) for file, named in theirs.items() for name, tensor in named.items()
    )
    ours, theirs = ([event.get("alignment") for event in log_of(out) if event["event"] == "step"] for out in (two, one))
    assert ours == theirs and ours[0] is not None and ours[10] is None


def test_without_weight_it_is_the_baseline_bit_for_bit(shards, teacher, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(one_step, "teacher_vectors", lambda *_: pytest.fail("the teacher runs"))
    config = taught(shards, teacher, Options(weight=0.0), checkpoint_every=20, eval_every=10)
    trained(config, tmp_path / "without")
    trained(baseline(replace(config, stages=(), teacher="")), tmp_path / "baseline")
    left, right = (state_after(tmp_path / name, 20) for name in ("without", "baseline"))
    left[1].pop("config"), right[1].pop("config")
    assert_same_state(left, right)


def test_a_run_learns_from_a_run_and_exports(shards, tmp_path, monkeypatch):
    """A finished small run as the teacher of a larger one, to the end of the pull at the run's end, in bfloat16; the projection is not in
    the export, the comparison knows what the teacher had cost, and an objective that it did not see is refused."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("os.fsync", lambda handle: None)
    small = settings(shards, steps=4, checkpoint_every=50, eval_every=50)
    small = replace(small, model=replace(small.model, layers=2, hidden=16, heads=1, inner=64), stages=())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_report", lambda directory: None)
        assert trained(small, tmp_path / "small")["status"] == "finished"
    run = tmp_path / "small"
    config = taught(shards, run, Options(stop=1.0), steps=8, checkpoint_every=50, eval_every=8, precision="bf16")
    result = trained(config, tmp_path / "large")
    assert result["status"] == "finished" and (tmp_path / "large" / "report.html").exists()
    exported = transformers.BertForMaskedLM.from_pretrained(result["model"])
    assert (exported.config.num_hidden_layers, exported.config.hidden_size) == (4, 32)
    assert not any("projection" in name for name, _ in exported.named_parameters())
    (source,) = read_run(tmp_path / "large").sources
    assert (source.role, source.path) == ("teacher", str(run)) and source.spent == read_run(run).curve[-1].spent
    pairs = replace(config, model=replace(config.model, objective="mlm+nsp"))
    with pytest.raises(ConfigError, match=r"two segments a sample, got a run that saw one \(objective mlm\)"):
        trained(pairs, tmp_path / "pairs")


def test_a_sweep_takes_a_teacher(shards, teacher, tmp_path, monkeypatch, capsys):
    """All methods read the text by the teacher's words."""
    monkeypatch.setattr(sweep_settings, "steps_that_fit", lambda *_: 20)
    monkeypatch.setattr(working, "TIMED_STEPS", 2)
    monkeypatch.setattr(working, "TIMING_SHARE", 0.0)
    monkeypatch.setattr(sweep_settings, "CHECKPOINTS", 1)
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    monkeypatch.setattr(loop, "exportable", lambda *_: False)
    monkeypatch.setattr("os.fsync", lambda handle: None)
    text, out = tmp_path / "text.txt", tmp_path / "sweep"
    words = "ban bar bas bat don dor dos dot kin kir".split()  # noqa: SIM905
    text.write_text(
        "\n\n".join(" ".join(words[i:] + words[:i]) + f" {words[j]}." for i in range(10) for j in range(10))
    )
    shape = "--layers 2 --hidden 16 --heads 2 --seq-len 16 --max-position 16 --batch-tokens 64 --heldout 0.1 --eval-tokens 64 --threads 1"
    line = f"sweep baseline,late_to_early {text} --out {out} --minutes 0.01 --seeds 1 --device cpu {shape}".split()
    assert main([*line, "--teacher", str(teacher)]) == 0
    assert f"late_to_early: teacher {teacher}" in capsys.readouterr().out
    runs = {name: read_run(out / f"{name}-seed0") for name in ("baseline", "late_to_early")}
    assert runs["baseline"].config.teacher == "" and runs["late_to_early"].config.teacher == str(teacher)
    assert runs["late_to_early"].config.teacher_shape == TeacherShape(3, 16, 40)
    assert tokenizer(out / "data").get_vocab() == tokenizer(shards).get_vocab()
    assert main([*line, "--teacher", str(teacher)]) == 0 and "finished before" in capsys.readouterr().err
    others = (
        " ".join(line)
        .replace("baseline,late_to_early", "baseline,bert2bert,late_to_early")
        .replace("--layers 2", "--layers 4")
    )
    others = others.replace(str(out), str(tmp_path / "others"))
    assert main([*others.split(), "--dry-run", "--source", str(teacher), "--teacher", str(teacher)]) == 0
    capsys.readouterr()
    assert main([*line, "--fresh", "--dry-run"]) == 0
    said = "late_to_early: each run first trains its teacher, 1 layers of hidden size 16, for 20% of its time"
    assert said in capsys.readouterr().out
    assert main(["sweep", "baseline", *line[2:], "--teacher", str(teacher)]) == 2
    assert "sweep: --teacher is for late_to_early, but the recipes are baseline" in capsys.readouterr().err
