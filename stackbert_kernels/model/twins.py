"""Which model of transformers computes what ours does, and where each of its tensors is in ours. Names only: nothing here is computed.

A map goes from a name of theirs to a `Place`: the parameter of ours, and which of its equal parts, where it holds several of theirs one
below the other. Layers that share a row of the bank have the same place.
"""

from __future__ import annotations

from typing import NamedTuple

from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model.bert import Bert


class Place(NamedTuple):
    name: str
    part: int = 0
    parts: int = 1


FEED_FORWARD = ("inner_weight", "inner_bias", "outer_weight", "outer_bias", "norm2_weight", "norm2_bias")
WORD = "word"
"""What the decoder is tied to."""

ALBERT = {
    "albert.embeddings.word_embeddings.weight": WORD,
    "albert.embeddings.position_embeddings.weight": "position",
    "albert.embeddings.token_type_embeddings.weight": "token_type",
    "albert.embeddings.LayerNorm.weight": "embedding_norm.weight",
    "albert.embeddings.LayerNorm.bias": "embedding_norm.bias",
    "albert.encoder.embedding_hidden_mapping_in.weight": "embedding_map.weight",
    "albert.encoder.embedding_hidden_mapping_in.bias": "embedding_map.bias",
    "predictions.dense.weight": "mlm.transform.weight",
    "predictions.dense.bias": "mlm.transform.bias",
    "predictions.LayerNorm.weight": "mlm.norm.weight",
    "predictions.LayerNorm.bias": "mlm.norm.bias",
    "predictions.bias": "mlm.bias",
    "predictions.decoder.bias": "mlm.bias",
    "predictions.decoder.weight": WORD,
}
ALBERT_PAIR = {
    "albert.pooler.weight": "pair.pooler.weight",
    "albert.pooler.bias": "pair.pooler.bias",
    "sop_classifier.classifier.weight": "pair.classifier.weight",
    "sop_classifier.classifier.bias": "pair.classifier.bias",
}
ALBERT_LAYER = {
    "attention.query": ("qkv", 0),
    "attention.key": ("qkv", 1),
    "attention.value": ("qkv", 2),
    "attention.dense": "out",
    "attention.LayerNorm": "norm1",
    "ffn": "inner",
    "ffn_output": "outer",
    "full_layer_layer_norm": "norm2",
}

PRE_NORM = {
    "roberta_prelayernorm.embeddings.word_embeddings.weight": WORD,
    "roberta_prelayernorm.embeddings.position_embeddings.weight": "position",
    "roberta_prelayernorm.embeddings.token_type_embeddings.weight": "token_type",
    "roberta_prelayernorm.embeddings.LayerNorm.weight": "embedding_norm.weight",
    "roberta_prelayernorm.embeddings.LayerNorm.bias": "embedding_norm.bias",
    "roberta_prelayernorm.LayerNorm.weight": "final_norm.weight",
    "roberta_prelayernorm.LayerNorm.bias": "final_norm.bias",
    "lm_head.dense.weight": "mlm.transform.weight",
    "lm_head.dense.bias": "mlm.transform.bias",
    "lm_head.layer_norm.weight": "mlm.norm.weight",
    "lm_head.layer_norm.bias": "mlm.norm.bias",
    "lm_head.bias": "mlm.bias",
    "lm_head.decoder.bias": "mlm.bias",
    "lm_head.decoder.weight": WORD,
}
PRE_NORM_LAYER = {
    "attention.self.query": ("qkv", 0),
    "attention.self.key": ("qkv", 1),
    "attention.self.value": ("qkv", 2),
    "attention.output.dense": "out",
    "attention.LayerNorm": "norm1",
    "intermediate.LayerNorm": "norm2",
    "intermediate.dense": "inner",
    "output.dense": "outer",
}


def why_no_twin(config: ModelConfig) -> str | None:
    """Why transformers has no model that computes what ours does; None if it has one."""
    if config.relaxed:
        return f"transformers has no relaxed layers, refine them first: got rank {config.rank}, score_dim {config.score_dim}"
    if config.norm == "post":
        return None
    wanted = "transformers' pre-LN model (RobertaPreLayerNorm) needs"
    if config.embedding:
        return f"{wanted} embeddings as wide as the encoder, got embedding {config.embedding}"
    if config.objective != "mlm":
        return f"{wanted} objective mlm, having no sentence-pair head, got {config.objective!r}"
    if config.activation != "gelu":
        return f"{wanted} activation gelu in its head, got {config.activation!r}"
    return None


def albert(model: Bert) -> tuple[dict[str, Place], int]:
    """Places for AlbertForMaskedLM or AlbertForPreTraining, and its num_hidden_groups: transformers has groups of equally many
    consecutive layers; what is shared otherwise is expanded, a group a layer."""
    read = list(zip(model.rows, model.ffn_rows, strict=True))
    groups, depth = len(set(read)), model.depth
    first = [g * depth // groups for g in range(groups)]
    if depth % groups or any(read[i] != read[first[i * groups // depth]] for i in range(depth)):
        groups, first = depth, list(range(depth))
    places = {
        theirs: Place(ours) for theirs, ours in (ALBERT | (ALBERT_PAIR if model.pair is not None else {})).items()
    }
    for group, layer in enumerate(first):
        prefix = f"albert.encoder.albert_layer_groups.{group}.albert_layers.0."
        places |= layer_places(model, layer, prefix, ALBERT_LAYER)
    return places, groups


def pre_norm(model: Bert) -> dict[str, Place]:
    """Places for RobertaPreLayerNormForMaskedLM."""
    places = {theirs: Place(ours) for theirs, ours in PRE_NORM.items()}
    for layer in range(model.depth):
        places |= layer_places(model, layer, f"roberta_prelayernorm.encoder.layer.{layer}.", PRE_NORM_LAYER)
    return places


def layer_places(model: Bert, layer: int, prefix: str, names: dict[str, str | tuple[str, int]]) -> dict[str, Place]:
    """`names`: a module of theirs -> the stem of ours, with the third of it where it holds query, key and value."""
    places = {}
    for theirs, ours in names.items():
        stem, part, parts = (*ours, 3) if isinstance(ours, tuple) else (ours, 0, 1)
        for kind in ("weight", "bias"):
            places[f"{prefix}{theirs}.{kind}"] = Place(row_of(model, layer, f"{stem}_{kind}"), part, parts)
    return places


def row_of(model: Bert, layer: int, slot: str) -> str:
    """The parameter that `layer` reads as `slot`."""
    row = (model.ffn_rows if slot in FEED_FORWARD else model.rows)[layer]
    return f"bank.layers.{row}.{slot}"
