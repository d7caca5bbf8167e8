"""Growth from one transformers directory to another."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from stackbert_kernels.config import ConfigError, Stage, check_growth
from stackbert_kernels.growth.apply import grow
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.model.hf import from_transformers, to_transformers

CLASSES = ("BertForMaskedLM", "BertForPreTraining", "BertModel")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json")


def grow_transformers(source: Path | str, out: Path | str, layers: int, operator: str, *, seed: int = 0) -> Path:
    """Writes to `out` the BERT of the transformers directory `source`, grown to `layers` layers; returns `out`.

    Files beside the weights (the tokenizer's) are copied. A BertModel comes out with a masked-LM head. ConfigError for what cannot
    work, before any weights are read.
    """
    source, out = Path(source), Path(out)
    if not (source / "config.json").is_file():
        raise ConfigError(f"grow: source must be a transformers directory with a config.json, got {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"grow: out must be a new or empty directory, got {out}")
    settings = json.loads((source / "config.json").read_text())
    name = (settings.get("architectures") or ["none"])[0]
    if name not in CLASSES:
        raise ConfigError(f"grow: source must hold one of {', '.join(CLASSES)}, got {name}")
    check_growth(operator, settings["num_hidden_layers"], layers, where="grow: ")

    import transformers

    small = from_transformers(getattr(transformers, name).from_pretrained(source))
    large = lengthen(small, layers, seed=seed)
    grow(large, None, Stage(steps=1, depth=layers, grow=operator), seed=seed)
    to_transformers(large).save_pretrained(out)
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
            shutil.copy2(path, out / path.name)
    return out


@torch.no_grad()
def lengthen(small: Bert, layers: int, *, seed: int) -> Bert:
    """The same model at the same depth, in a bank that has room for `layers` layers."""
    large = Bert(replace(small.config, layers=layers), seed=seed, device=small.word.device, impl=small.impl)
    large.bank.weights[: small.depth].copy_(small.bank.weights[: small.depth])
    parameters = small.always_on_parameters()
    for name, parameter in large.always_on_parameters().items():
        parameter.copy_(parameters[name])
    large.transformers_fields = dict(small.transformers_fields)
    large.use(small.depth)
    return large.train(small.training)
