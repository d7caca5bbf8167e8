"""Names and settings to and from transformers: the same logits and gradients, nothing lost on the way."""

from __future__ import annotations

import sys

import pytest
import torch
from samples import batch, tiny
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.model import hf

transformers = pytest.importorskip("transformers")

SETTINGS = {
    "vocab_size": 83,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-7,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3,
    "initializer_range": 0.2,
}
MASKS = {
    "none": None,
    "right": [[1] * 11, [1] * 4 + [0] * 7, [1] * 8 + [0] * 3],
    "left": [[0] * 3 + [1] * 8, [1] * 11, [0] * 10 + [1]],
    "holes": [[1, 0] * 5 + [1], [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0], [0, 1] * 5 + [0]],
    "empty row": [[1] * 11, [0] * 11, [1] * 8 + [0] * 3],
}


def theirs(cls=None, **changes):
    """A small model of theirs in which every parameter matters."""
    model = (cls or transformers.BertForMaskedLM)(transformers.BertConfig(**(SETTINGS | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def padded(mask_name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    rows = MASKS[mask_name]
    mask = None if rows is None else torch.tensor(rows)
    ids, types = torch.randint(0, 83, (3, 11)), torch.randint(0, 3, (3, 11))
    labels = torch.where(torch.rand(3, 11) < 0.4, torch.randint(0, 83, (3, 11)), -100)
    return ids, mask, types, labels if mask is None else labels.where(mask != 0, -100)


def theirs_from_ours(model, hf_model) -> dict[str, Tensor]:
    """Our gradients under their names."""
    named = {name: p.grad for name, p in model.named_parameters()}
    result = {}
    for ours, names in (hf._encoder_names(model.depth, "bert.", False) | hf.MLM).items():
        names = [names] if isinstance(names, str) else names
        result.update(zip(names, named[ours].chunk(len(names)), strict=True))
    return result


@pytest.mark.parametrize("mask_name", MASKS)
def test_logits_match(mask_name):
    hf_model = theirs()
    ids, mask, types, labels = padded(mask_name)
    model = hf.from_transformers(hf_model)
    expected = hf_model(ids, attention_mask=mask, token_type_ids=types, labels=labels)
    output = model(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels, return_logits=True)
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    torch.testing.assert_close(output.logits[keep], expected.logits[keep], rtol=1e-5, atol=2e-5)
    assert output.logits[~keep].eq(0).all()
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels).loss, expected.loss
    )
    assert model(input_ids=ids, attention_mask=mask).logits is None


@pytest.mark.parametrize("return_logits", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_gradients_match(activation, return_logits):
    hf_model = theirs(hidden_act=activation)
    ids, mask, types, labels = padded("right")
    model = hf.from_transformers(hf_model).double()
    model.impl = "reference"
    hf_model.double()
    arguments = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}
    hf_model(**arguments).loss.backward()
    model(**arguments, return_logits=return_logits).loss.backward()
    gradients = theirs_from_ours(model, hf_model)
    for name, parameter in hf_model.named_parameters():
        torch.testing.assert_close(
            gradients.pop(name), parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not gradients


def test_gradients_flow_through_requested_logits():
    hf_model = theirs()
    model = hf.from_transformers(hf_model)
    ids, mask, _, _ = padded("left")
    hf_model(ids, attention_mask=mask).logits[mask != 0].square().sum().backward()
    model(input_ids=ids, attention_mask=mask, return_logits=True).logits.square().sum().backward()
    expected = hf_model.bert.encoder.layer[0].intermediate.dense.weight.grad
    ours = model.bank.layers[0].inner_weight.grad
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("cls_name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_round_trip_keeps_everything(cls_name):
    hf_model = theirs(
        getattr(transformers, cls_name),
        hidden_act="gelu_new",
        pad_token_id=3,
        classifier_dropout=0.25,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    model = hf.from_transformers(hf_model)
    assert (model.config.dropout, model.config.attention_dropout, model.config.norm_eps) == (0.2, 0.3, 1e-7)
    again = hf.to_transformers(model)
    assert type(again).__name__ == ("BertForMaskedLM" if cls_name == "BertForMaskedLM" else "BertForPreTraining")
    assert again.config.to_dict() == hf_model.config.to_dict()
    assert not again.training
    state = again.bert.state_dict() if cls_name == "BertModel" else again.state_dict()
    expected = hf_model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_pair_logits_match():
    hf_model = theirs(transformers.BertForPreTraining)
    ids, mask, types, _ = padded("right")
    expected = hf_model(ids, attention_mask=mask, token_type_ids=types)
    output = hf.from_transformers(hf_model)(
        input_ids=ids, attention_mask=mask, token_type_ids=types, return_logits=True
    )
    torch.testing.assert_close(output.pair_logits, expected.seq_relationship_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
@pytest.mark.parametrize("depth", [2, 4])
def test_export_loads_and_computes_the_same(tmp_path, depth, objective):
    model = tiny(objective=objective).eval()
    model.use(depth)
    exported = hf.to_transformers(model)
    exported.save_pretrained(tmp_path)
    loaded, report = type(exported).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config.num_hidden_layers == depth
    assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    ids = torch.randint(0, 97, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    logits = model(input_ids=ids, attention_mask=mask, return_logits=True).logits
    torch.testing.assert_close(
        loaded.eval()(ids, attention_mask=mask)[0 if objective == "mlm" else "prediction_logits"][mask != 0],
        logits[mask != 0],
        rtol=1e-5,
        atol=2e-5,
    )


def test_export_in_a_stage_that_unties_the_decoder():
    model = tiny()
    model.use(4, 2, "untie")
    with torch.no_grad():
        model.mlm.decoder.mul_(0.5)
    model.eval()
    exported = hf.to_transformers(model)
    assert exported.config.tie_word_embeddings is False
    ids = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(
        exported(ids).logits, model(input_ids=ids, return_logits=True).logits, rtol=1e-5, atol=2e-5
    )


def test_half_precision_weights_become_float32():
    hf_model = theirs().to(torch.bfloat16)
    model = hf.from_transformers(hf_model)
    assert model.bank.weights.dtype == torch.float32
    assert torch.equal(model.word, hf_model.get_input_embeddings().weight.float())


def test_the_padded_form_trains_with_dropout_from_torchs_generator():
    model = hf.from_transformers(theirs()).train()
    ids, mask, _, labels = padded("right")
    torch.manual_seed(5)
    first = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    second = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.manual_seed(5)
    assert torch.equal(first, model(input_ids=ids, attention_mask=mask, labels=labels).loss) and not torch.equal(
        first, second
    )
    given = model(input_ids=ids, attention_mask=mask, labels=labels, rng=ops.new_rng(0)).loss
    assert torch.equal(given, model(input_ids=ids, attention_mask=mask, labels=labels, rng=ops.new_rng(0)).loss)


def test_labels_at_padding_are_not_read():
    model = hf.from_transformers(theirs())
    ids, mask, _, labels = padded("right")
    noisy = labels.where(mask != 0, 7)
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask, labels=noisy).loss,
        model(input_ids=ids, attention_mask=mask, labels=labels).loss,
    )


def test_bad_padded_input():
    model = hf.from_transformers(theirs())
    ids = torch.randint(0, 83, (2, 6))
    for arguments, message in (
        ({"input_ids": ids[0]}, r"input_ids must be \[B, S\], got \[6\]"),
        (
            {"input_ids": ids, "attention_mask": torch.ones(2, 5)},
            r"attention_mask must be \[2, 6\] to match input_ids, got \[2, 5\]",
        ),
        ({"input_ids": ids, "labels": ids.T}, r"labels must be \[2, 6\]"),
        ({"input_ids": torch.zeros(1, 21, dtype=torch.long)}, "max_position 20, got one of 21 tokens"),
        ({"input_ids": ids + 83}, r"input_ids must be in \[0, 83\), got \d+"),
        ({"batch": batch(), "input_ids": ids}, "got both"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu, gelu_new, gelu_pytorch_tanh, got 'relu'"),
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute', got 'relative_key'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
    ],
)
def test_models_that_cannot_be_represented(changes, message):
    with pytest.raises(ValueError, match=message):
        hf.from_transformers(theirs(**changes))


def test_other_classes_and_versions(monkeypatch):
    with pytest.raises(TypeError, match="wanted BertModel, BertForMaskedLM or BertForPreTraining, got Linear"):
        hf.from_transformers(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"\(RobertaPreLayerNorm\) needs objective mlm, .*, got 'mlm\+nsp'"):
        hf.to_transformers(tiny(norm="pre", objective="mlm+nsp"))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.0 or newer, found 4\.57\.1"):
        hf.from_transformers(None)
