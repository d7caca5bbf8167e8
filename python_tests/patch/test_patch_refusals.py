"""Bad use is one clear line and leaves the model as it was; what cannot be replaced stays, with its reason in the report."""

from __future__ import annotations

import sys

import patch_samples as samples
import pytest
import torch
import transformers
from torch import nn

import stackbert_kernels as sbk
from stackbert_kernels.patch import swap
from stackbert_kernels.patch.swap import Replacement, Swapped, swapped


def refused(model, match: str, error: type = ValueError, **options) -> None:
    classes = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=match):
        sbk.patch(model, **options)
    if classes:
        assert [type(m) for m in model.modules()] == classes


def test_what_is_no_model():
    refused("bert", "model must be a torch.nn.Module, got str", TypeError)


def test_nothing_asked_for():
    off = dict.fromkeys(("attention", "add_norm", "gelu", "embeddings", "mlm_loss"), False)
    refused(samples.model("BertModel"), "wanted at least one of attention, add_norm", **off)


def test_meta():
    with torch.device("meta"):
        model = samples.model("BertModel")
    refused(model, r"embeddings\.word_embeddings\.weight is on meta")


def test_compiled():
    refused(torch.compile(samples.model("BertModel")), "the model is compiled already; patch first, then torch.compile")
    model = samples.model("BertModel")
    model.encoder.layer[0].compile()
    refused(model, r"encoder\.layer\.0 is compiled already")


def test_sharded():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = samples.model("BertModel")
        fully_shard(model.encoder.layer[0], mesh=mesh)
        refused(model, r"encoder\.layer\.0 is sharded already \(FSDPBertLayer\); patch first, then shard")
        patched = samples.model("BertModel").eval()
        given = samples.batch("BertModel", "right")
        sbk.patch(patched, unpad=True)
        wanted = patched(**given).last_hidden_state
        for layer in patched.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(patched, mesh=mesh)
        assert torch.equal(patched(**given).last_hidden_state, wanted)
        with pytest.raises(ValueError, match="the model was given the class FSDPBertModel after it was patched"):
            sbk.unpatch(patched)
        wrapped = samples.twin(plain := samples.model("BertModel").train())
        sbk.patch(wrapped, unpad=True)
        output = nn.parallel.DistributedDataParallel(wrapped)(**given).last_hidden_state
        output.sum().backward()
        at = given["attention_mask"] == 1
        torch.testing.assert_close(output[at], plain(**given).last_hidden_state[at])
    finally:
        destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_quantized():
    model = torch.ao.quantization.quantize_dynamic(samples.model("BertModel"), {nn.Linear})
    refused(model, r"query is quantized \(torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\.Linear\)")
    model = samples.model("BertModel")
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().to(torch.int8), requires_grad=False)
    refused(model, r"encoder\.layer\.0\.output\.dense is quantized \(Linear with a weight of torch\.int8\)")


def test_twice_and_in_parts():
    model = samples.model("BertModel", num_hidden_layers=3)
    sbk.patch(model)
    refused(model, "the model is patched already")
    model.encoder.layer[1] = samples.model("BertModel", num_hidden_layers=3).encoder.layer[1]
    refused(
        model, r"patched in parts: .* are not \(as encoder\.layer\.1\.attention\.output\): sbk\.unpatch\(model\) first"
    )
    sbk.unpatch(model)
    assert not list(swapped(model))
    with pytest.raises(ValueError, match="no module of this BertModel is patched"):
        sbk.unpatch(model)
    sbk.patch(model)
    inside = samples.model("BertForMaskedLM")
    sbk.patch(inside.bert)
    refused(inside, "the model is patched in parts")


def test_an_old_transformers(monkeypatch):
    model = samples.model("BertModel")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    refused(model, "patch: wanted transformers 5.0 or newer, got 4.57.1", ImportError)
    with pytest.raises(ImportError, match=r"register: wanted transformers 5\.0 or newer, got 4\.57\.1"):
        sbk.hf.register()


def test_a_model_that_is_not_known():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    refused(model, "found nothing to replace in Sequential; looked for transformers' Bert, Roberta")
    report = sbk.patch(model, strict=False)
    assert not report.patched and {row.why_not for row in report.rows} == {"the model has no such place"}
    model = transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9)
    )
    refused(model, "found nothing to replace in DistilBertModel")


def test_all_or_nothing():
    class Slotted(nn.Module):
        def forward(self): ...

    class Unfit(Swapped):
        __slots__ = ("more",)  # another layout: Python refuses the class

        def forward(self): ...

    class Fit(Swapped):
        def forward(self): ...

    modules = [Slotted(), Slotted()]
    plan = [
        Replacement(str(i), m, kind, {"gelu": "x"})
        for i, (m, kind) in enumerate(zip(modules, (Fit, Unfit), strict=True))
    ]
    with pytest.raises(TypeError, match="layout"):
        swap.apply(plan)
    assert [type(m) for m in modules] == [Slotted, Slotted] and not any("_stackbert" in m.__dict__ for m in modules)


def reasons(report, part: str) -> set[str]:
    return {row.why_not for row in report.skipped if row.part == part}


def test_decoders_keep_their_attention():
    config = {"is_decoder": True, "add_cross_attention": True}
    model = samples.model("BertLMHeadModel", **config).eval()
    patched = samples.twin(model)
    report = sbk.patch(patched)
    assert reasons(report, "attention") == {"causal: a decoder (config.is_decoder)", "cross attention"}
    given = samples.batch("BertLMHeadModel", "right")
    given["encoder_hidden_states"] = torch.randn(4, 5, model.config.hidden_size)
    torch.testing.assert_close(patched(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-5)


def test_reasons_in_the_report():
    report = sbk.patch(
        samples.model("BertForSequenceClassification", hidden_act="relu", hidden_size=257, num_attention_heads=1)
    )
    assert reasons(report, "gelu") == {"its activation is ReLU"}
    assert reasons(report, "mlm_loss") == {"the model has no such place"}
    text = str(report)
    assert "its activation is ReLU" in text and "dropout_add_layer_norm (native)" in text

    report = sbk.patch(samples.model("BertForQuestionAnswering"), unpad=True)
    assert reasons(report, "unpad") == {"start and end are a softmax over all positions, padding included"}

    refused(
        samples.model("BertModel").double(),
        "only its reference would run: native takes float32 and bfloat16, got float64",
    )


def test_an_own_forward_is_left_alone():
    from transformers.models.bert.modeling_bert import BertSelfOutput

    class Mine(BertSelfOutput):
        def forward(self, hidden_states, input_tensor):
            return self.LayerNorm(input_tensor)

    class Renamed(BertSelfOutput):
        """forward as it was"""

    model = samples.model("BertModel", num_hidden_layers=3)
    model.encoder.layer[0].attention.output.__class__ = Mine
    model.encoder.layer[1].attention.output.__class__ = Renamed
    sbk.patch(model)
    assert type(model.encoder.layer[0].attention.output) is Mine
    assert isinstance(model.encoder.layer[1].attention.output, Swapped)


def test_a_forward_of_the_instance_is_left_alone():
    """As accelerate's hooks set it: the class has no say in it."""
    model = samples.model("BertModel", num_hidden_layers=3)
    attention = model.encoder.layer[2].attention.self
    attention.forward = attention.forward
    report = sbk.patch(model, unpad=True)
    assert "its own forward was replaced (accelerate's hooks do that)" in reasons(report, "attention")
    assert not [row for row in report.patched if row.part == "attention"]
    assert reasons(report, "unpad") == {"it needs the fused attention in every layer"}
    assert not isinstance(attention, Swapped) and not isinstance(model, Swapped)


def test_attention_without_its_model_stays():
    """Nobody would tell it which tokens there are."""

    class Mine(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    whole = samples.model("BertModel")
    mine = Mine(whole.config)
    for model in (whole.encoder, mine):
        report = sbk.patch(model)
        (reason,) = reasons(report, "attention")
        assert reason.startswith("no ...Model as transformers has it stands above")
        assert {row.part for row in report.patched} >= {"add_norm", "gelu"}


def test_one_line_for_equal_layers():
    report = sbk.patch(samples.model("BertModel", num_hidden_layers=3))
    lines = str(report).splitlines()
    assert lines[0].startswith("BertModel: ") and "sbk.unpatch(model)" in lines[0]
    assert any(line.startswith("encoder.layer.{0-2}.attention.output  add_norm") for line in lines)
    assert len(lines) < 12


@pytest.mark.parametrize("part", ["attention", "add_norm", "gelu", "embeddings", "mlm_loss", "unpad"])
def test_each_part_alone(part):
    parts = dict.fromkeys(swap.PARTS, False) | {part: True}
    name = "BertForMaskedLM"
    model = samples.model(name).train()
    patched = samples.twin(model)
    report = sbk.patch(patched, **parts)
    assert {row.part for row in report.patched} == {part}
    given = samples.batch(name, "right")
    torch.testing.assert_close(patched(**given).loss, model(**given).loss, rtol=1e-5, atol=1e-6)
    sbk.unpatch(patched)
