"""specs/bert2bert.md: stages, sub-models, sources of both kinds, what is refused, and whole runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from train.runs import assert_goes_on_bitwise, log_of, settings, state_after, trained

from stackbert_kernels.cli import main
from stackbert_kernels.config import ConfigError, ModelConfig, OptimConfig, Stage, TrainConfig
from stackbert_kernels.data.prepare import tokenizer
from stackbert_kernels.growth import source as sources
from stackbert_kernels.growth.source import begin, load_source, source_shape
from stackbert_kernels.growth.width import stack_top
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.plan import (
    cost_table,
    flops_per_token,
    plan,
    relative_step_cost,
    submodels,
    trainable_parameters,
)
from stackbert_kernels.recipes import Bert2bertOptions, bert2bert
from stackbert_kernels.train import loop

BASE = TrainConfig(model=ModelConfig(layers=12), steps=4000)


# Stages


def test_two_parts():
    config = bert2bert(BASE)
    first, second = config.stages
    assert (first.steps, first.depth, first.submodel, first.grow, first.embeddings) == (500, 12, 3, "aki", "freeze")
    assert (second.steps, second.depth, second.submodel, second.grow) == (3500, 12, 0, None)
    assert bert2bert(BASE, Bert2bertOptions(share=0, init="fpi")).stages == (
        Stage(steps=4000, depth=12, name="all layers", grow="fpi"),
    )


@pytest.mark.parametrize(("layers", "submodel"), [(24, 6), (8, 2), (10, 2), (6, 1), (7, 1), (1, 1)])
def test_default_submodels_of_any_depth(layers, submodel):
    config = bert2bert(replace(BASE, model=ModelConfig(layers=layers), stages=()))
    assert config.stages[0].submodel == submodel


def test_each_step_draws_one_prefix_and_trains_its_top():
    span = plan(bert2bert(BASE))[0]
    windows = [span.at(step) for step in range(500)]
    assert {(w.depth, w.train_from) for w in windows} == {(3, 0), (6, 3), (9, 6), (12, 9)}
    assert all(count > 90 for count in Counter(windows).values())  # of 125, four deviations of 10 below at least
    assert windows == [span.at(step) for step in range(500)]
    other = plan(replace(bert2bert(BASE), seed=1))[0]
    assert windows != [other.at(step) for step in range(500)]


def test_cost_is_the_mean_over_the_submodels():
    config = bert2bert(BASE)
    first = config.stages[0]
    assert len(submodels(first)) == 4
    mean = sum(flops_per_token(config, s) for s in submodels(first)) / 4
    assert flops_per_token(config, first) == mean
    layers = replace(config, model=replace(config.model, vocab_size=1))  # hardly a head
    assert relative_step_cost(layers, first) == pytest.approx((7.5 + 2 * 3) / 36, rel=0.02)
    assert trainable_parameters(config, first) == trainable_parameters(config, submodels(first)[-1])
    assert "3-12" in cost_table(config) and "top 3" in cost_table(config)


REFUSED = [
    (Bert2bertOptions, {"init": "net2net"}, "bert2bert: init must be one of fpi, aki, got 'net2net'"),
    (Bert2bertOptions, {"width_map": "even"}, "bert2bert: width_map must be one of tile, random, got 'even'"),
    (Bert2bertOptions, {"embeddings": "train"}, "bert2bert: embeddings must be one of freeze, output_grad, untie, full, got 'train'"),
    (Bert2bertOptions, {"share": 1.0}, "bert2bert: share must be in [0, 1), got 1.0"),
    (Bert2bertOptions, {"submodel": -1}, "bert2bert: submodel must be >= 0, got -1"),
    (lambda **o: bert2bert(BASE, Bert2bertOptions(**o)), {"submodel": 5},
     "bert2bert: layers must be divisible by submodel, got layers 12, submodel 5; what fits: 1, 2, 3, 4, 6, 12"),
    (lambda **o: bert2bert(replace(BASE, stages=(), **o)), {"steps": 2}, "bert2bert: steps must leave each part (share 0.125) at least 1, got steps 2"),
    (Stage, {"steps": 1, "depth": 4, "submodel": 3}, "submodel must be 0 or a divisor of depth, got submodel 3, depth 4"),
    (Stage, {"steps": 1, "depth": 4, "submodel": 2}, "with submodel, the window moves from step to step: train_from must be 0 and embeddings "
     "freeze, output_grad, untie or full, got train_from 0, embeddings 'train'"),
    (Stage, {"steps": 1, "depth": 4, "width_map": "spread"}, "width_map must be one of tile, random, got 'spread'"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "given", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(build, given, message):
    with pytest.raises(ConfigError) as error:
        build(**given)
    assert str(error.value) == message


# Sources


def test_the_names_of_settings_are_those_of_the_export():
    hf = pytest.importorskip("stackbert_kernels.model.hf")
    assert {name: hf.SETTINGS[name] for name in sources.FIELDS} == sources.FIELDS
    assert sources.ACTIVATIONS == hf.ACTIVATIONS


@pytest.fixture
def source(shards, tmp_path):
    """A transformers checkpoint of 3 layers with hidden 16, and the tokenizer of the shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    words = tokenizer(shards)
    shape = transformers.BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=16, num_hidden_layers=3, num_attention_heads=1,
        intermediate_size=40, max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertForMaskedLM(shape).save_pretrained(tmp_path / "source")
    words.save(str(tmp_path / "source" / "tokenizer.json"))
    return tmp_path / "source"


def from_source(shards, source, options=None, **changes):
    """Of 4 layers with hidden 32, 2 heads, inner 128."""
    return bert2bert(replace(settings(shards, **changes), source=str(source)), options or Bert2bertOptions())


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 22).view(1, 16), return_logits=True).logits


def test_fpi_begins_with_the_function_of_the_source(shards, source):
    """A run of the same depth: what the wider model computes is what the source did."""
    config = from_source(shards, source, Bert2bertOptions(init="fpi", share=0))
    shape = replace(config.model, layers=3, vocab_size=source_shape(source).vocab_size)
    model = Bert(shape)
    assert begin(model, config.stages[0], source, seed=0) == [0, 1, 2]
    assert (logits(model) - logits(load_source(source))).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining", "BertForSequenceClassification"])
def test_begins_from_other_classes(source, tmp_path, name):
    """The encoder of any; heads that the source lacks are the run's own, those that the run lacks are left out."""
    transformers = pytest.importorskip("transformers")
    shape = transformers.BertConfig.from_pretrained(source)
    getattr(transformers, name)(shape).save_pretrained(tmp_path / name)
    for objective in ("mlm", "mlm+nsp"):
        model = Bert(replace(source_shape(source), hidden=32, heads=2, inner=128, layers=4, objective=objective))
        assert begin(model, Stage(steps=1, depth=4, grow="fpi"), tmp_path / name, seed=0) == stack_top(3, 4)
        wide = load_source(tmp_path / name).bank.layers[2].inner_bias
        assert torch.equal(model.bank.layers[3].inner_bias, wide.repeat(4)[:128])


def refusal(shards, tmp_path, source, capsys, *options: str) -> str:
    line = [
        "pretrain",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        "--recipe",
        "bert2bert",
        "--layers",
        "4",
        "--hidden",
        "32",
    ]
    line += [
        "--heads",
        "2",
        "--seq-len",
        "16",
        "--batch-tokens",
        "64",
        "--max-position",
        "16",
        "--steps",
        "20",
        "--dry-run",
    ]
    assert main([*line, *(["--source", str(source)] if source else []), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and not (tmp_path / "run").exists()
    return printed.err.strip().removeprefix("stackbert: ")


def test_one_line_before_any_work(shards, source, tmp_path, capsys):
    def refused(*options, at=source):
        return refusal(shards, tmp_path, at, capsys, *options)

    assert refused("--layers", "2") == "source: it must not be larger than the model, got layers 3 -> 2"
    assert refused("--inner", "32") == "source: it must not be larger than the model, got inner 40 -> 32"
    assert refused("--heads", "4").endswith("it must have the model's head dim (hidden / heads), got 16 -> 8")
    assert refused("--norm", "pre") == "source: it must have the model's norm, got post -> pre"
    assert refused("--max-position", "24") == "source: it must have the model's max_position, got 16 -> 24"
    assert refused(at=None) == "bert2bert: --source must name a run or a transformers directory with a smaller BERT"
    assert refused(at=tmp_path / "none").endswith("must be a run or a transformers directory, got no config.json")
    assert refused("--recipe", "baseline").startswith("source: recipe baseline begins from random weights")
    words = json.loads((source / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = (next(k for k, v in vocabulary.items() if v == n) for n in (10, 11))
    vocabulary[a], vocabulary[b] = 11, 10
    (source / "tokenizer.json").write_text(json.dumps(words))
    assert "has other words than" in refused()
    weights = (source / "model.safetensors").rename(source / "elsewhere")
    assert "has no weights: wanted one of model.safetensors, " in refused()
    weights.rename(source / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"hidden_size": "16"}))
    assert refused().endswith("hidden_size must be a number, got '16'")
    (source / "config.json").write_text(json.dumps(settings | {"model_type": "roberta"}))
    assert "must hold a BERT, got model_type 'roberta'" in refused()


def test_a_vocabulary_with_other_words_than_the_sources_is_refused(source, tmp_path, capsys):
    """As many words, two of them in each other's place: nothing but the words themselves can tell."""
    words = json.loads((source / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = (next(k for k, v in vocabulary.items() if v == n) for n in (10, 11))
    vocabulary[a], vocabulary[b] = 11, 10
    (tmp_path / "other.json").write_text(json.dumps(words))
    (tmp_path / "text.txt").write_text("ban bar.\n\nban bar bat don.")
    said = refusal(tmp_path / "text.txt", tmp_path, source, capsys, "--vocab", str(tmp_path / "other.json"))
    assert said == f"source: {tmp_path / 'other.json'} has other words than {source / 'tokenizer.json'}"


# Runs


def test_a_run_goes_on_bitwise(shards, source, tmp_path, quick, monkeypatch):
    """Through the growth and in the midst of sub-models; a sub-model's step leaves every layer outside its window as it was."""
    config = from_source(shards, source, Bert2bertOptions(share=0.5), eval_every=4)
    straight = assert_goes_on_bitwise(config, tmp_path, (1, 5, 10, 11))
    span = plan(config)[0]
    for step in range(1, 10):
        window = span.at(step)
        before, after = (state_after(straight, n)[0] for n in (step, step + 1))
        for layer in range(4):
            same = torch.equal(before["model"]["bank"][layer], after["model"]["bank"][layer])
            assert same == (not window.train_from <= layer < window.depth), (step, layer)
        assert torch.equal(before["model"]["word"], after["model"]["word"])
        assert not torch.equal(before["model"]["mlm.bias"], after["model"]["mlm.bias"])
    assert len({span.at(step).depth for step in range(1, 10)}) >= 3
    growth = next(event for event in log_of(straight) if event["event"] == "growth")
    assert (growth["operator"], growth["layer_map"], growth["source"]) == ("aki", [0, 1, 2, 2], str(source))
    flops = [event["flops"] for event in log_of(straight) if event["event"] == "checkpoint"]
    tokens = [event["tokens"] for event in log_of(straight) if event["event"] == "checkpoint"]
    known = replace(config, model=replace(config.model, vocab_size=source_shape(source).vocab_size))
    wanted = flops_per_token(known, span.at(4)) * (tokens[4] - tokens[3])
    assert flops[4] - flops[3] == pytest.approx(wanted)


def test_a_run_from_a_run_exports(shards, tmp_path, monkeypatch):
    """A finished small run as the source of a larger one, end to end: its words, its weights, a transformers directory."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    small = settings(shards, steps=4, checkpoint_every=50, eval_every=50)
    small = replace(small, model=replace(small.model, layers=2, hidden=16, heads=1, inner=64), stages=())
    assert trained(small, tmp_path / "small")["status"] == "finished"
    config = from_source(shards, tmp_path / "small", steps=8, checkpoint_every=50, optim=OptimConfig(lr=1e-3))
    result = trained(config, tmp_path / "large")
    assert result["status"] == "finished"
    exported = transformers.BertForMaskedLM.from_pretrained(result["model"])
    assert (exported.config.num_hidden_layers, exported.config.hidden_size) == (4, 32)
    assert trained(config, tmp_path / "large")["status"] == "finished"
