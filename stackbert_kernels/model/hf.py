"""Names and settings to and from transformers (>= 5.0), which is imported only when used.

The tables are data: which of our parameters and settings is which of theirs. A tuple of their names stands for one of our tensors
that holds theirs one below the other.
"""

from __future__ import annotations

import torch

from stackbert_kernels.config import ModelConfig
from stackbert_kernels.model import twins
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.model.twins import Place

SETTINGS = {  # ModelConfig -> BertConfig
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours
EXPORTED_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours -> theirs
OF_A_FILE = (
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
)  # BertConfig fields that describe a file, not a model

EMBEDDINGS = {
    "word": "embeddings.word_embeddings.weight",
    "position": "embeddings.position_embeddings.weight",
    "token_type": "embeddings.token_type_embeddings.weight",
    "embedding_norm.weight": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
}
LAYER = {
    "qkv_weight": ("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight"),
    "qkv_bias": ("attention.self.query.bias", "attention.self.key.bias", "attention.self.value.bias"),
    "out_weight": "attention.output.dense.weight",
    "out_bias": "attention.output.dense.bias",
    "norm1_weight": "attention.output.LayerNorm.weight",
    "norm1_bias": "attention.output.LayerNorm.bias",
    "inner_weight": "intermediate.dense.weight",
    "inner_bias": "intermediate.dense.bias",
    "outer_weight": "output.dense.weight",
    "outer_bias": "output.dense.bias",
    "norm2_weight": "output.LayerNorm.weight",
    "norm2_bias": "output.LayerNorm.bias",
}
POOLER = {"pair.pooler.weight": "pooler.dense.weight", "pair.pooler.bias": "pooler.dense.bias"}
MLM = {
    "mlm.transform.weight": "cls.predictions.transform.dense.weight",
    "mlm.transform.bias": "cls.predictions.transform.dense.bias",
    "mlm.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "mlm.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "mlm.bias": "cls.predictions.bias",
}
PAIR = {"pair.classifier.weight": "cls.seq_relationship.weight", "pair.classifier.bias": "cls.seq_relationship.bias"}
DECODER = {
    "word": "cls.predictions.decoder.weight",
    "mlm.bias": "cls.predictions.decoder.bias",
}  # tied there to what is named here


def from_transformers(hf_model) -> Bert:
    """The same model with our kernels, on hf_model's device, in float32, in hf_model's mode (train or eval).

    Takes BertModel, BertForMaskedLM and BertForPreTraining. BertForPreTraining, and a BertModel with a pooler, become objective
    "mlm+nsp". Heads that a BertModel lacks are new (seed 0). Settings without a meaning here (pad_token_id, label names, ...) are
    kept for to_transformers. What cannot be represented is a ValueError: relative positions, decoders, other activations, an
    untied decoder.
    """
    transformers = _transformers()
    bare = isinstance(hf_model, transformers.BertModel)
    if not bare and not isinstance(hf_model, transformers.BertForMaskedLM | transformers.BertForPreTraining):
        raise TypeError(
            f"from_transformers: wanted BertModel, BertForMaskedLM or BertForPreTraining, got {type(hf_model).__name__}"
        )
    config = hf_model.config
    _refuse(config, has_decoder=not bare)
    pair = isinstance(hf_model, transformers.BertForPreTraining) or (bare and hf_model.pooler is not None)
    state = hf_model.state_dict()
    model = Bert(
        ModelConfig(
            **{ours: getattr(config, theirs) for ours, theirs in SETTINGS.items()},
            activation=ACTIVATIONS[config.hidden_act],
            objective="mlm+nsp" if pair else "mlm",
        ),
        device=hf_model.device,
    )
    names = _encoder_names(config.num_hidden_layers, "" if bare else "bert.", pair)
    if not bare:
        names |= MLM | (PAIR if pair else {})
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, theirs in names.items():
            pieces = [state.pop(name) for name in ([theirs] if isinstance(theirs, str) else theirs)]
            parameters[ours].copy_(torch.cat(pieces))
    for ours, theirs in DECODER.items():
        copy = state.pop(theirs, None)
        if copy is not None and not torch.equal(copy.float(), parameters[ours]):
            raise ValueError(f"from_transformers: {theirs} must be tied to {names[ours]}, its values differ")
    if state:
        raise ValueError(f"from_transformers: parameters with no place here: {', '.join(sorted(state))}")
    carried = set(SETTINGS.values()) | set(OF_A_FILE)
    model.transformers_fields = {name: value for name, value in config.to_dict().items() if name not in carried}
    return model.train(hf_model.training)


def to_transformers(model: Bert, *, pad_token_id: int = 0):
    """The layers in use (num_hidden_layers is depth) as the model of transformers that computes the same:

        post-LN                        BertForMaskedLM (objective mlm) or BertForPreTraining (mlm+nsp, mlm+sop)
        post-LN, factorised embedding  AlbertForMaskedLM or AlbertForPreTraining; layers in equal groups share there as they do here
        pre-LN                         RobertaPreLayerNormForMaskedLM, whose positions begin after pad_token_id

    Layers that share rows otherwise come out expanded, each with its own copy. A new float32 model on model's device, in its mode. In a
    stage that unties the decoder, so is the result's (tie_word_embeddings=False). ValueError for what has no twin (twins.why_no_twin).
    """
    transformers = _transformers()
    config = model.config
    reason = twins.why_no_twin(config)
    if reason is not None:
        raise ValueError(f"to_transformers: {reason}")
    fields = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
    fields = model.transformers_fields | fields | {"num_hidden_layers": model.depth}
    if (
        ACTIVATIONS.get(fields.get("hidden_act")) != config.activation
    ):  # gelu_new and gelu_pytorch_tanh are one function: keep the name
        fields["hidden_act"] = EXPORTED_ACTIVATIONS[config.activation]
    untied = model.mlm.decoder is not None
    fields["tie_word_embeddings"] = not untied
    pair = model.pair is not None
    if config.embedding:
        places, groups = twins.albert(model)
        fields |= {"embedding_size": config.embedding, "num_hidden_groups": groups, "inner_group_num": 1}
        cls = transformers.AlbertForPreTraining if pair else transformers.AlbertForMaskedLM
        hf_model = cls(transformers.AlbertConfig(**fields, classifier_dropout_prob=config.dropout))
    elif config.norm == "pre":
        fields |= {"max_position_embeddings": config.max_position + pad_token_id + 1, "pad_token_id": pad_token_id}
        cls = transformers.RobertaPreLayerNormForMaskedLM
        hf_model = cls(transformers.RobertaPreLayerNormConfig(**fields))
        places = twins.pre_norm(model)
    else:
        cls = transformers.BertForPreTraining if pair else transformers.BertForMaskedLM
        hf_model = cls(transformers.BertConfig(**fields))
        places = _bert_places(model)

    parameters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    state = {}
    for theirs, place in places.items():
        private = untied and theirs.endswith("decoder.weight")
        state[theirs] = parameters["mlm.decoder" if private else place.name].chunk(place.parts)[place.part]
        if place.name == "position" and config.norm == "pre":
            state[theirs] = torch.nn.functional.pad(state[theirs], (0, 0, pad_token_id + 1, 0))
    hf_model.load_state_dict(state)
    return hf_model.to(model.word.device).train(model.training)


def _bert_places(model: Bert) -> dict[str, Place]:
    pair = model.pair is not None
    names = {ours: f"bert.{theirs}" for ours, theirs in (EMBEDDINGS | (POOLER if pair else {})).items()}
    places = {theirs: Place(ours) for ours, theirs in (names | MLM | (PAIR if pair else {})).items()}
    places |= {theirs: Place(ours) for ours, theirs in DECODER.items()}
    for layer in range(model.depth):
        for slot, theirs in LAYER.items():
            theirs = [theirs] if isinstance(theirs, str) else theirs
            for part, name in enumerate(theirs):
                places[f"bert.encoder.layer.{layer}.{name}"] = Place(
                    twins.row_of(model, layer, slot), part, len(theirs)
                )
    return places


def _encoder_names(depth: int, prefix: str, pooler: bool) -> dict[str, str | list[str]]:
    names = {ours: prefix + theirs for ours, theirs in (EMBEDDINGS | (POOLER if pooler else {})).items()}
    for i in range(depth):
        layer = f"{prefix}encoder.layer.{i}."
        for ours, theirs in LAYER.items():
            whole = layer + theirs if isinstance(theirs, str) else [layer + piece for piece in theirs]
            names[f"bank.layers.{i}.{ours}"] = whole
    return names


def _refuse(config, has_decoder: bool) -> None:
    """A setting that changes what the model computes and that we do not have."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"from_transformers: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}"
        )
    wanted = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    if has_decoder:
        wanted["tie_word_embeddings"] = True
    for name, value in wanted.items():
        given = getattr(config, name, value)
        if given != value:
            raise ValueError(f"from_transformers: {name} must be {value!r}, got {given!r}")


def _transformers():
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"stackbert_kernels needs transformers 5.0 or newer, found {transformers.__version__}")
    return transformers
