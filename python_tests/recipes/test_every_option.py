"""Every choice that an option of a recipe names, at toy size: it trains to the end and becomes the model that ordinary training becomes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from stackbert_kernels.cli import main
from stackbert_kernels.train import loop

pytest.importorskip("transformers")
SIZE = "--hidden 16 --heads 2 --inner 32 --max-position 16 --seq-len 16 --batch-tokens 32 --eval-tokens 64 --steps 14"
RATE = "--lr 1e-3 --threads 1 --checkpoint-every 100 --eval-every 100 --device cpu"
ABLATIONS = [
    "--mslt.joint 0.16 --mslt.init copy_top --mslt.stages 4 --mslt.embeddings freeze",  # the defaults
    *(f"--mslt.joint {share}" for share in (0, 0.05, 0.1, 0.3)),
    *(f"--mslt.init {init}" for init in ("random", "identity")),
    *(f"--mslt.stages {k}" for k in (2, 3, 6)),
    *(f"--mslt.embeddings {policy}" for policy in ("output_grad", "untie", "full")),
]
"""Of specs/mslt.md, one choice changed at a time."""
OTHERS = {
    "mslt": [
        "--mslt.embeddings untie --mslt.retie mean",
        "--mslt.embeddings untie --mslt.joint 0",  # ends with a decoder of its own
        "--mslt.lr-policy restart --mslt.rewarm 2",
        "--mslt.optimizer-state zero --mslt.no-frozen-dropout",
        "--mslt.optimizer-state reset --mslt.stages 2 --mslt.stage-weights 1 3",
    ],
    "stacking": [
        "--stacking.init interleave --stacking.optimizer-state copy",
        "--stacking.init identity --stacking.optimizer-state zero",
        "--stacking.init random --stacking.lr-policy restart",
        "--stacking.factor 4",
        "--stacking.start 6 --stacking.stage-weights 1 1",
        "--stacking.lr-policy published",
    ],
    "auto": ["--auto.shares 5 4 5"],
    "incremental": [
        "--incremental.stages 1",
        "--incremental.stages 3 --incremental.init identity --incremental.continual 0",
        "--incremental.stages 2 --incremental.init copy_top --incremental.embeddings output_grad",
        "--incremental.stages 2 --incremental.embeddings untie --incremental.lr-policy restart",
        "--incremental.stages 2 --incremental.embeddings full --incremental.optimizer-state zero",
        "--incremental.stages 2 --incremental.rewarm None --incremental.optimizer-state reset",
    ],
    "share_then_unshare": [
        "--share-then-unshare.until adaptive --share-then-unshare.every 2 --share-then-unshare.below 1",
        "--share-then-unshare.until split --share-then-unshare.every 2 --share-then-unshare.below 0.9",
        "--share-then-unshare.shared 0",
        "--share-then-unshare.unit 3 --share-then-unshare.gradient sum --share-then-unshare.rewarm 2",
        "--share-then-unshare.shared 0.5 --share-then-unshare.optimizer-state zero",
        "--share-then-unshare.optimizer-state reset",
    ],
    "multi_level": [
        "--multi-level.factor 2 --multi-level.layer-groups apart --multi-level.alpha 0",
        "--multi-level.alpha 1 --multi-level.optimizer-state copy",
        "--multi-level.lr-policy restart",
        "--multi-level.lr-policy published --multi-level.stage-weights 1 2 1",
    ],
}


@pytest.fixture(autouse=True)
def _without_report_and_disk(monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    monkeypatch.setattr("os.fsync", lambda handle: None)


def tensors_of(model: Path) -> dict[str, tuple]:
    """Name, type and shape of all that save_pretrained wrote."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: (e["dtype"], e["shape"]) for name, e in header.items() if name != "__metadata__"}


def trained(shards, out: Path, options: str, capsys) -> Path:
    line = (
        f"pretrain {shlex.quote(str(shards))} --out {shlex.quote(str(out))} --layers 12 {SIZE} {RATE} --json {options}"
    )
    code, printed = main(shlex.split(line)), capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(printed.out)
    assert result["status"] == "finished" and result["step"] == 14 and result["skipped"] == 0
    assert 0 < result["eval_loss"] < 10 and all(seconds > 0 for seconds in result["stage_seconds"])
    return Path(result["model"])


@pytest.fixture(scope="module")
def of_ordinary_training(shards, tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    from stackbert_kernels.data.prepare import load_manifest

    shape = BertConfig(
        vocab_size=load_manifest(shards)["vocab_size"], hidden_size=16, num_hidden_layers=12, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("ordinary")
    BertForMaskedLM(shape).save_pretrained(folder)
    return tensors_of(folder)


def test_ordinary_training_becomes_a_model_of_transformers(shards, tmp_path, capsys, of_ordinary_training):
    assert tensors_of(trained(shards, tmp_path / "run", "--recipe baseline", capsys)) == of_ordinary_training


@pytest.mark.parametrize("options", ABLATIONS)
def test_every_ablation_of_mslt(shards, tmp_path, capsys, of_ordinary_training, options):
    assert tensors_of(trained(shards, tmp_path / "run", options, capsys)) == of_ordinary_training


@pytest.mark.parametrize(
    ("recipe", "options"), [(recipe, o) for recipe, all_of_it in OTHERS.items() for o in all_of_it]
)
def test_every_other_choice(shards, tmp_path, capsys, of_ordinary_training, recipe, options):
    made = tensors_of(trained(shards, tmp_path / "run", f"--recipe {recipe} {options}", capsys))
    decoder = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    private = decoder if options.endswith("untie --mslt.joint 0") else set()
    assert made.keys() == of_ordinary_training.keys() | private
    assert all(made[name] == entry for name, entry in of_ordinary_training.items())


@pytest.fixture(scope="module")
def source(shards, tmp_path_factory):
    """A run of three layers, half as wide."""
    out = tmp_path_factory.mktemp("source") / "run"
    small = SIZE.replace("--hidden 16 --heads 2 --inner 32", "--hidden 8 --heads 1 --inner 16").replace(
        "--steps 14", "--steps 4"
    )
    assert main(shlex.split(f"pretrain {shards} --out {out} --layers 3 --recipe baseline {small} {RATE} --json")) == 0
    return out


@pytest.mark.parametrize(
    "options",
    [
        "--bert2bert.init fpi --bert2bert.share 0",
        "--bert2bert.init aki --bert2bert.width-map random --bert2bert.submodel 2",
        "--bert2bert.share 0.5 --bert2bert.embeddings output_grad",
        "--bert2bert.embeddings untie",
        "--bert2bert.embeddings full --bert2bert.submodel 12",
    ],
)
def test_every_way_to_begin_from_a_source(shards, source, tmp_path, capsys, of_ordinary_training, options):
    line = f"--recipe bert2bert --source {shlex.quote(str(source))} {options}"
    capsys.readouterr()
    assert tensors_of(trained(shards, tmp_path / "run", line, capsys)) == of_ordinary_training
