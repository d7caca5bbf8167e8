"""What people do with a model goes on working when it is patched, and `unpatch` leaves nothing behind."""

from __future__ import annotations

import inspect
import io

import patch_samples as samples
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import stackbert_kernels as sbk
from stackbert_kernels.patch.swap import Swapped, swapped

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 through three layers whose values are about 1, sums in another order


def pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    model = samples.model(name, **options).eval()
    other = samples.twin(model)
    return model, other


def names_of_classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForSequenceClassification", "ElectraForMaskedLM"])
def test_unpatch_leaves_nothing(name):
    model = samples.model(name).eval()
    given = samples.batch(name, "right")
    classes, attributes = names_of_classes(model), [set(module.__dict__) for module in model.modules()]
    before = model(**given).loss
    keys = list(model.state_dict())
    with sbk.patched(model) as report:
        assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
        assert list(model.state_dict()) == keys
        assert inspect.signature(model.forward) == inspect.signature(classes[0].forward.__get__(model))
        assert len({m._stackbert.site for _, m in swapped(model)}) == len({row.module for row in report.patched})
        assert "stackbert: add_norm" in repr(model)
    assert names_of_classes(model) == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(**given).loss, before)


def test_patched_restores_after_an_error():
    model = samples.model("BertModel")
    with pytest.raises(KeyError), sbk.patched(model, unpad=True):
        raise KeyError
    assert not list(swapped(model))


def test_save_and_load(tmp_path):
    model, patched = pair("BertForMaskedLM")
    sbk.patch(patched)
    patched.save_pretrained(tmp_path / "patched")
    model.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(loaded(**samples.batch("BertForMaskedLM", "right")).loss, model(**samples.batch("BertForMaskedLM", "right")).loss)  # fmt: skip
    patched.load_state_dict(model.state_dict())


def test_copies_and_pickles_are_patched_too():
    name = "BertForSequenceClassification"
    patched = samples.model(name).eval()
    sbk.patch(patched, unpad=True)
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    given = samples.batch(name, "right")
    for other in (samples.twin(patched), torch.load(file, weights_only=False)):
        assert names_of_classes(other) == names_of_classes(patched)
        assert torch.equal(other(**given).logits, patched(**given).logits)
        with torch.no_grad():
            other.classifier.bias += 1
        assert not torch.equal(other.classifier.bias, patched.classifier.bias)
        sbk.unpatch(other)
        assert not list(swapped(other))
    assert list(swapped(patched))


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpad"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_draws_the_same_masks(reentrant, unpad):
    name = "BertForMaskedLM"
    patched = samples.model(name, p=0.1, num_hidden_layers=2).train()
    sbk.patch(patched, unpad=unpad)
    given = samples.batch(name, "right" if unpad else "full")

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        patched.zero_grad()
        patched(**given).loss.backward()
        return [p.grad.clone() for p in patched.parameters()]

    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})  # and a hook on the word embedding
    layers = patched.bert.encoder.layer
    assert all(layer.gradient_checkpointing for layer in layers)
    for layer in layers:
        layer.gradient_checkpointing = False
    plain = gradients()
    for layer in layers:
        layer.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_output_attentions_falls_back(by, padding):
    model, patched = pair("BertModel", attn_implementation="eager")
    report = sbk.patch(patched, unpad=True)
    assert any("output_attentions=True" in row.why_not for row in report.rows if row.part == "attention")
    given = samples.batch("BertModel", padding)
    if by == "config":
        model.config.output_attentions = patched.config.output_attentions = True
    else:
        given["output_attentions"] = True
    wanted, got = model(**given), patched(**given)
    assert len(wanted.attentions) == len(got.attentions) == model.config.num_hidden_layers
    for a, b in zip(
        (*wanted.attentions, wanted.last_hidden_state), (*got.attentions, got.last_hidden_state), strict=True
    ):
        torch.testing.assert_close(b, a, **CLOSE)


def test_what_the_op_does_not_do_is_left_to_the_original():
    model, patched = pair("BertModel")
    sbk.patch(patched, unpad=True)
    given = samples.batch("BertModel", "right")
    square = given["attention_mask"][:, None, None, :].bool().expand(-1, 1, samples.LONGEST, -1)
    embedded = model.embeddings.word_embeddings(given["input_ids"])
    for arguments in (
        given | {"attention_mask": square.tril(2)},
        {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]},
        {"inputs_embeds": embedded},
    ):
        torch.testing.assert_close(patched(**arguments)[0], model(**arguments)[0], **CLOSE)
    torch.testing.assert_close(patched.encoder(embedded)[0], model.encoder(embedded)[0], **CLOSE)


def test_tuples_and_positional_arguments():
    name = "BertForPreTraining"
    model, patched = pair(name)
    sbk.patch(patched, unpad=True)
    for made in (model, patched):
        made.train()
    given = samples.batch(name, "right")
    types = torch.zeros_like(given["input_ids"])
    wanted, got = (
        made(given["input_ids"], given["attention_mask"], types, labels=given["labels"], return_dict=False,
             next_sentence_label=given["next_sentence_label"])
        for made in (model, patched)
    )  # fmt: skip
    torch.testing.assert_close(got[0], wanted[0], **CLOSE)
    at = given["attention_mask"] == 1
    wanted, got = (
        made.bert(given["input_ids"], given["attention_mask"], types, return_dict=False) for made in (model, patched)
    )
    assert len(wanted) == len(got) == 2
    torch.testing.assert_close(got[0][at], wanted[0][at], **CLOSE)
    torch.testing.assert_close(got[1], wanted[1], **CLOSE)


def test_unpadded_outputs_are_zero_at_padding():
    patched = samples.model("BertForTokenClassification").eval()
    sbk.patch(patched, unpad=True)
    given = samples.batch("BertForTokenClassification", "holes")
    states = patched(**given, output_hidden_states=True).hidden_states
    padding = given["attention_mask"] == 0
    assert padding.any() and all((h[padding] == 0).all() and (h[~padding] != 0).any() for h in states)


class LowRank(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.a, self.b = (
            nn.Parameter(0.1 * torch.randn(*shape)) for shape in ((2, base.in_features), (base.out_features, 2))
        )

    def forward(self, x):
        return self.base_layer(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("first", ["wrapped", "patched"])
def test_adapters_count_whenever_they_come(first):
    name = "BertForMaskedLM"
    model = samples.model(name).eval()

    def wrap(made: nn.Module) -> None:
        torch.manual_seed(1)
        for layer in made.bert.encoder.layer:
            for owner, place in ((layer.attention.self, "query"), (layer.attention.output, "dense"),
                                 (layer.intermediate, "dense"), (layer.output, "dense")):  # fmt: skip
                setattr(owner, place, LowRank(getattr(owner, place)))
        made.cls.predictions.decoder = LowRank(made.cls.predictions.decoder)

    patched = samples.twin(model)
    wrap(model)
    for step in ("wrapped", "patched") if first == "wrapped" else ("patched", "wrapped"):
        wrap(patched) if step == "wrapped" else sbk.patch(patched, unpad=True)
    given = samples.batch(name, "right")
    results = [samples.results(made.train(), given) for made in (model, patched)]
    for key in results[0]:
        at = given["attention_mask"] == 1 if results[0][key].shape[:2] == given["input_ids"].shape else ...
        torch.testing.assert_close(results[1][key][at], results[0][key][at], **CLOSE)


def test_hooks_of_what_an_op_bypasses_still_run():
    _, patched = pair("BertModel", num_hidden_layers=1)
    sbk.patch(patched)
    layer, seen = patched.encoder.layer[0], []
    places = (layer.attention.output.dense, layer.output.LayerNorm, layer.intermediate.dense, layer.output.dropout,
              patched.embeddings.word_embeddings, patched.embeddings.LayerNorm)  # fmt: skip
    for place in places:
        place.register_forward_hook(lambda module, *_: seen.append(module))
    patched(**samples.batch("BertModel", "none"))
    assert set(seen) == set(places)


@pytest.mark.parametrize(("training", "padding"), [(True, "none"), (True, "right"), (False, "none")])
def test_compile_without_a_break(training, padding):
    name = "RobertaForMaskedLM"
    torch.compiler.reset()
    model, patched = pair(name, num_hidden_layers=1)
    sbk.patch(patched)
    given = samples.batch(name, padding)
    wanted = samples.results(model.train(training), given)
    patched.train(training)
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    loss = compiled(**given).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted["loss"], **CLOSE)
    for key, parameter in patched.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[f"d {key}"], **CLOSE)


def test_compile_unpadded():
    """Packing depends on the data: a break before and after."""
    name = "BertForSequenceClassification"
    torch.compiler.reset()
    model, patched = pair(name, num_hidden_layers=1)
    sbk.patch(patched, unpad=True)
    compiled = torch.compile(patched, backend="aot_eager")
    for seed in range(3):
        given = samples.batch(name, "right", seed)
        torch.testing.assert_close(compiled(**given).loss, model(**given).loss, **CLOSE)


def test_autocast_gives_the_dtypes_that_it_gave():
    name = "BertForSequenceClassification"
    model, patched = pair(name)
    sbk.patch(patched, unpad=True)
    given = samples.batch(name, "right")
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = (made(**given, output_hidden_states=True) for made in (model, patched))
    exact = samples.twin(model).double()(**given).logits
    assert got.logits.dtype == wanted.logits.dtype
    assert [h.dtype for h in got.hidden_states] == [h.dtype for h in wanted.hidden_states]
    ours, theirs = ((o.logits.double() - exact).abs().max() for o in (got, wanted))
    assert ours <= 3 * theirs + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_bfloat16_weights():
    name = "BertForMaskedLM"
    model, patched = (made.bfloat16() for made in pair(name))
    sbk.patch(patched, unpad=True)
    given = samples.batch(name, "none")
    exact = samples.twin(model).double()(**given).logits
    wanted, got = (made(**given).logits for made in (model, patched))
    assert got.dtype == wanted.dtype
    ours, theirs = ((logits.double() - exact).abs().max() for logits in (got, wanted))
    assert ours <= 3 * theirs + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_masked_lm_logits_of_a_training_call_are_there_when_read():
    name = "BertForMaskedLM"
    model, patched = pair(name)
    sbk.patch(patched)
    given = samples.batch(name, "right")
    wanted, got = model.train()(**given), patched.train()(**given)
    assert "logits" not in list(got)
    torch.testing.assert_close(got.logits, wanted.logits, **CLOSE)
    assert got.logits is got.logits
    assert "logits" in list(patched.eval()(**given))  # evaluation gathers what stands in the output
    nothing = given | {"labels": torch.full_like(given["labels"], -100)}
    assert model.train()(**nothing).loss.isnan() and patched.train()(**nothing).loss.isnan()


def test_the_package_is_the_function():
    from stackbert_kernels.patch import patch

    assert callable(sbk.patch) and inspect.signature(sbk.patch) == inspect.signature(patch)
    assert sbk.patch.patch is patch and sbk.unpatch is sbk.patch.unpatch


def test_a_swapped_class_is_made_once_and_kept_apart():
    a, b = samples.model("BertModel"), samples.model("RobertaModel")
    for made in (a, b):
        sbk.patch(made)
    assert type(a) is not type(b) and isinstance(a, Swapped)
    assert type(a.encoder.layer[0].output) is type(samples.twin(a).encoder.layer[0].output)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device. What an op of ours does inside is not seen: on a CPU it may look."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "masked_select")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["patched", "unpad", "registered"])
@pytest.mark.parametrize("padding", ["full", "right"])
def test_the_host_waits_once_whatever_the_depth(way, padding):
    counts = []
    for layers in (1, 4):
        model = samples.model("BertModel", num_hidden_layers=layers, hidden_size=16, num_attention_heads=1).train()
        if way == "registered":
            sbk.hf.register()
            model.set_attn_implementation("stackbert")
        else:
            sbk.patch(model, unpad=way == "unpad")
        given = samples.batch("BertModel", padding)
        with HostReads() as reads:
            model(**given)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 3
