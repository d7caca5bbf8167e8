"""Growth of Hugging Face checkpoints: every tensor against a map written out by hand, whole or not at all, one line for bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stackbert_kernels.config import ConfigError
from stackbert_kernels.growth import checkpoint as module
from stackbert_kernels.growth import grow_checkpoint
from stackbert_kernels.growth.checkpoint import INDEX, OPTIMIZER, STATE, WEIGHTS

transformers = pytest.importorskip("transformers")

COMMON = {"vocab_size": 41, "initializer_range": 0.2}
BERT = COMMON | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
ELECTRA = BERT | {"embedding_size": 8}
DISTIL = COMMON | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
FAMILIES = {  # class -> settings, where its layers are
    "BertForMaskedLM": (BERT, "bert.encoder.layer"),
    "BertForPreTraining": (BERT, "bert.encoder.layer"),
    "BertModel": (BERT, "encoder.layer"),
    "BertForSequenceClassification": (BERT, "bert.encoder.layer"),
    "RobertaForMaskedLM": (BERT, "roberta.encoder.layer"),
    "XLMRobertaForTokenClassification": (BERT, "roberta.encoder.layer"),
    "CamembertForMaskedLM": (BERT, "roberta.encoder.layer"),
    "ElectraForPreTraining": (ELECTRA, "electra.encoder.layer"),
    "ElectraForMaskedLM": (ELECTRA, "electra.encoder.layer"),
    "RobertaPreLayerNormForMaskedLM": (BERT, "roberta_prelayernorm.encoder.layer"),
    "DistilBertForMaskedLM": (DISTIL, "distilbert.transformer.layer"),
}
MAPS = {  # by hand
    ("stack", 6): [0, 1, 0, 1, 0, 1],
    ("interleave", 4): [0, 0, 1, 1],
    ("copy_top", 3): [0, 1, 1],
    ("random", 3): [0, 1, None],
    ("identity", 4): [0, 1, None, None],
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(name: str, **changes):
    """A small model in which every parameter matters, in eval mode."""
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**(FAMILIES[name][0] | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def saved(path: Path, name: str = "BertForMaskedLM", **changes):
    model = model_of(name, **changes)
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("[PAD]\n")
    return model


def trainer_checkpoint(path: Path, model, optimizer, steps: int = 2) -> None:
    """What transformers' Trainer leaves, but for its own name: a few steps' optimizer, and the small files."""
    losses(model, optimizer, steps)
    model.save_pretrained(path)
    torch.save(optimizer.state_dict(), path / OPTIMIZER)
    torch.save({"last_epoch": steps}, path / "scheduler.pt")
    torch.save(torch.get_rng_state(), path / "rng_state.pth")
    torch.save({}, path / "training_args.bin")
    state = {
        "global_step": steps,
        "best_metric": 0.5,
        "best_global_step": 1,
        "best_model_checkpoint": "out/checkpoint-1",
    }
    (path / STATE).write_text(json.dumps(state))


def losses(model, optimizer, steps: int) -> None:
    model.eval()
    for step in range(steps):
        ids = torch.randint(5, 41, (3, 7), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        output = model(input_ids=ids)
        output[0].float().square().mean().backward()
        optimizer.step()


def groups_of(model, *, named: bool = False):
    """Trainer's groups: matrices decay, biases and norms do not."""
    decay, other = [], []
    for name, parameter in model.named_parameters():
        plain = "bias" in name or "norm" in name.lower()
        (other if plain else decay).append((name, parameter) if named else parameter)
    return [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]


def by_hand(name: str, prefix: str, rows) -> str | None:
    """The old name of a grown tensor, by a map that was written out."""
    if not name.startswith(prefix + "."):
        return name
    layer, _, rest = name[len(prefix) + 1 :].partition(".")
    row = rows[int(layer)]
    return None if row is None else f"{prefix}.{row}.{rest}"


@pytest.mark.parametrize("operator, layers", [("stack", 6), ("interleave", 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_tensor_by_tensor(tmp_path, name, operator, layers):
    old = saved(tmp_path / "old", name).state_dict()
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", layers, operator)
    new, loading = type(model_of(name)).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    prefix, rows = FAMILIES[name][1], MAPS[operator, layers]
    assert report.prefix == prefix and report.map == rows and new.config.num_hidden_layers == layers
    for key, tensor in new.state_dict().items():
        assert torch.equal(tensor, old[by_hand(key, prefix, rows)]), key
    for origin in report.tensors:
        assert origin.source == by_hand(origin.name, prefix, rows)
        assert origin.how == ("kept" if origin.source == origin.name else "copied")
    assert {origin.name for origin in report.tensors} == set(load_file(tmp_path / "new" / WEIGHTS))
    assert (tmp_path / "new" / "vocab.txt").read_text() == "[PAD]\n" and "vocab.txt" in report.copied
    with safe_open(tmp_path / "new" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [module.layer_idx for module in new.modules() if hasattr(module, "layer_idx")] in ([], list(range(layers)))
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("operator, layers", MAPS)
def test_every_operator(tmp_path, operator, layers):
    old = saved(tmp_path / "old").state_dict()
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", layers, operator, seed=3)
    rows, prefix = MAPS[operator, layers], "bert.encoder.layer"
    new = load_file(tmp_path / "new" / WEIGHTS)
    how = {origin.name: origin.how for origin in report.tensors}
    for key, tensor in new.items():
        source = by_hand(key, prefix, rows)
        if source is not None:
            assert torch.equal(tensor, old[source]), key
        elif key.endswith("LayerNorm.weight"):
            assert tensor.eq(1).all() and how[key] == "ones"
        elif key.endswith("bias") or (
            operator == "identity"
            and key.split(".", 4)[4]
            in (
                "attention.output.dense.weight",
                "output.dense.weight",
            )
        ):
            assert not tensor.any() and how[key] == "zeros"
        else:
            # Of n normal draws, the standard deviation is right to 1/sqrt(2 n): 5 of them, n >= 16 x 16.
            assert abs(tensor.std() / 0.2 - 1) < 5 / (2 * tensor.numel()) ** 0.5 and how[key] == "drawn", key


def test_fresh_layers_depend_on_seed_and_name_alone(tmp_path):
    saved(tmp_path / "old")
    grow_checkpoint(tmp_path / "old", tmp_path / "a", 4, "random", seed=3)
    grow_checkpoint(tmp_path / "old", tmp_path / "b", 3, "random", seed=3)
    grow_checkpoint(tmp_path / "old", tmp_path / "c", 3, "random", seed=4)
    a, b, c = (load_file(tmp_path / name / WEIGHTS) for name in "abc")
    query = "bert.encoder.layer.{}.attention.self.query.weight"
    assert torch.equal(a[query.format(2)], b[query.format(2)])
    assert not torch.equal(a[query.format(2)], a[query.format(3)])
    assert not torch.equal(b[query.format(2)], c[query.format(2)])


def test_identity_keeps_the_function_of_a_pre_norm_model(tmp_path):
    """And of no other: a post-norm layer normalises once more."""
    ids = torch.randint(5, 41, (2, 9))
    for name, kept in (("RobertaPreLayerNormForMaskedLM", True), ("RobertaForMaskedLM", False)):
        old = saved(tmp_path / name, name)
        grow_checkpoint(tmp_path / name, tmp_path / f"{name}-grown", 5, "identity")
        new = type(old).from_pretrained(tmp_path / f"{name}-grown").eval()
        with torch.no_grad():
            assert torch.equal(new(ids).logits, old(ids).logits) == kept, name


def test_half_precision_stays(tmp_path):
    model_of("BertForMaskedLM").bfloat16().save_pretrained(tmp_path / "old")
    grow_checkpoint(tmp_path / "old", tmp_path / "new", 3, "random")
    assert {tensor.dtype for tensor in load_file(tmp_path / "new" / WEIGHTS).values()} == {torch.bfloat16}


def test_shards_stay_shards(tmp_path):
    old = model_of("BertForMaskedLM")
    old.save_pretrained(tmp_path / "old", max_shard_size="8KB")
    shards = sorted(path.name for path in (tmp_path / "old").glob("*.safetensors"))
    assert len(shards) > 2
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", 4, "interleave")
    assert sorted(path.name for path in (tmp_path / "new").glob("*.safetensors")) == shards and not report.left_out
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    tensors = {name: t for shard in shards for name, t in load_file(tmp_path / "new" / shard).items()}
    assert index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "new" / shard)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    new, loading = transformers.BertForMaskedLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert index["metadata"].get("total_parameters", new.num_parameters()) == new.num_parameters()
    for key, tensor in new.state_dict().items():
        assert torch.equal(tensor, old.state_dict()[by_hand(key, "bert.encoder.layer", [0, 0, 1, 1])]), key


def test_numbers_of_layers_and_lists_of_the_config(tmp_path):
    """An integer that counts layers is counted on; other integers and lists go with their layer."""
    saved(tmp_path / "old")
    weights = load_file(tmp_path / "old" / WEIGHTS)
    for i in range(2):
        weights[f"bert.encoder.layer.{i}.layer_idx"] = torch.tensor(i)
        weights[f"bert.encoder.layer.{i}.window"] = torch.tensor([8, 4 + i])
    save_file(weights, tmp_path / "old" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config |= {"layer_types": ["full", "local"], "other": [1, 2], "layer_sizes": [1, 2, 3]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", 4, "interleave")
    new = load_file(tmp_path / "new" / WEIGHTS)
    assert [int(new[f"bert.encoder.layer.{i}.layer_idx"]) for i in range(4)] == [0, 1, 2, 3]
    assert [new[f"bert.encoder.layer.{i}.window"].tolist() for i in range(4)] == [[8, 4], [8, 4], [8, 5], [8, 5]]
    assert report.config == {"num_hidden_layers": 4, "layer_types": ["full", "full", "local", "local"]}
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config | report.config
    grow_checkpoint(tmp_path / "old", tmp_path / "more", 3, "random")
    assert int(load_file(tmp_path / "more" / WEIGHTS)["bert.encoder.layer.2.layer_idx"]) == 2
    assert json.loads((tmp_path / "more" / "config.json").read_text())["layer_types"] == ["full", "local", "local"]


def test_what_is_not_copied_is_named(tmp_path):
    saved(tmp_path / "old")
    for name in ("pytorch_model.bin", "tf_model.h5", "training_args.bin", "README.md"):
        (tmp_path / "old" / name).write_text("x")
    (tmp_path / "old" / "checkpoint-5").mkdir()
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", 4)
    assert report.left_out == ["checkpoint-5/", "pytorch_model.bin", "tf_model.h5"]
    assert {"training_args.bin", "README.md", "vocab.txt"} <= set(report.copied)
    assert sorted(os.listdir(tmp_path / "new")) == sorted([*report.copied, "config.json", WEIGHTS])
    table = str(report)
    assert "bert.encoder.layer.3.output.dense.bias" in table and "left out   checkpoint-5/" in table
    assert json.loads(json.dumps(report.to_dict()))["layers"] == 4


# --- the optimizer of transformers' Trainer ---


@pytest.mark.parametrize("named", [False, True], ids=["numbered", "named"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel", "RobertaForMaskedLM", "ElectraForPreTraining"])
def test_moments_follow_the_map(tmp_path, name, named):
    """Keyed by name: the grown state, loaded into the deeper model's optimizer, is each source's state."""
    model = model_of(name)
    optimizer = torch.optim.AdamW(groups_of(model, named=named), lr=1e-2)
    trainer_checkpoint(tmp_path / "old", model, optimizer)
    before = {key: optimizer.state.get(p) for key, p in model.named_parameters()}
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", 6, "stack")

    deeper = type(model).from_pretrained(tmp_path / "new")
    again = torch.optim.AdamW(groups_of(deeper, named=named), lr=1e-2)
    state = torch.load(tmp_path / "new" / OPTIMIZER, weights_only=True)
    again.load_state_dict(state)
    how = {origin.name: origin for origin in report.optimizer}
    with_state = 0
    for key, parameter in deeper.named_parameters():
        source = by_hand(key, FAMILIES[name][1], MAPS["stack", 6])
        assert how[key].source == (source if how[key].how != "none" else how[key].source), key
        if not before[source]:
            assert parameter not in again.state and how[key].how == "none", key
            continue
        with_state += 1
        assert how[key].how == ("kept" if source == key else "copied")
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(again.state[parameter][moment], before[source][moment]), (key, moment)
    assert with_state >= 6 * 16
    assert [group["weight_decay"] for group in again.param_groups] == [0.1, 0.0]
    assert [group.get("param_names") for group in state["param_groups"]] == [
        [key for key, _ in group["params"]] if named else None for group in groups_of(deeper, named=True)
    ]
    moments = [entry["exp_avg"].data_ptr() for entry in state["state"].values()]
    assert len(set(moments)) == len(moments)
    losses(deeper, again, 1)  # and it steps
    assert sorted(set(os.listdir(tmp_path / "old")) - set(os.listdir(tmp_path / "new"))) == []


@pytest.mark.parametrize("optimizer_state, without", [("zero", [2, 3, 4, 5]), ("reset", range(6))])
def test_moments_can_start_anew(tmp_path, optimizer_state, without):
    model = model_of("BertForMaskedLM")
    trainer_checkpoint(tmp_path / "old", model, torch.optim.AdamW(groups_of(model), lr=1e-2))
    report = grow_checkpoint(tmp_path / "old", tmp_path / "new", 6, optimizer_state=optimizer_state)
    deeper = transformers.BertForMaskedLM.from_pretrained(tmp_path / "new")
    again = torch.optim.AdamW(groups_of(deeper), lr=1e-2)
    again.load_state_dict(torch.load(tmp_path / "new" / OPTIMIZER, weights_only=True))
    for key, parameter in deeper.named_parameters():
        layer = next((int(part) for part in key.split(".") if part.isdigit()), None)
        fresh = optimizer_state == "reset" or layer in without
        assert (parameter in again.state) != fresh, key
    assert again.param_groups[0]["lr"] == 1e-2 and report.optimizer_state == optimizer_state
    losses(deeper, again, 1)
    assert all(len(state) == 3 for state in again.state.values())


def test_the_trainer_s_state_forgets_the_shallow_best(tmp_path):
    model = model_of("BertForMaskedLM")
    trainer_checkpoint(tmp_path / "old", model, torch.optim.AdamW(groups_of(model)))
    grow_checkpoint(tmp_path / "old", tmp_path / "new", 4, "random")
    state = json.loads((tmp_path / "new" / STATE).read_text())
    assert state == {"global_step": 2, "best_metric": None, "best_global_step": None, "best_model_checkpoint": None}
    for name in ("scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()


def optimizers_that_cannot_grow():
    def frozen(model, path):
        model.bert.embeddings.requires_grad_(False)
        groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups_of(model)]
        trainer_checkpoint(path, model, torch.optim.AdamW(groups))

    def one_group(model, path):
        trainer_checkpoint(path, model, torch.optim.AdamW(model.parameters()))

    def swapped(model, path):
        groups = groups_of(model)
        groups[0]["params"] = groups[0]["params"][::-1]
        trainer_checkpoint(path, model, torch.optim.AdamW(groups))

    def other_names(model, path):
        groups = [g | {"params": [(f"x.{n}", p) for n, p in g["params"]]} for g in groups_of(model, named=True)]
        trainer_checkpoint(path, model, torch.optim.AdamW(groups))

    def named_backwards(model, path):
        groups = [g | {"params": g["params"][::-1]} for g in groups_of(model, named=True)]
        trainer_checkpoint(path, model, torch.optim.AdamW(groups))

    def no_optimizer(model, path):
        model.save_pretrained(path)
        torch.save([1, 2], path / OPTIMIZER)

    def damaged(model, path):
        trainer_checkpoint(path, model, torch.optim.AdamW(groups_of(model)))
        os.truncate(path / OPTIMIZER, 1000)

    def code(model, path):
        import pickle

        class Runs:
            def __reduce__(self):
                return (os.mkdir, (str(path / "ran"),))

        model.save_pretrained(path)
        (path / OPTIMIZER).write_bytes(pickle.dumps({"state": Runs(), "param_groups": []}, protocol=2))

    def unknown_class(model, path):
        trainer_checkpoint(path, model, torch.optim.AdamW(groups_of(model)))
        config = json.loads((path / "config.json").read_text()) | {"architectures": ["MyBert"]}
        (path / "config.json").write_text(json.dumps(config))

    return {
        frozen: "which are frozen or grouped otherwise is not recorded",
        one_group: "must have groups of",
        swapped: "its parameters are not in the order of transformers' Trainer",
        other_names: "names parameters that the model does not have, such as ['x.bert.",
        named_backwards: "must be in the model's order",
        no_optimizer: "must hold a torch optimizer's state and param_groups",
        damaged: "cannot be read as tensors and numbers",
        code: "cannot be read as tensors and numbers",
        unknown_class: "a model that transformers does not have, got architectures 'MyBert'",
    }


@pytest.mark.parametrize(
    "case, message", optimizers_that_cannot_grow().items(), ids=lambda case: getattr(case, "__name__", "")
)
def test_an_optimizer_that_cannot_be_named_is_refused(tmp_path, case, message):
    case(model_of("BertForMaskedLM"), tmp_path / "old")
    refused(tmp_path, message)
    assert not (tmp_path / "old" / "ran").exists()


# --- refusals, and what a fault leaves ---


def refused(
    tmp_path: Path, message: str, *, out: str = "new", layers: int = 4, operator: str = "stack", **options
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        grow_checkpoint(tmp_path / "old", tmp_path / out, layers, operator, **options)
    text = str(error.value)
    assert message in text and text.startswith("grow: ") and "\n" not in text, text
    assert sorted(tmp_path.rglob("*")) == before


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SOURCES_THAT_CANNOT_GROW = {
    "no config": (lambda p: (p / "config.json").unlink(), "source must be a transformers directory with a config.json"),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read: "),
    "a list": (lambda p: (p / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "no depth": (
        lambda p: edit(p / "config.json", num_hidden_layers=None),
        "must count its layers as num_hidden_layers",
    ),
    "other depth": (
        lambda p: edit(p / "config.json", num_hidden_layers=3),
        "must have one list of layers with the config's 3 entries, got no such list; numbered names: bert.encoder.layer (2)",
    ),
    "pruned": (lambda p: edit(p / "config.json", pruned_heads={"0": [1]}), "layers with pruned heads are not alike"),
    "no weights": (
        lambda p: (p / WEIGHTS).unlink(),
        "must hold model.safetensors or model.safetensors.index.json, got none",
    ),
    "pickled": (lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"), "got pytorch_model.bin; to convert: "),
    "truncated": (lambda p: os.truncate(p / WEIGHTS, 5000), "model.safetensors cannot be read: "),
    "empty": (lambda p: os.truncate(p / WEIGHTS, 0), "model.safetensors cannot be read: "),
    "adapter": (lambda p: (p / "adapter_config.json").write_text("{}"), "holds a PEFT adapter; merge it"),
    "own checkpoint": (lambda p: (p / "MANIFEST.json").write_text("{}"), "is a checkpoint of stackbert pretrain"),
    "own run": (lambda p: edit(p / "config.json", recipe="mslt", stages=[]), "is a run of stackbert pretrain"),
    "fsdp": (
        lambda p: (p / "pytorch_model_fsdp_0").mkdir(),
        "state sharded by DeepSpeed or FSDP (pytorch_model_fsdp_0)",
    ),
    "deepspeed": (lambda p: (p / "global_step2").mkdir(), "state sharded by DeepSpeed or FSDP (global_step2)"),
}


@pytest.mark.parametrize("case", SOURCES_THAT_CANNOT_GROW)
def test_a_source_that_cannot_grow_is_refused(tmp_path, case):
    saved(tmp_path / "old")
    damage, message = SOURCES_THAT_CANNOT_GROW[case]
    damage(tmp_path / "old")
    refused(tmp_path, message, layers=6)


def test_arguments_that_cannot_work_are_refused(tmp_path):
    saved(tmp_path / "old")
    refused(tmp_path, "stack needs a multiple of the old depth, got 2 -> 5", layers=5)
    refused(tmp_path, "stack needs 0 < old depth < new depth, got 2 -> 2", layers=2)
    refused(tmp_path, "copy_top can at most double the depth, got 2 -> 5", layers=5, operator="copy_top")
    refused(tmp_path, "grow must be one of copy_top, stack, interleave, random, identity, got 'fold'", operator="fold")
    refused(tmp_path, "optimizer_state must be one of copy, zero, reset, got 'keep'", optimizer_state="keep")
    refused(tmp_path, "out must be another directory than the source", out="old")
    refused(tmp_path, "out must be another directory than the source", out="old/new")
    refused(tmp_path, "out must be another directory than the source", out=".")
    (tmp_path / "file").write_text("")
    refused(tmp_path, "out must be a directory, got a file or a link", out="file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("")
    refused(tmp_path, "out must be a new or empty directory", out="mine")
    refused(tmp_path, "only a checkpoint is overwritten, and", out="mine", overwrite=True)


def test_layers_that_differ_and_shared_layers_are_refused(tmp_path):
    saved(tmp_path / "old")
    weights = load_file(tmp_path / "old" / WEIGHTS)
    del weights["bert.encoder.layer.1.output.dense.bias"]
    save_file(weights, tmp_path / "old" / WEIGHTS)
    refused(tmp_path, "bert.encoder.layer.0 and bert.encoder.layer.1 differ in output.dense.bias")
    shutil.rmtree(tmp_path / "old")
    settings = BERT | {"embedding_size": 8}
    transformers.AlbertForMaskedLM(transformers.AlbertConfig(**settings)).save_pretrained(tmp_path / "old")
    refused(tmp_path, "must have one list of layers with the config's 2 entries, got no such list")


def test_two_lists_that_could_be_the_layers_are_refused(tmp_path):
    """A list of another kind beside the layers is none of them."""
    saved(tmp_path / "old")
    weights = load_file(tmp_path / "old" / WEIGHTS)
    save_file(weights | {f"head.{i}.weight": torch.ones(3) for i in range(2)}, tmp_path / "old" / WEIGHTS)
    assert grow_checkpoint(tmp_path / "old", tmp_path / "one", 4).prefix == "bert.encoder.layer"
    save_file(weights | {f"other.layer.{i}.weight": torch.ones(3) for i in range(2)}, tmp_path / "old" / WEIGHTS)
    refused(tmp_path, "must have one list of layers with the config's 2 entries, got bert.encoder.layer, other.layer; ")


def test_an_operator_that_does_not_know_the_layer_is_refused(tmp_path):
    saved(tmp_path / "old")
    weights = load_file(tmp_path / "old" / WEIGHTS)
    renamed = {name.replace("output.dense", "out.linear"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "old" / WEIGHTS)
    refused(tmp_path, "identity knows a layer's last matrices as ", operator="identity")
    save_file(weights | {f"bert.encoder.layer.{i}.gate": torch.ones(3) for i in range(2)}, tmp_path / "old" / WEIGHTS)
    refused(tmp_path, "no rule says how a new gate of shape [3] starts", operator="random")


def test_overwriting_replaces_the_whole_directory(tmp_path):
    saved(tmp_path / "old")
    grow_checkpoint(tmp_path / "old", tmp_path / "new", 4)
    (tmp_path / "new" / "stale").write_text("")
    grow_checkpoint(tmp_path / "old", tmp_path / "new", 6, overwrite=True)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["num_hidden_layers"] == 6
    assert not (tmp_path / "new" / "stale").exists() and sorted(os.listdir(tmp_path)) == ["new", "old"]


@pytest.mark.parametrize("at", ["safetensors.torch.save_file", "os.fsync", "os.rename", "shutil.copy2"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fault_leaves_what_was_there(tmp_path, monkeypatch, at, overwrite):
    saved(tmp_path / "old")
    if overwrite:
        saved(tmp_path / "new")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real, calls = getattr(os, "rename"), []  # noqa: B009 - the one that is patched below

    def fails(*arguments, **keywords):
        calls.append(arguments)
        if (
            at == "os.rename" and overwrite and len(calls) != 2
        ):  # the second puts the new one in place, the third goes back
            return real(*arguments)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(at, fails)
        with pytest.raises(OSError, match="No space left"):
            grow_checkpoint(tmp_path / "old", tmp_path / "new", 4, overwrite=overwrite)
    assert calls
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    saved(tmp_path / "old")
    events = []
    sync, rename = module._sync, os.rename
    monkeypatch.setattr(module, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    grow_checkpoint(tmp_path / "old", tmp_path / "new", 4)
    at = events.index("rename")
    assert set(os.listdir(tmp_path / "new")) < set(events[:at]) and events[at - 1].startswith(".tmp-new-")
    assert events[at + 1 :] == [tmp_path.name]


def test_a_refusal_does_not_load_torch(tmp_path):
    saved(tmp_path / "old")
    code = (
        "import sys\nfrom stackbert_kernels.cli import main\n"
        f"code = main(['grow', {str(tmp_path / 'old')!r}, {str(tmp_path / 'new')!r}, '--layers', '5'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    root = str(Path(module.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "2 False False\n"
    assert done.stderr == "stackbert: grow: stack needs a multiple of the old depth, got 2 -> 5\n"
