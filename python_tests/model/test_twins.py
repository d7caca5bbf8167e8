"""transformers' ALBERT and pre-LN model compute what ours does; layers that share come out as they are, or expanded."""

from __future__ import annotations

import pytest
import torch
from model.samples import TINY, tiny

from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model import Bert, hf, twins

transformers = pytest.importorskip("transformers")


def logits(model, **padding) -> torch.Tensor:
    ids = torch.arange(1, 49).view(2, 24)
    with torch.no_grad():
        return model.eval()(input_ids=ids, **padding).logits


def assert_same_function(ours: Bert, theirs) -> None:
    """Both in float64: what is left are another order of sums and nothing else."""
    wanted = logits(ours.double(), return_logits=True)
    torch.testing.assert_close(logits(theirs.double()), wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def shared(rows=(), ffn_rows=(), **changes) -> Bert:
    """As model.samples.tiny, with a bank of as many rows as the layers read."""
    own = Bert(ModelConfig(**(TINY | changes)), rows=max((*rows, *ffn_rows), default=3) + 1)
    own.use(4, rows=rows, ffn_rows=ffn_rows)
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return own


ALBERTS = {
    "all": ((0, 0, 0, 0), (), 1),
    "two groups": ((0, 0, 1, 1), (), 2),
    "none": ((), (), 4),
    "attention": ((0, 0, 0, 0), (0, 1, 2, 3), 4),
    "repeated units": ((0, 1, 0, 1), (), 4),
    "unequal groups": ((0, 0, 0, 1), (), 4),
}


@pytest.mark.parametrize("case", ALBERTS)
@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
def test_albert(case, objective):
    rows, ffn_rows, groups = ALBERTS[case]
    model = shared(rows, ffn_rows, embedding=8, objective=objective)
    theirs = hf.to_transformers(model)
    wanted = transformers.AlbertForMaskedLM if objective == "mlm" else transformers.AlbertForPreTraining
    assert type(theirs) is wanted and theirs.config.num_hidden_groups == groups
    if objective == "mlm":
        return assert_same_function(model, theirs)
    ids = torch.arange(1, 49).view(2, 24)
    with torch.no_grad():
        ours, twin = model.double().eval()(input_ids=ids, return_logits=True), theirs.double().eval()(input_ids=ids)
    torch.testing.assert_close(twin.prediction_logits, ours.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(twin.sop_logits, ours.pair_logits, rtol=0, atol=1e-9)


def test_a_private_decoder_of_an_albert():
    model = shared(embedding=8)
    model.use(4, 2, "untie")
    with torch.no_grad():
        model.mlm.decoder += 0.1
    theirs = hf.to_transformers(model)
    assert not theirs.config.tie_word_embeddings
    assert_same_function(model, theirs)


def test_shared_layers_of_a_bert_come_out_expanded():
    model = shared((0, 1, 0, 1))
    theirs = hf.to_transformers(model)
    assert type(theirs) is transformers.BertForMaskedLM
    layers = theirs.bert.encoder.layer
    assert torch.equal(layers[0].output.dense.weight, layers[2].output.dense.weight)
    assert not torch.equal(layers[0].output.dense.weight, layers[1].output.dense.weight)
    assert_same_function(model, theirs)


@pytest.mark.parametrize("pad", [0, 3])
def test_pre_norm(pad, tmp_path):
    model = tiny(norm="pre")
    theirs = hf.to_transformers(model, pad_token_id=pad)
    assert type(theirs) is transformers.RobertaPreLayerNormForMaskedLM
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.arange(4, 28).view(1, 24)
    with torch.no_grad():
        wanted = model.double().eval()(input_ids=ids, return_logits=True).logits
        got = again.double().eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embedding": 8}, "embeddings as wide as the encoder, got embedding 8"),
        ({"objective": "mlm+sop"}, "objective mlm, having no sentence-pair head, got 'mlm+sop'"),
        ({"activation": "gelu_tanh"}, "activation gelu in its head, got 'gelu_tanh'"),
    ],
)
def test_what_has_no_twin(changes, reason):
    assert twins.why_no_twin(ModelConfig(**changes)) is None
    assert twins.why_no_twin(ModelConfig(norm="pre", **changes)).endswith(f"needs {reason}")
