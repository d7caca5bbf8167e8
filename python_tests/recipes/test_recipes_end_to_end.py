"""Every recipe that needs no other model, from one line of the command line to a model that transformers fills masks with."""

from __future__ import annotations

import json

import pytest

from stackbert_kernels.cli import main
from stackbert_kernels.recipes import NEED_SOURCE, NEED_TEACHER, RECIPES
from stackbert_kernels.train import loop

ENDS_AS = {"albert": "AlbertForMaskedLM", "progressive_layer_dropping": "RobertaPreLayerNormForMaskedLM"}
LINE = (
    "--layers 4 --hidden 32 --heads 2 --max-position 16 --seq-len 16 --batch-tokens 64 --steps 24 --lr 1e-3 --threads 1"
)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in NEED_SOURCE + NEED_TEACHER])
def test_a_line_becomes_a_model(shards, tmp_path, monkeypatch, capsys, recipe):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(loop, "write_report", lambda directory: None)
    monkeypatch.setattr("os.fsync", lambda handle: None)
    line = ["pretrain", str(shards), "--out", str(tmp_path / "run"), "--recipe", recipe, *LINE.split(), "--json"]
    assert main(line) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "finished" and result["eval_loss"] > 0 and len(result["stage_seconds"]) >= 1
    fill = transformers.pipeline("fill-mask", model=result["model"], device="cpu")
    assert type(fill.model).__name__ == ENDS_AS.get(recipe, "BertForMaskedLM")
    assert fill.model.config.num_hidden_layers == 4
    assert all(set(best) >= {"token_str", "score"} for best in fill("ban bar [MASK] bat don."))
