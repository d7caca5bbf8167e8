"""The command line: one line and exit code 2 for what is wrong, before anything slow is loaded; results for people and as JSON."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from stackbert_kernels import __version__
from stackbert_kernels.cli import main
from stackbert_kernels.cli.arguments import one_line, parse
from stackbert_kernels.cli.commands import COMMANDS
from stackbert_kernels.cli.options import Doctor, Pretrain
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.recipes import NEED_SOURCE, NEED_TEACHER, RECIPES, MsltOptions, baseline, mslt

SMALL = "--layers 4 --hidden 32 --heads 2 --seq-len 16 --max-position 16 --batch-tokens 64 --train-vocab-size 100 --mslt.stages 2 --heldout 0.1"


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder to work in, with text.txt."""
    monkeypatch.chdir(tmp_path)
    words = ["return", "the", "value", "of", "every", "list", "that", "has", "a", "length", "and", "a", "name"]
    documents = [" ".join(words[(i + j) % len(words)] for j in range(12)) + "." for i in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def run(line, capsys):
    """(exit code, stdout, stderr); --help and tyro leave by SystemExit."""
    try:
        code = main(line.split())
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


BAD = {
    "": "Expected one of {pretrain, sweep, compare, prepare, doctor, grow, checkpoint, bench}",
    "train": "Unrecognized options: train; commands are pretrain, sweep, compare, prepare, doctor, grow, checkpoint, bench",
    "pretrain text.txt": "Missing from stackbert pretrain: --out",
    "pretrain --out run": "text must name at least one file, glob or directory, got none",
    "pretrain text.txt --out run --layer 3": "Unrecognized options: --layer, 3; did you mean --layers?",
    "pretrain text.txt --out run --layers x": "--layers: wanted a whole number, got 'x'",
    "pretrain text.txt --out run --lr fast": "--lr: wanted a number, got 'fast'",
    "pretrain text.txt --out run --recipe foo": "'foo' for argument '--recipe'",
    "pretrain text.txt --out run --hidden 100 --heads 3": "hidden must be divisible by heads, got hidden 100, heads 3",
    "pretrain text.txt --out run --dropout 2": "dropout must be in [0, 0.998), got 2.0",
    "pretrain text.txt --out run --precision fp16": "precision must be one of fp32, bf16, got 'fp16'",
    "pretrain text.txt --out run --device tpu": "device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    "pretrain text.txt --out run --steps 0": "steps must be > 0",
    "pretrain text.txt --out run --seq-len 1024": "seq_len must be <= max_position, got seq_len 1024, max_position 512",
    "pretrain text.txt --out run --layers 10": "mslt: layers must be divisible by stages, got layers 10, stages 4",
    "pretrain text.txt --out run --mslt.joint 1.5": "joint must be in [0, 1), got 1.5",
    "pretrain text.txt --out run --mslt.stages 2 --steps 100 --mslt.stage-weights 1 2 3": "stage_weights must have 2 numbers",
    "pretrain text.txt --out run --mslt.stages 2 --mslt.init stack": "init must be one of",
    "pretrain text.txt --out run --recipe baseline --mslt.joint .3": "--mslt options need --recipe mslt, got --recipe baseline",
    "pretrain text.txt --out run --recipe mslt --stacking.start 3": "--stacking options need --recipe stacking, got --recipe mslt",
    "pretrain text.txt --out run --recipe stacking --layers 7": "stacking: layers must be start x 2 x 2 ..., got layers 7",
    "pretrain text.txt --out run --recipe incremental --layers 3": "incremental: layers must be at least stages",
    "pretrain text.txt --out run --layers 1000000000000": "layers must be at most 4096, got 1000000000000",
    "pretrain text.txt --out run --hidden 1000000 --heads 10 --device cpu": "parameters take ",
    "pretrain text.txt --out run --vocab-size 30522": "vocab_size must be at most train_vocab_size where the words are learned here",
    "pretrain text.txt --out run --objective mlm+sop --token-types 1": "token_types must be >= 2 with objective mlm+sop, got 1",
    "pretrain text.txt --out run --batch-tokens 1000000000000": "batch_tokens must be at most 268435456",
    "pretrain text.txt --out run --accumulate 4096": "accumulate must be <= batch_tokens, got accumulate 4096, batch_tokens 2048",
    "pretrain text.txt --out run --seed -1": "seed must be in [0, 2^63), got -1",
    "pretrain text.txt --out run --threads 1000000": "threads must be at most 4096, got 1000000",
    "pretrain text.txt --out run --norm-eps 1e-40": "norm_eps must be >= 1e-30, got 1e-40",
    "pretrain text.txt --out run --weight-decay inf": "weight_decay must be finite, got inf",
    "pretrain text.txt --out run --beta1 2": "stackbert: beta1 must be in [0, 1), got 2.0",
    "pretrain text.txt --out run --short-seq-len 128": "short_seq_len must be 0 or in [8, seq_len), got short_seq_len 128, seq_len 128",
    "pretrain text.txt --out run --short-share 0.5": "short_share needs short_seq_len, got short_share 0.5 without it",
    "pretrain text.txt --out run --short-seq-len 64 --steps 4": "steps must leave both lengths (short_share 0.9) at least 1, got steps 4",
    "pretrain text.txt --out run --mslt.rewarm x": "--mslt.rewarm: wanted a whole number or None, got 'x'\n",
    "pretrain text.txt --out run --mslt.stage-weights 1 x": "--mslt.stage-weights: wanted numbers, got '1', 'x'\n",
    "pretrain text.txt --out run --mslt.stage-weights 9e307 9e307 9e307 9e307": "stage_weights are too large to share out 840 steps by",
    "pretrain text.txt --out run --recipe share_then_unshare --share-then-unshare.below nan": "stackbert: share_then_unshare: below must be",
    "pretrain text.txt --out run --recipe share_then_unshare --share-then-unshare.every 5": "until fixed does not read every, got 5",
    "pretrain text.txt --out run --recipe progressive_layer_dropping --progressive-layer-dropping.keep 1e-320": "keep must be in [0.001, 1]",
    "pretrain text.txt --out run --recipe bert2bert": "bert2bert: --source must name a run or a transformers directory",
    "pretrain text.txt --out run --recipe bert2bert --source nothing": "source: nothing must be a run or a transformers directory",
    "pretrain text.txt --out run --recipe baseline --source nothing": "source: recipe baseline begins from random weights",
    "pretrain text.txt --out run --recipe albert --objective mlm+nsp": "albert: sentence order takes the place of next sentence",
    "pretrain text.txt --out run --recipe albert --albert.groups 5": "albert: layers must be divisible by groups, got layers 12, groups 5",
    "pretrain text.txt --out run --recipe multi_level --embedding 64": "multi_level: factorised embeddings have no smaller level",
    "pretrain text.txt --out run --recipe multi_level --layers 6 --multi-level.levels 3": "layers must be divisible by factor for each smaller",
    "pretrain nothing.txt --out run": "text: no such file, directory or glob: ",
    "pretrain empty.txt --out run": "text is empty: ",
    "pretrain text.txt --out run --vocab nothing.txt": "vocab: cannot read ",
    "pretrain text.txt --out text.txt": "out must be a directory, got a file: text.txt",
    "pretrain text.txt --out .": "out must be new, empty or a run directory, got . with ",
    "prepare nothing.txt --out shards": "text: no such file, directory or glob: nothing.txt",
    "grow nothing grown --layers 4": "grow: source must be a transformers directory with a config.json, got nothing",
    "grow . grown": "Missing from stackbert grow: --layers",
    "grow . grown --layers x": "--layers: wanted a whole number, got 'x'",
    "grow . grown --layers 4 --operator fold": "'fold' for argument '--operator'",
    "grow . grown --layers 4 --optimizer-state keep": "'keep' for argument '--optimizer-state'",
    "checkpoint verify nothing": "needs a run directory, a checkpoints folder or a checkpoint, got nothing",
    "checkpoint look nothing": "'look'",
    "prepare text.txt --out shards --seq-len 64": "Unrecognized or misplaced options: --seq-len 64\n",
    "prepare text.txt --out shards --short-share 0.5": "Unrecognized or misplaced options: --short-share 0.5\n",
    "prepare text.txt --out shards --workers -1": "workers must be in [0, 1024], got -1",
    "sweep baseline text.txt --out sweep --minutes 1 --seeds 1000000": "sweep: seeds must be at most 1000, got 1000000",
    "sweep baseline text.txt --out sweep --minutes 1 --seed -1": "seed must be in [0, 2^63), got -1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments_are_one_line_and_exit_code_2(text, capsys, line):
    before = sorted(os.listdir(text))
    code, out, err = run(line, capsys)
    assert code == 2
    assert err.startswith("stackbert: ") and err.count("\n") == 1 and out == ""
    assert BAD[line] in err
    assert sorted(os.listdir(text)) == before


def test_a_vocabulary_of_another_size_is_refused(text, capsys):
    (text / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a"]))
    code, _, err = run("pretrain text.txt --out run --vocab vocab.txt --vocab-size 30522", capsys)
    assert code == 2 and "vocab_size must be the tokenizer's 7 (or 0, to take it), got vocab_size 30522" in err


def test_whole_words_need_a_tokenizer_of_pieces(text, capsys):
    from tokenizers import Tokenizer, models

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a"]
    Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")).save("words.json")
    before = sorted(os.listdir(text))
    code, _, err = run("pretrain text.txt --out run --vocab words.json --whole-word", capsys)
    assert code == 2 and "whole_word needs a tokenizer that marks pieces inside words (WordPiece's ##), got " in err
    assert sorted(os.listdir(text)) == before


def test_what_this_machine_lacks_is_refused_before_any_work(text, capsys, monkeypatch):
    monkeypatch.setattr("stackbert_kernels.ops._triton.INTERPRETED", False)  # as for a user
    before = sorted(os.listdir(text))
    code, _, err = run(f"pretrain text.txt --out run --device cuda:{torch.cuda.device_count()}", capsys)
    assert code == 2 and err.count("\n") == 1 and "device must be one that torch can use, got cuda:" in err
    code, _, err = run("pretrain text.txt --out run --device cpu --impl triton", capsys)
    assert code == 2 and err.count("\n") == 1
    assert "Triton takes CPU tensors only under TRITON_INTERPRET=1, for tests; usable: native, reference" in err
    assert sorted(os.listdir(text)) == before


def bad_values(annotation: str) -> list[str]:
    """By the type of an option: values that none with this type can have."""
    if "str" in annotation and "tuple" not in annotation:
        return ["nonsense"]
    if "float" in annotation:
        return ["-1", "nan"]
    return ["-1"] if "int" in annotation else []


def huge_values(annotation: str) -> list[str]:
    return ["1000000000000"] if "int" in annotation else ["1e300"] if "float" in annotation else []


def every_option(section: str) -> list[tuple[str, str]]:
    """(name, type) of a recipe's options, or of those that all recipes share."""
    from dataclasses import fields

    if section in RECIPES:
        return [(f"{section}.{f.name}".replace("_", "-"), str(f.type)) for f in fields(RECIPES[section][1])]
    named = [f for part in (ModelConfig, DataConfig, OptimConfig, TrainConfig) for f in fields(part)]
    aside = ("model", "data", "optim", "stages", "text", "recipe")
    return [(f.name.replace("_", "-"), str(f.type)) for f in named if f.name not in aside]


@pytest.mark.parametrize("section", ["of all", *RECIPES])
def test_every_option_refuses_a_bad_value_in_one_line(text, capsys, section):
    """What is negative, not a number or not a word of the option; and what is far too large either works or is refused as well."""
    recipe = section if section in RECIPES else "baseline"
    for option, kind in every_option(section):
        for value in (*bad_values(kind), *huge_values(kind)):
            line = f"pretrain text.txt --out run --recipe {recipe} --{option} {value} --dry-run"
            code, out, err = run(line, capsys)
            assert code == 2 or (value in huge_values(kind) and code == 0), line
            assert code == 0 or (err.startswith("stackbert: ") and err.count("\n") == 1 and out == ""), line


def test_sentence_order_wants_more_than_one_sentence(text, capsys):
    """Each document of text.txt is one sentence. Said at once where the text is prepared, and before the first step where it is not."""
    wanted = "objective mlm+sop needs documents of at least 2 sentences, got "
    code, _, err = run(f"pretrain text.txt --out run {SMALL} --objective mlm+sop --steps 8", capsys)
    assert code == 2 and wanted in err and not (text / "run" / "checkpoints").exists()
    assert run("prepare text.txt --out shards --train-vocab-size 100 --heldout 0.1", capsys)[0] == 0
    for line in ("--recipe albert", "--recipe baseline --objective mlm+sop"):
        code, out, err = run(f"pretrain shards --out other {line} --dry-run", capsys)
        assert code == 2 and wanted in err and err.count("\n") == 1 and out == "" and not (text / "other").exists()
    assert run("pretrain shards --out other --recipe albert --albert.no-sop --dry-run", capsys)[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(text, capsys):
    (text / "text.txt").chmod(0)
    code, _, err = run("pretrain text.txt --out run", capsys)
    assert code == 2 and "cannot read" in err


def test_refusals_load_neither_torch_nor_take_three_seconds(text):
    """All in one new process, so that what a refusal loads can be seen."""
    script = (
        "import sys, time\n"
        "start = time.monotonic()\n"
        "from stackbert_kernels.cli import main\n"
        f"codes = {{main(line.split()) for line in {[line for line in BAD if 'help' not in line]!r}}}\n"
        "print(codes, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=text, env=_environment())
    assert done.stdout == "{2} False False\n", done.stderr
    assert time.monotonic() - started < 3 * len(BAD)


def _environment():
    import stackbert_kernels

    root = os.path.dirname(os.path.dirname(stackbert_kernels.__file__))
    return os.environ | {"PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}


def test_version_and_help(capsys):
    assert run("--version", capsys)[:2] == (0, f"stackbert {__version__}\n")
    code, out, _ = run("--help", capsys)
    assert code == 0 and all(
        name in out for name in ("pretrain", "sweep", "compare", "prepare", "doctor", "grow", "checkpoint", "bench")
    )
    for command in ("pretrain", "sweep", "compare", "prepare", "doctor", "grow", "checkpoint", "bench"):
        code, out, err = run(f"{command} --help", capsys)
        assert code == 0 and "--json" in out and err == ""


def test_bench_is_the_benchmarks(capsys):
    code, out, _ = run("bench --list", capsys)
    assert code == 0 and any(line.startswith("layer_norm ") for line in out.splitlines())
    code, out, err = run("bench conv2d", capsys)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("stackbert bench: unknown op 'conv2d'; ops are ")
    code, out, err = run("bench compare a.json b.json --over x", capsys)
    assert code == 2 and out == "" and err == "stackbert bench compare: argument --over: invalid float value: 'x'\n"


def test_every_field_of_the_configuration_is_an_option(capsys):
    from dataclasses import fields

    _, out, _ = run("pretrain --help", capsys)
    names = {f.name for section in (ModelConfig, DataConfig, OptimConfig, TrainConfig) for f in fields(section)}
    of_stages = {"stages", "rank", "score_dim"}  # which recipes make
    for name in names - {"text", "model", "data", "optim", "teacher_shape"} - of_stages:
        assert f"--{name.replace('_', '-')}" in out, name
    assert all(f"--{recipe.replace('_', '-')}." in out for recipe, (_, options) in RECIPES.items() if fields(options))
    assert "TEXT..." in out and "--mslt.joint" in out and "--stages" not in out.replace("--mslt.stages", "")


def test_options_become_the_configuration():
    command = parse(
        f"pretrain a.txt b.txt --out run {SMALL} --steps 40 --lr 3e-3 --no-lowercase --mslt.joint 0.3".split()
    )
    assert isinstance(command, Pretrain)
    model = ModelConfig(layers=4, hidden=32, heads=2, max_position=16)
    data = DataConfig(
        text=("a.txt", "b.txt"), seq_len=16, batch_tokens=64, train_vocab_size=100, lowercase=False, heldout=0.1
    )
    base = TrainConfig(model=model, data=data, optim=OptimConfig(lr=3e-3), steps=40)
    assert command.config() == mslt(base, MsltOptions(stages=2, joint=0.3))
    assert type(command.config()) is TrainConfig and type(command.config().data) is DataConfig
    command = parse(
        [
            "pretrain",
            "a.txt",
            "--out",
            "run",
            "--recipe",
            "baseline",
            "--hidden",
            "96",
            "--heads",
            "3",
            "--dropout",
            "0.2",
        ]
    )
    assert command.config() == baseline(
        TrainConfig(model=ModelConfig(hidden=96, heads=3, dropout=0.2), data=DataConfig(text=("a.txt",)))
    )
    assert command.config().model.inner == 384 and command.config().model.attention_dropout == 0.2


def test_a_box_of_tyro_becomes_one_line():
    page = (
        "╭─ Unrecognized options ─────╮\n│ Unrecognized options: --a, │\n│ 4                          │\n│ ────────── │\n"
        "│ Perhaps you meant:         │\n│     --ab INT               │\n╰────╯\n"
    )
    assert one_line(page) == "Unrecognized options: --a, 4; did you mean --ab?"


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_of_every_recipe(text, capsys, recipe):
    """With defaults at the default depth, and at toy size."""
    for size in ("", "--layers 4 --hidden 32 --heads 2 --max-position 16 --seq-len 16 --batch-tokens 64 --steps 50"):
        code, out, err = run(f"pretrain text.txt --out run {size} --recipe {recipe} --dry-run", capsys)
        if recipe in NEED_SOURCE + NEED_TEACHER:
            wanted = "--source must name" if recipe in NEED_SOURCE else "--teacher must name"
            assert code == 2 and wanted in err and err.count("\n") == 1
            continue
        assert code == 0 and out.startswith("stage ") and "predicted speed-up" in out and err == ""


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("progressive_layer_dropping", "set by progressive_layer_dropping: norm: 'post' -> 'pre', scaled_init: False -> True"),
        ("progressive_layer_dropping --norm pre --scaled-init", None),
        ("mslt", None),
    ],
)  # fmt: skip
def test_dry_run_says_what_else_the_recipe_sets(text, capsys, recipe, wanted):
    _, out, _ = run(f"pretrain text.txt --out run --recipe {recipe} --dry-run", capsys)
    assert [line for line in out.splitlines() if line.startswith("set by")] == ([wanted] if wanted else [])


def test_dry_run_prints_the_cost_and_writes_nothing(text, capsys):
    before = sorted(os.listdir(text))
    code, out, _ = run(f"pretrain text.txt --out run {SMALL} --steps 50 --dry-run", capsys)
    assert code == 0 and "joint" in out and "predicted speed-up" in out
    code, out, _ = run(f"pretrain text.txt --out run {SMALL} --steps 50 --dry-run --json", capsys)
    result = json.loads(out)
    assert result["relative_step_cost"][-1] == 1.0 and len(result["config"]["stages"]) == 3
    assert sorted(os.listdir(text)) == before


def test_prepare_pretrain_verify_grow(text, capsys):
    """One small run through every command, with its --json."""
    pytest.importorskip("transformers")
    data = "--train-vocab-size 100 --heldout 0.1"
    code, out, _ = run(f"prepare text.txt --out shards {data} --json", capsys)
    assert code == 0 and json.loads(out)["train"]["tokens"] > 100
    assert run(f"prepare text.txt --out shards {data}", capsys)[0] == 0

    line = f"pretrain shards --out run {SMALL} --steps 8 --lr 1e-3 --checkpoint-every 3 --log-every 2 --threads 1"
    code, out, err = run(line, capsys)
    assert code == 0 and out.startswith("finished: run\n") and "ms/step" in out and "run/report.html" in out
    assert "stage 1/3 (layers 0-1): steps 0-4, depth 2, all layers learn" in err
    code, out, _ = run(f"{line} --json", capsys)
    result = json.loads(out)
    assert code == 0 and result["status"] == "finished" and "already finished" in result["message"]
    assert {"model", "report", "stage_seconds", "eval_loss", "unigram_loss", "tokens", "flops", "seconds"} <= set(
        result
    )
    code, _, err = run(line.replace("1e-3", "2e-3"), capsys)
    assert code == 2 and "holds a run of another configuration: lr: 0.001 -> 0.002" in err

    code, out, _ = run("checkpoint verify run", capsys)
    assert code == 0 and out.count(": whole\n") == 2
    (text / "run" / "checkpoints" / "step-8" / "state.json").write_text("{}")
    code, out, _ = run("checkpoint verify run --json", capsys)
    problems = json.loads(out)
    assert code == 1 and ["state.json" in p[0] for p in problems.values() if p] == [True]
    code, out, _ = run("checkpoint verify run/checkpoints/step-8", capsys)
    assert code == 1 and "state.json: " in out

    code, out, _ = run("grow run/model grown --layers 8 --operator stack --json", capsys)
    grown = json.loads(out)
    assert code == 0 and grown["layers"] == 8 and grown["map"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {tensor["how"] for tensor in grown["tensors"]} == {"kept", "copied"} and "tokenizer.json" in grown["copied"]
    assert json.loads((text / "grown" / "config.json").read_text())["num_hidden_layers"] == 8
    code, out, err = run("grow run/model grown --layers 8 --overwrite", capsys)
    assert code == 0 and "grown: 8 layers, grown by stack from the 4 of run/model\n" in out and err == ""
    code, _, err = run("grow run other --layers 8", capsys)
    assert code == 2 and "run is a run of stackbert pretrain, whose recipe grows it; grow run/model instead" in err
    code, _, err = run("grow run/checkpoints/step-8 other --layers 8", capsys)
    assert code == 2 and "is a checkpoint of stackbert pretrain, whose recipe grows it" in err
    code, _, err = run("grow run/model grown --layers 8", capsys)
    assert code == 2 and "out must be a new or empty directory" in err
    code, _, err = run("grow run/model other --layers 7", capsys)
    assert code == 2 and "stack needs a multiple of the old depth, got 4 -> 7" in err


def test_a_configuration_error_is_no_traceback(monkeypatch, capsys):
    def fails(command):
        raise ConfigError("two\nlines")

    monkeypatch.setitem(COMMANDS, Doctor, fails)
    assert run("doctor", capsys) == (2, "", "stackbert: two lines\n")

    def full(command):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(COMMANDS, Doctor, full)
    assert run("doctor", capsys)[0] == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["pretrain --help", "doctor"])
def test_a_reader_that_has_enough_is_no_error(line, unbuffered):
    """As in `stackbert pretrain --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stackbert_kernels", *line.split()], stdout=write, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
