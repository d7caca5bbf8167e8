"""How many parameters there are, and which of them a stage updates.

C hidden, E width of the embeddings, I inner (hence the noqa: the field's letter), V vocabulary, r rank.
"""

from __future__ import annotations

import math

from stackbert_kernels.config import DataConfig, ModelConfig, Stage, TrainConfig, stage_model


def trainable_parameters(config: TrainConfig, stage: Stage) -> int:
    """How many parameters a step of `stage` updates; 4 bytes of each are what data-parallel training would reduce."""
    model = stage_model(config.model, stage)
    C, V = model.hidden, vocab_size(model, config.data)
    learning = slice(stage.depth - stage.submodel if stage.submodel else stage.train_from, stage.depth)
    count = len(set(stage.attention_rows[learning])) * attention_parameters(model)
    count += len(set(stage.feed_forward_rows[learning])) * feed_forward_parameters(model)
    if stage.embeddings in ("train", "full"):
        count += embedding_parameters(model, V)
    if stage.embeddings in ("output_grad", "untie"):
        count += V * model.embedding_width
    count += 2 * C if model.norm == "pre" else 0
    count += math.prod(projection_shape(config, stage) or (0,))
    return count + head_parameters(model, V)


def projection_shape(config: TrainConfig, stage: Stage) -> tuple[int, int] | None:
    """[teacher's hidden, hidden] of the map through which a stage's layer is compared with the teacher; None where it needs none."""
    own, theirs = stage_model(config.model, stage).hidden, config.teacher_shape.hidden
    return (theirs, own) if stage.align.weight and own != theirs else None


def bank_rows(config: TrainConfig) -> int:
    """Rows of the layer bank that some stage reads or may come to read: as many as layers, unless they share for the whole run."""
    return max(stage.depth if stage.untie.every else stage.bank_rows for stage in config.stages)


def model_parameters(config: TrainConfig) -> int:
    """Of the whole model, heads and the rows of its bank."""
    model, vocab = config.model, vocab_size(config.model, config.data)
    return (
        bank_rows(config) * layer_parameters(model) + embedding_parameters(model, vocab) + head_parameters(model, vocab)
    )


def layer_parameters(model: ModelConfig) -> int:
    return attention_parameters(model) + feed_forward_parameters(model)


def attention_parameters(model: ModelConfig) -> int:
    """Of one layer, its norm included."""
    C, qkv = model.hidden, sum(model.qkv_widths)
    return qkv * (C + 1) + (C * C + C) + 2 * C


def feed_forward_parameters(model: ModelConfig) -> int:
    """Of one layer, its norm included."""
    C, I = model.hidden, model.inner  # noqa: E741
    return 2 * product_size(model) + I + C + 2 * C


def product_size(model: ModelConfig) -> int:
    """Parameters of one of the two feed-forward matrices, each C x I, or r (C + I) as a product of rank r: multiply-adds on a token, too."""
    C, I = model.hidden, model.inner  # noqa: E741
    return model.rank * (C + I) if model.rank else C * I


def embedding_parameters(model: ModelConfig, vocab: int) -> int:
    """Tables and norm, and the map to the hidden width where there is one."""
    C, E = model.hidden, model.embedding_width
    return (vocab + model.max_position + model.token_types + 2) * E + (E * C + C if model.embedding else 0)


def head_parameters(model: ModelConfig, vocab: int) -> int:
    """MLM transform, its norm and the output bias (the decoder is tied); pooler and pair classifier where the objective has them."""
    C, E = model.hidden, model.embedding_width
    pair = 0 if model.objective == "mlm" else (C * C + C) + (2 * C + 2)
    return (C * E + E) + 2 * E + vocab + pair


def vocab_size(model: ModelConfig, data: DataConfig) -> int:
    """Rows of the word embedding as far as known: a tokenizer that is still to be trained is taken at its wanted size."""
    return model.vocab_size or data.train_vocab_size
