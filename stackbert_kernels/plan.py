"""TrainConfig -> the spans that the loop executes, and what they cost. Pure: nothing here reads a file, a clock or a tensor.

C hidden, E width of the embeddings, I inner, L layers, r rank, S tokens of a sequence, V vocabulary, b cost of a backward over that of its forward.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from stackbert_kernels.config import (
    Alignment,
    ConfigError,
    DataConfig,
    LayerDrop,
    ModelConfig,
    Stage,
    TrainConfig,
    stage_model,
)

WARMUP_SHARE = 0.02
"""Of all steps, where OptimConfig.warmup is 0."""
BACKWARD = 2.0
"""b of the layer-unit model: of a matrix product, the gradients of input and weight cost one forward each."""


@dataclass(frozen=True)
class Span:
    """One stage at its place in the run: steps [first, last), counted from the start of the run."""

    stage: Stage
    index: int
    first: int
    last: int
    config: TrainConfig

    @property
    def grows(self) -> bool:
        return self.stage.grow is not None

    @property
    def name(self) -> str:
        return self.stage.name or f"stage {self.index + 1}"

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(most tokens of a sample, steps that have it), in the order of the steps; two where the length changes inside the stage."""
        data, change = self.config.data, min(max(self.config.short_steps, self.first), self.last)
        parts = ((data.short_seq_len, change - self.first), (data.seq_len, self.last - change))
        return tuple((seq_len, steps) for seq_len, steps in parts if steps)

    def at(self, step: int) -> Stage:
        """The window of `step`: the stage's own, or the prefix that this step draws (Stage.submodel). A function of seed and step."""
        prefixes = submodels(self.stage)
        if len(prefixes) == 1:
            return prefixes[0]
        digest = hashlib.blake2b(f"{self.config.seed} prefix of step {step}".encode(), digest_size=8).digest()
        return prefixes[int.from_bytes(digest) % len(prefixes)]

    def lr(self, step: int) -> float:
        """The learning rate of `step`."""
        if not self.first <= step < self.last:
            raise ValueError(f"Span.lr: step must be in [{self.first}, {self.last}) of {self.name}, got {step}")
        config, stage = self.config, self.stage
        warmup = warmup_steps(config)
        local = step - self.first
        if stage.lr_policy == "curve":
            return config.optim.lr * on_curve(stage.lr_curve, local)
        if stage.lr_policy == "restart":
            warmup = stage.rewarm or max(1, round(warmup * stage.steps / config.steps))
            constant = round(config.optim.constant * stage.steps / config.steps)
            return config.optim.lr * schedule(local, stage.steps, warmup, constant)
        again = min(1.0, (local + 1) / stage.rewarm) if stage.rewarm else 1.0
        return config.optim.lr * schedule(step, config.steps, warmup, config.optim.constant) * again

    def gates(self, step: int) -> tuple[float, ...] | None:
        """What each layer's residual branches are multiplied by in `step`, 0 = the layer is left out; None where all run as they are.

        A function of (seed, step) alone: every part of an accumulated step, and every process, leaves out the same layers.
        """
        if self.stage.drop.keep == 1:
            return None
        chances, scales = layer_chances(self.stage, theta(self.stage.drop, step - self.first))
        return tuple(
            scale if _uniform(self.config.seed, step, layer) < chance else 0.0
            for layer, (chance, scale) in enumerate(zip(chances, scales, strict=True))
        )

    def pull(self, step: int) -> float:
        """The weight of the alignment with the teacher in `step`; 0 = no teacher runs."""
        return pull(self.stage.align, step - self.first)


def pull(align: Alignment, t: float) -> float:
    """lambda after `t` steps."""
    return align.weight * max(0.0, (align.until - t) / align.until) if align.weight else 0.0


def theta(drop: LayerDrop, t: float) -> float:
    """How likely the last layer runs after `t` steps."""
    return (1 - drop.keep) * math.exp(-drop.gamma * t) + drop.keep


def layer_chances(stage: Stage, theta: float) -> tuple[list[float], list[float]]:
    """Of each layer: how likely it runs, and by what the residual branches are multiplied when it does."""
    L = stage.depth
    own = [1 - (layer + 1) / L * (1 - theta) for layer in range(L)]
    drawn = [1 - layer / L * (1 - theta) for layer in range(L)] if stage.drop.deepspeed_compat else own
    return drawn, [1 / chance for chance in own]


def expected_layers(stage: Stage) -> list[float]:
    """The share of the stage's steps in which each layer runs, in the mean over all draws."""
    drop = stage.drop
    if drop.keep == 1:
        return [1.0] * stage.depth
    decayed = -math.expm1(-drop.gamma * stage.steps) / -math.expm1(
        -drop.gamma
    )  # the sum of exp(-gamma t) over the steps
    return layer_chances(stage, drop.keep + (1 - drop.keep) * decayed / stage.steps)[0]


def _uniform(seed: int, step: int, layer: int) -> float:
    """In [0, 1)."""
    digest = hashlib.blake2b(f"{seed} layer {layer} of step {step}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def plan(config: TrainConfig) -> list[Span]:
    """The stages of `config` one after another; they cover steps [0, config.steps) exactly."""
    spans, first = [], 0
    for index, stage in enumerate(config.stages):
        spans.append(Span(stage, index, first, first + stage.steps, config))
        first += stage.steps
    return spans


@lru_cache(maxsize=64)
def submodels(stage: Stage) -> tuple[Stage, ...]:
    """The windows that steps of `stage` can have, each as often as the others."""
    n = stage.submodel
    if n == 0:
        return (stage,)
    kept = replace(
        stage, submodel=0, grow=None, optimizer_state="copy"
    )  # what holds when a stage is entered holds once
    return tuple(replace(kept, depth=depth, train_from=depth - n) for depth in range(n, stage.depth + 1, n))


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The span that executes `step`."""
    for span in spans:
        if span.first <= step < span.last:
            return span
    raise ValueError(f"span_at: step must be in [0, {spans[-1].last}), got {step}")


def warmup_steps(config: TrainConfig) -> int:
    return config.optim.warmup or max(1, round(WARMUP_SHARE * config.steps))


def schedule(step: float, steps: float, warmup: float, constant: float = 0) -> float:
    """1/warmup, 2/warmup, ... 1 at step warmup - 1 and up to step warmup + constant, then linearly to 0 at `steps`, which is never
    executed. With a constant part it is the schedule of LANS (Zheng et al. 2020, arXiv 2006.13484), whose last step has the rate 0: the
    decay is one step later here."""
    if step < warmup:
        return (step + 1) / warmup
    if step < warmup + constant:
        return 1.0
    return (steps - step) / (steps - warmup - constant)


def on_curve(points: Sequence[Sequence[float]], step: float) -> float:
    """The height at `step` of the straight lines that join `points` (step, height)."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]


# --- cost in layer forwards (specs/common.md section 2) ---


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


# --- cost in floating-point operations of the matrix products ---


def teacher_flops(config: TrainConfig, stage: Stage, seq_len: int = 0) -> float:
    """Of the teacher's forward pass on a token, all layers at all tokens; 0 in a stage without one."""
    if stage.align.weight == 0:
        return 0.0
    shape = config.teacher_shape
    model = replace(config.model, hidden=shape.hidden, inner=shape.inner, heads=1, rank=0, score_dim=0)
    return shape.layers * _layer_flops(model, seq_len or config.data.seq_len)


def projection_shape(config: TrainConfig, stage: Stage) -> tuple[int, int] | None:
    """[teacher's hidden, hidden] of the map through which a stage's layer is compared with the teacher; None where it needs none."""
    own, theirs = stage_model(config.model, stage).hidden, config.teacher_shape.hidden
    return (theirs, own) if stage.align.weight and own != theirs else None


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


def baseline_stage(config: TrainConfig) -> Stage:
    """All layers, all parameters, all steps: what a stage's cost is compared with."""
    return Stage(steps=config.steps, depth=config.model.layers)


# --- parameters ---


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
    return 2 * _product_size(model) + I + C + 2 * C


def _product_size(model: ModelConfig) -> int:
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


def _part_flops(model: ModelConfig, S: int) -> tuple[float, float, float]:
    """Of a layer's forward on a token: the projections into attention, attention, and what comes after it."""
    C = model.hidden
    return 2.0 * C * sum(model.qkv_widths), 4.0 * S * C, 2.0 * C * C + 4.0 * _product_size(model)


def _layer_flops(model: ModelConfig, S: int) -> float:
    return sum(_part_flops(model, S))


def _head_flops(C: int, E: int, V: int, mask_rate: float) -> float:
    return mask_rate * (2.0 * C * E + 2.0 * E * V)


# --- the table ---


def cost_table(config: TrainConfig, seconds_per_step: Sequence[float] | None = None) -> str:
    """What the run will do and cost, a line a stage; with measured seconds per step (one a stage), beside them.

    `layers` is the cost of a step relative to one of the whole model (with samples of data.seq_len tokens) by `step_cost` with the head,
    `FLOPs` the same by `flops_per_token`, `share` the stage's part of all FLOPs.
    """
    spans = plan(config)
    if seconds_per_step is not None and len(seconds_per_step) != len(spans):
        raise ConfigError(
            f"cost_table: seconds_per_step must have {len(spans)} numbers, one a stage, got {len(seconds_per_step)}"
        )
    full = baseline_stage(config)
    full_flops = flops_per_token(config, full)
    flops = [span_flops(span) for span in spans]
    simple = [span_cost(span) for span in spans]
    total = sum(f * span.stage.steps for f, span in zip(flops, spans, strict=True))

    header = ["stage", "name", "steps", "depth", "train from", "trainable", "layers", "FLOPs", "share"]
    rows = []
    for span, f, cost in zip(spans, flops, simple, strict=True):
        stage = span.stage
        rows.append(
            [
                str(span.index),
                span.name,
                str(stage.steps),
                f"{stage.submodel}-{stage.depth}" if stage.submodel else str(stage.depth),
                f"top {stage.submodel}" if stage.submodel else str(stage.train_from),
                f"{trainable_parameters(config, stage):,}",
                f"{cost:.3f}",
                f"{f / full_flops:.3f}",
                f"{100 * f * stage.steps / total:.1f}%",
            ]
        )
    if seconds_per_step is not None:
        whole = [
            s
            for s, span in zip(seconds_per_step, spans, strict=True)
            if (span.stage.depth, span.stage.train_from) == (full.depth, 0)
        ]
        header += ["ms/step", "measured"]
        for row, seconds in zip(rows, seconds_per_step, strict=True):
            row += [f"{1e3 * seconds:.1f}", f"{seconds / whole[-1]:.3f}" if whole else "-"]

    if config.short_steps:
        header.insert(3, "seq len")
        for row, span in zip(rows, spans, strict=True):
            row.insert(3, "-".join(str(seq_len) for seq_len, _ in span.lengths))
    ordinary = Span(full, 0, 0, config.steps, config)  # with the same lengths
    by_layers = (
        config.steps * span_cost(ordinary) / sum(c * span.stage.steps for c, span in zip(simple, spans, strict=True))
    )
    by_flops = config.steps * span_flops(ordinary) / total
    data, lengths = config.data, []
    if config.short_steps:
        lengths = [
            f"samples of up to {data.short_seq_len} tokens in steps 0-{config.short_steps}, then of up to {data.seq_len}: "
            f"{total / sum(flops_per_token(config, s.stage) * s.stage.steps for s in spans):.2f} of the FLOPs of {data.seq_len} throughout"
        ]
    return "\n".join([
        *_aligned([header, *rows]),
        *lengths,
        *_teacher_lines(config, full_flops),
        f"predicted speed-up over training all layers for as many steps: {by_layers:.2f}x by layers (b = {BACKWARD:g}, "
        f"head = {head_cost(config.model, config.data):.3f} layer forwards), {by_flops:.2f}x by FLOPs",
        f"total: {config.steps} steps, {config.steps * config.data.batch_tokens:,} tokens, {total * config.data.batch_tokens:.2e} FLOPs",
    ])  # fmt: skip


def _teacher_lines(config: TrainConfig, full_flops: float) -> list[str]:
    shape, learning = config.teacher_shape, [stage for stage in config.stages if stage.align.weight]
    if not learning:
        return []
    steps, flops = sum(stage.steps for stage in learning), teacher_flops(config, learning[0])
    return [
        f"teacher: {shape.layers} layers, hidden {shape.hidden}, forward in {steps} steps: {flops / full_flops:.3f} of a full step's FLOPs, "
        "counted above; what its own training cost is not"
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width; names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip
