"""What a step costs, in forwards of one layer and in floating-point operations of the matrix products.

C hidden, E width of the embeddings, I inner, L layers, r rank, S tokens of a sequence, V vocabulary, b cost of a backward over that of its forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stackbert_kernels.config import DataConfig, ModelConfig, Stage, TrainConfig, stage_model
from stackbert_kernels.plan.sizes import product_size, projection_shape, vocab_size
from stackbert_kernels.plan.spans import Span, expected_layers, submodels

BACKWARD = 2.0
"""b of the layer-unit model: of a matrix product, the gradients of input and weight cost one forward each."""


def step_cost(depth: float, train_from: int, *, head: float = 0.0, backward: float = BACKWARD) -> float:
    """Cost of a token in forwards of one layer: depth + b * (depth - train_from) + head * (1 + b)."""
    return depth + backward * (depth - train_from) + head * (1 + backward)


def head_cost(model: ModelConfig, data: DataConfig, seq_len: int = 0) -> float:
    """Forward of the masked-LM head in forwards of one layer: its matrices see only the masked tokens. `seq_len` 0 = data's."""
    vocab = vocab_size(model, data)
    return _head_flops(model.hidden, model.embedding_width, vocab, data.mask_rate) / _layer_flops(
        model, seq_len or data.seq_len
    )


def layer_flops(config: TrainConfig) -> float:
    """Matrix-product FLOPs of one layer's forward on a token: what one unit of `step_cost` is worth."""
    return _layer_flops(config.model, config.data.seq_len)


def relative_step_cost(config: TrainConfig, stage: Stage, *, backward: float = BACKWARD, seq_len: int = 0) -> float:
    """A step of `stage` over a step of the whole model, by `step_cost` with the head; the mean over its submodels.

    The step has samples of `seq_len` tokens (0 = data.seq_len), what it is compared with has data.seq_len.
    """
    model, data, S = stage_model(config.model, stage), config.data, seq_len or config.data.seq_len
    read, length = encoder_rows(stage, S, data.mask_rate)
    every = _layer_flops(model, S)  # of a layer that reads every token
    layer = read * _layer_flops(model, length)
    head = head_cost(model, data, S) * (every / layer)
    costs = [step_cost(sum(expected_layers(s)), s.train_from, head=head, backward=backward) for s in submodels(stage)]
    whole = step_cost(config.model.layers, 0, head=head_cost(config.model, data), backward=backward)
    teacher = teacher_flops(config, stage, S) / layer_flops(config)
    return (layer / layer_flops(config) * sum(costs) / len(costs) + teacher) / whole


def pooled_length(tokens: int, predicted: int, size: int) -> int:
    """Rows of a sequence in the encoder where its tokens are pooled in windows of `size`: [CLS], the windows, the predicted tokens."""
    return 1 + -(-(tokens - 1 - predicted) // size) + predicted


def encoder_rows(stage: Stage, tokens: int, mask_rate: float) -> tuple[float, int]:
    """How many rows the encoder has in `stage` for a token, and for a sequence of `tokens`."""
    length = tokens if stage.pool == 1 else pooled_length(tokens, round(mask_rate * tokens), stage.pool)
    return length / tokens, length


def span_cost(span: Span, *, backward: float = BACKWARD) -> float:
    """`relative_step_cost` in the mean over the steps of `span`."""
    costs = {S: relative_step_cost(span.config, span.stage, backward=backward, seq_len=S) for S, _ in span.lengths}
    return _mean_over_steps(span, costs)


def _mean_over_steps(span: Span, by_length: dict[int, float]) -> float:
    if len(by_length) == 1:
        return by_length[span.lengths[0][0]]
    return sum(by_length[S] * steps for S, steps in span.lengths) / sum(steps for _, steps in span.lengths)


def teacher_flops(config: TrainConfig, stage: Stage, seq_len: int = 0) -> float:
    """Of the teacher's forward pass on a token, all layers at all tokens; 0 in a stage without one."""
    if stage.align.weight == 0:
        return 0.0
    shape = config.teacher_shape
    model = replace(config.model, hidden=shape.hidden, inner=shape.inner, heads=1, rank=0, score_dim=0)
    return shape.layers * _layer_flops(model, seq_len or config.data.seq_len)


def flops_per_token(config: TrainConfig, stage: Stage, gates: Sequence[float] | None = None, seq_len: int = 0) -> float:
    """Matrix-product FLOPs that a training step of `stage` spends on a token, forward and backward; of a step with `gates` (Span.gates),
    else in the mean over the stage's steps; with samples of `seq_len` tokens, 0 = data.seq_len.

    A product counts 2 FLOPs a multiply-add, attention 4 S C a token forward and twice that backward, with S = seq_len (packed
    samples are nearly full). Counted as the model executes it: the last layer is evaluated only where the heads read it once its
    attention is done; narrow queries and keys are multiplied at the values' width; layers below the window have no backward (with
    embeddings = full: the gradient of their input alone); the first layer of a detached window needs no gradient of its input; a frozen
    word embedding needs none as decoder. A teacher's forward pass is counted.
    Attention's recomputation of its probabilities in the backward, element-wise work and embedding look-ups are not counted. Of a stage
    with submodels, the mean over these. A token is one of the text: where they are pooled, the encoder has fewer rows (encoder_rows), of which
    the heads read as many as ever.
    """
    if stage.submodel:
        windows = submodels(stage)
        return sum(flops_per_token(config, window, seq_len=seq_len) for window in windows) / len(windows)
    model, data, S = stage_model(config.model, stage), config.data, seq_len or config.data.seq_len
    C, E = model.hidden, model.embedding_width
    rows = data.mask_rate + (0.0 if model.objective == "mlm" else 1.0 / S)  # of a token: where the heads read
    read, length = encoder_rows(stage, S, data.mask_rate)
    qkv, attention, rest = (read * part for part in _part_flops(model, length))
    embeddings_learn_below = stage.embeddings in ("train", "full")
    total = 2.0 * E * C * (3 if embeddings_learn_below else 1) if model.embedding else 0.0
    runs = expected_layers(stage) if gates is None else [float(gate > 0) for gate in gates]
    aligned = stage.align.layer if stage.align.weight else 0  # is evaluated everywhere
    total += teacher_flops(config, stage, S) + 6.0 * math.prod(projection_shape(config, stage) or (0,))
    for layer, run in enumerate(runs):
        share = min(1.0, rows / read) if layer == stage.depth - 1 and layer + 1 != aligned else 1.0
        cost = qkv + attention + share * rest
        if layer >= stage.train_from:
            cost += 2 * attention + share * 2 * rest + qkv
            cost += qkv if layer > stage.train_from or embeddings_learn_below else 0.0
        elif stage.embeddings == "full":
            cost += 2 * attention + rest + qkv
        total += run * cost

    transform, decoder = 2.0 * C * E, 2.0 * E * vocab_size(model, data)
    decoder_learns = stage.embeddings != "freeze"
    total += data.mask_rate * (3 * transform + (3 if decoder_learns else 2) * decoder)
    if model.objective != "mlm":
        total += 3 * (2.0 * C * C + 4.0 * C) / S  # pooler and the pair classifier, once a sequence
    return total


def flops_per_step(config: TrainConfig, span: Span) -> float:
    """In the mean over the steps of `span`."""
    return span_flops(span) * config.data.batch_tokens


def span_flops(span: Span) -> float:
    """`flops_per_token` in the mean over the steps of `span`."""
    return _mean_over_steps(span, {S: flops_per_token(span.config, span.stage, seq_len=S) for S, _ in span.lengths})


def _part_flops(model: ModelConfig, S: int) -> tuple[float, float, float]:
    """Of a layer's forward on a token: the projections into attention, attention, and what comes after it."""
    C = model.hidden
    return 2.0 * C * sum(model.qkv_widths), 4.0 * S * C, 2.0 * C * C + 4.0 * product_size(model)


def _layer_flops(model: ModelConfig, S: int) -> float:
    return sum(_part_flops(model, S))


def _head_flops(C: int, E: int, V: int, mask_rate: float) -> float:
    return mask_rate * (2.0 * C * E + 2.0 * E * V)
