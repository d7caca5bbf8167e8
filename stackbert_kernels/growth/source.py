"""The smaller model that a run begins from: what its directory says, whether it fits, and its weights at the run's size.

A teacher is read in the same way (train/teacher.py): `role` is what an error calls the model. A source is a run of `stackbert pretrain` that has written model/, or any directory of transformers with a BERT. All that can be refused is
refused from its config.json, before torch is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from stackbert_kernels.config import FROM_SOURCE, ConfigError, ModelConfig, Stage, TrainConfig

if TYPE_CHECKING:
    from stackbert_kernels.model.bert import Bert

SOURCE = "source"
MODEL = "model"
FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
MAY_GROW = ("layers", "hidden", "heads", "inner")
VOCABULARIES = ("tokenizer.json", "vocab.txt")
WEIGHTS = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


def source_directory(path: Path | str, role: str = SOURCE) -> Path:
    """The transformers directory of a source: itself, or RUN/model."""
    path = Path(path)
    inner = path / MODEL
    settings = read_settings(path, role)
    if "stages" in settings and "recipe" in settings:
        if not (inner / "config.json").is_file():
            raise ConfigError(f"{role}: {path} is a run that has written no {MODEL}/ yet")
        return inner
    return path


def source_shape(path: Path | str, role: str = SOURCE) -> ModelConfig:
    """The shape of the model in `path`, from its config.json alone."""
    directory = source_directory(path, role)
    settings = read_settings(directory, role)
    kind = settings.get("model_type")
    if kind != "bert":
        raise ConfigError(f"{role}: {directory} must hold a BERT, got model_type {kind!r}")
    if settings.get("hidden_act") not in ACTIVATIONS:
        raise ConfigError(
            f"{role}: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {settings.get('hidden_act')!r}"
        )
    missing = [theirs for theirs in FIELDS.values() if theirs not in settings]
    if missing:
        raise ConfigError(f"{role}: {directory / 'config.json'} lacks {', '.join(missing)}")
    values = {ours: settings[theirs] for ours, theirs in FIELDS.items()}
    strange = [FIELDS[name] for name, value in values.items() if type(value) not in (int, float)]
    if strange:
        raise ConfigError(
            f"source: {directory / 'config.json'}: {strange[0]} must be a number, got {settings[strange[0]]!r}"
        )
    return ModelConfig(**values, activation=ACTIVATIONS[settings["hidden_act"]])


def source_vocabulary(path: Path | str, role: str = SOURCE) -> Path | None:
    directory = source_directory(path, role)
    return next((directory / name for name in VOCABULARIES if (directory / name).is_file()), None)


def check_source(config: TrainConfig) -> None:
    """Whether the run can begin from config.source; ConfigError if not. A vocab_size of 0 is not looked at: it is not known yet."""
    first = config.stages[0]
    if first.grow not in FROM_SOURCE:
        if config.source:
            raise ConfigError(
                f"source: recipe {config.recipe} begins from random weights, bert2bert from a source, got {config.source}"
            )
        return
    if not config.source:
        raise ConfigError(f"{config.recipe}: --source must name a run or a transformers directory with a smaller BERT")
    if config.model.embedding:
        raise ConfigError(f"source: a BERT has no factorised embeddings, got embedding {config.model.embedding}")
    check_widening(source_shape(config.source), config.model)
    directory = source_directory(config.source)
    if not any((directory / name).is_file() for name in WEIGHTS):
        raise ConfigError(f"source: {directory} has no weights: wanted one of {', '.join(WEIGHTS)}")


def check_widening(source: ModelConfig, model: ModelConfig) -> None:
    """Whether growth/width.py can make `model` of `source`; ConfigError if not."""
    for name in MAY_GROW:
        if getattr(source, name) > getattr(model, name):
            raise ConfigError(
                f"source: it must not be larger than the model, got {name} {getattr(source, name)} -> {getattr(model, name)}"
            )
    if source.head_dim != model.head_dim:
        raise ConfigError(
            "source: heads are copied whole, so it must have the model's head dim (hidden / heads), "
            f"got {source.head_dim} -> {model.head_dim}"
        )
    for name in ("norm", "activation", "norm_eps", "vocab_size", "max_position", "token_types"):
        ours, theirs = getattr(model, name), getattr(source, name)
        if ours != theirs and not (name == "vocab_size" and ours == 0):
            raise ConfigError(f"source: it must have the model's {name}, got {theirs} -> {ours}")


def begin(model: Bert, stage: Stage, path: Path | str, *, seed: int) -> list[int]:
    """Puts the source's weights, grown by stage.grow, into `model`; returns the source's layer of each. Heads that the source lacks stay."""
    from stackbert_kernels.growth.axes import load
    from stackbert_kernels.growth.width import CHANGES, widening

    source = load_source(path)
    maps = widening(source.config, model.config, choice=stage.width_map, seed=seed)
    grown = CHANGES[stage.grow](dict(source.named_parameters()), maps)
    load(model, dict(model.named_parameters()) | grown)
    return [read[0] for read in maps.layers.sources]


def load_source(path: Path | str, role: str = SOURCE) -> Bert:
    """The source as our model, on the CPU in float32."""
    import transformers

    from stackbert_kernels.model.hf import from_transformers

    directory = source_directory(path, role)
    named = (read_settings(directory, role).get("architectures") or ["BertModel"])[0]
    cls = getattr(transformers, named if named in ("BertForMaskedLM", "BertForPreTraining") else "BertModel")
    try:
        return from_transformers(cls.from_pretrained(directory, local_files_only=True).float())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{role}: {directory} cannot be loaded: {str(error).splitlines()[0]}") from error


def read_settings(path: Path, role: str = SOURCE) -> dict:
    """The config.json of a run or of a transformers directory."""
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{role}: {path} must be a run or a transformers directory, got no config.json") from error
    except ValueError as error:
        raise ConfigError(f"{role}: {path / 'config.json'} is not JSON") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{role}: {path / 'config.json'} must hold a JSON object")
    return settings
