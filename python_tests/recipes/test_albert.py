"""specs/albert.md: parameters, one layer applied many times, the embedding's factors, and a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model.samples import TINY, batch, tiny
from train.runs import assert_goes_on_bitwise, settings

from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, Stage, TrainConfig
from stackbert_kernels.data.batches import Batches
from stackbert_kernels.model import Bert
from stackbert_kernels.plan import (
    bank_rows,
    embedding_parameters,
    flops_per_token,
    layer_parameters,
    plan,
    trainable_parameters,
)
from stackbert_kernels.recipes import AlbertOptions, albert

BASE = TrainConfig(steps=100)


def test_one_stage_one_row():
    config = albert(BASE)
    assert config.stages == (Stage(steps=100, depth=12, rows=(0,) * 12, name="all shared"),)
    assert (config.model.embedding, config.model.objective, config.data.max_ngram) == (128, "mlm+sop", 3)
    assert bank_rows(config) == 1 and config.recipe == "albert"


def test_options():
    def stage(**options):
        return albert(BASE, AlbertOptions(**options)).stages[0]

    own = tuple(range(12))
    assert stage(groups=4).rows == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert (stage(share="attention").rows, stage(share="attention").ffn_rows) == ((0,) * 12, own)
    assert (stage(share="ffn").rows, stage(share="ffn").ffn_rows) == (own, (0,) * 12)
    assert stage(share="none").rows == stage(groups=12).rows == ()
    assert albert(BASE, AlbertOptions(sop=False)).model.objective == "mlm"
    assert albert(replace(BASE, model=ModelConfig(hidden=96, heads=3))).model.embedding == 96
    assert albert(replace(BASE, model=ModelConfig(embedding=64))).model.embedding == 64
    assert albert(BASE, AlbertOptions(embedding=32)).model.embedding == 32
    assert albert(replace(BASE, data=DataConfig(max_ngram=2))).data.max_ngram == 2


REFUSED = [
    ({"share": "norms"}, {}, "albert: share must be one of all, attention, ffn, none, got 'norms'"),
    ({"groups": 0}, {}, "albert: groups must be >= 1, got 0"),
    ({"groups": 5}, {}, "albert: layers must be divisible by groups, got layers 12, groups 5; groups that fit: 1, 2, 3, 4, 6, 12"),
    ({}, {"objective": "mlm+nsp"}, "albert: sentence order takes the place of next sentence: wanted objective mlm or mlm+sop, or no sop, "
     "got objective mlm+nsp with sop"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(given, changes, message):
    with pytest.raises(ConfigError) as error:
        albert(replace(BASE, model=ModelConfig(**changes)), AlbertOptions(**given))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "count"),
    [(12, 768, 12, 11_683_584), (24, 1024, 16, 17_683_968), (24, 2048, 16, 58_724_864), (12, 4096, 64, 222_595_584)],
)
def test_parameters(layers, hidden, heads, count):
    """Embeddings with norm and map, one layer, pooler; V = 30000, P = 512, E = 128."""
    model = albert(
        replace(BASE, model=ModelConfig(layers=layers, hidden=hidden, heads=heads, vocab_size=30_000), stages=())
    ).model
    assert embedding_parameters(model, 30_000) + layer_parameters(model) + hidden * hidden + hidden == count


@pytest.mark.parametrize("share", ["all", "attention", "ffn", "none"])
def test_what_learns_is_what_the_plan_counts(share):
    config = albert(
        TrainConfig(model=ModelConfig(**TINY), data=DataConfig(seq_len=24)), AlbertOptions(embedding=8, share=share)
    )
    stage = config.stages[0]
    model = Bert(config.model, rows=bank_rows(config))
    model.use(stage.depth, rows=stage.rows, ffn_rows=stage.ffn_rows)
    model(batch(pair=True), rng=torch.tensor([1, 2])).loss.backward()
    learning = [p for p in model.parameters() if p.grad is not None and (p.dim() < 2 or p.grad.any())]
    unused = sum(p.numel() for p in learning if p.dim() < 2 and not p.grad.any())
    embeddings = sum(p.numel() for p in (model.word, model.position, model.token_type))
    counted = sum(
        p.numel() for p in learning if p is not model.word and p is not model.position and p is not model.token_type
    )
    assert counted + embeddings - unused == trainable_parameters(config, stage)


def test_sharing_saves_parameters_and_no_flops():
    config = albert(replace(BASE, model=ModelConfig(vocab_size=30_000)))
    separate = albert(replace(BASE, model=ModelConfig(vocab_size=30_000)), AlbertOptions(share="none"))
    assert flops_per_token(config, config.stages[0]) == flops_per_token(separate, separate.stages[0])
    saved = trainable_parameters(separate, separate.stages[0]) - trainable_parameters(config, config.stages[0])
    assert saved == 11 * layer_parameters(config.model)
    assert len(plan(config)) == 1


def test_the_factorised_embedding_is_berts_and_a_linear_map():
    """E = H with an identity as map and all else equal: the function of the plain model, bitwise."""
    plain, factorised = tiny(), tiny(embedding=32)
    with torch.no_grad():
        parameters = dict(plain.named_parameters())
        for name, parameter in factorised.named_parameters():
            if name == "embedding_map.weight":
                parameter.copy_(torch.eye(32))
            elif name == "embedding_map.bias":
                parameter.zero_()
            else:
                parameter.copy_(parameters[name])
    rng = torch.tensor([1, 2])
    assert torch.equal(factorised(batch(), rng=rng).loss, plain(batch(), rng=rng).loss)


def test_applications_of_a_shared_layer_are_copies_of_it():
    """An untied model loaded with copies, with dropout: bitwise, for masks belong to the layer."""
    shared = Bert(ModelConfig(**TINY), rows=1)
    untied = Bert(ModelConfig(**TINY))
    with torch.no_grad():
        untied.bank.weights[:] = shared.bank.weights[0]
        for name, parameter in untied.always_on_parameters().items():
            parameter.copy_(shared.always_on_parameters()[name])
    rng = torch.tensor([1, 2])
    assert torch.equal(shared(batch(), rng=rng).loss, untied(batch(), rng=rng).loss)


@pytest.mark.parametrize("options", [{}, {"share": "attention"}, {"share": "ffn"}, {"groups": 2}], ids=str)
def test_the_gradient_of_what_is_shared_is_the_sum_over_its_applications(options):
    """Against an untied clone loaded with copies, in float64, each half of a layer by the rows that it reads."""
    stage = albert(
        TrainConfig(model=ModelConfig(**TINY), data=DataConfig(seq_len=24)), AlbertOptions(**options)
    ).stages[0]
    shared, clone = (Bert(ModelConfig(**TINY | {"dropout": 0.0}), impl="reference").double() for _ in range(2))
    shared.use(4, rows=stage.rows, ffn_rows=stage.ffn_rows)
    halves = {False: stage.attention_rows, True: stage.feed_forward_rows}
    slots = [(slot, slot.name.startswith(("inner", "outer", "norm2"))) for slot in shared.bank.layout]
    assert {name for slot, feed in slots if feed for name in [slot.name]} == {
        "inner_weight", "inner_bias", "outer_weight", "outer_bias", "norm2_weight", "norm2_bias"}  # fmt: skip
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, parameter in clone.always_on_parameters().items():
            parameter.copy_(shared.always_on_parameters()[name])
        for layer in range(4):
            for slot, feed in slots:
                slot.view(clone.bank.weights[layer]).copy_(slot.view(shared.bank.weights[halves[feed][layer]]))
    for model in (shared, clone):
        model.eval()(batch()).loss.backward()
    for slot, feed in slots:
        for row in range(4):
            layers = [layer for layer in range(4) if halves[feed][layer] == row]
            wanted = sum((slot.view(clone.bank.grads[layer]) for layer in layers), torch.zeros(slot.shape).double())
            found = slot.view(shared.bank.grads[row])
            assert (found - wanted).abs().max() <= 1e-12 * max(1.0, float(wanted.abs().max())), (slot.name, row)
            assert not layers or wanted.any(), (slot.name, row)


def test_swapped_pairs_hold_the_same_tokens_and_are_half_of_all(shards):
    """Each sample comes swapped in some epochs and not in others, with the same words. 5 standard errors of a half."""
    data = replace(settings(shards).data, max_ngram=3)
    batches, held, swapped, count = Batches(shards, data, "mlm+sop", seed=0), {}, 0, 0
    for step in range(4 * round(batches.steps_per_epoch)):
        part = batches[step]
        whole = part.input_ids.index_copy(0, part.masked, part.labels)
        for sample, label, ids in zip(part.sample_ids.tolist(), part.pair_labels.tolist(), whole.split(part.cu_seqlens.diff().tolist()), strict=True):  # fmt: skip
            held.setdefault(sample, {})[label] = ids
            swapped, count = swapped + label, count + 1
    assert abs(swapped / count - 0.5) < 5 * 0.5 / count**0.5
    both = [pair for pair in held.values() if len(pair) == 2]
    assert len(both) > 50
    assert all(torch.equal(pair[0].sort().values, pair[1].sort().values) for pair in both)
    assert sum(not torch.equal(pair[0], pair[1]) for pair in both) > 0.8 * len(both)


def toy(shards, **options):
    config = settings(shards)
    return albert(config, AlbertOptions(embedding=8, **options))


@pytest.mark.parametrize("options", [{}, {"share": "attention", "groups": 2, "sop": False}], ids=["all", "attention"])
def test_a_run_goes_on_bitwise(shards, tmp_path, quick, options):
    assert_goes_on_bitwise(toy(shards, **options), tmp_path, (7, 19))
