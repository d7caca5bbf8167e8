"""BERT on unpadded tokens (Devlin et al. 2018), post-LN as the original or pre-LN, with an active window of layers.

B sequences, T packed tokens, H heads, D head dim, C = H*D hidden, I inner, r rank or score_dim, E width of the embeddings (C, unless factorised), L layers, R predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels import ops
from stackbert_kernels.config import EMBEDDING_POLICIES, ModelConfig
from stackbert_kernels.model.alignment import mean_cosine
from stackbert_kernels.model.bank import Layer, LayerBank, generator_for
from stackbert_kernels.model.heads import APPROXIMATE, Affine, MlmHead, PairHead
from stackbert_kernels.model.narrow_scores import fill_heads
from stackbert_kernels.model.padded import Packed, pack
from stackbert_kernels.model.pooling import Pooled, pool

# Dropout sites (contract 3.3): 0 after the embeddings, and of layer i: 4 (i + 1) + one of these.
EMBEDDING_SITE = 0
ATTENTION_SITE, ATTENTION_OUTPUT_SITE, INNER_OUTPUT_SITE = 0, 1, 2

ENDS_OF_BRANCHES = ("out_weight", "outer_weight", "outer_expand")

FACTORS = ("inner_reduce", "inner_expand", "outer_reduce", "outer_expand")
"""Slots of a layer whose feed-forward matrices are products of rank config.rank."""


class Tokens(Protocol):
    """What the model reads of a batch; data/batches.py makes them."""

    input_ids: Tensor  # [T] int64
    token_types: Tensor  # [T] int64
    positions: Tensor  # [T] int64, inside the sequence
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    masked: Tensor  # [R] int64, indices into T of the predicted tokens
    labels: Tensor  # [R] int64
    pair_labels: Tensor | None  # [B] int64
    windows: Pooled | None  # None: the encoder reads every token


@dataclass
class Output:
    """loss = mlm_loss + pair_loss, float32 scalars, of what there were labels for. Logits only where asked for.

    alignment, minus the mean cosine between a layer's vectors and given ones, is no part of loss.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    pair_loss: Tensor | None = None
    alignment: Tensor | None = None
    logits: Tensor | None = None  # [B, S, V], zero at padding
    pair_logits: Tensor | None = None  # [B, 2], zero for a row with no token


class Bert(nn.Module):
    """Encoder, masked-LM head (tied decoder) and, by config.objective, a sentence-pair head.

    `use` sets the active window (contract 3.6); at first all layers and the embeddings learn. `impl` is handed to every op.
    All initial weights are functions of (seed, name): a layer's do not depend on how many layers there are.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        impl: str = "auto",
        rows: int | None = None,
    ):
        super().__init__()
        if config.vocab_size == 0:
            raise ValueError(
                "Bert: config.vocab_size must be > 0 (0 stands for the tokenizer's, which must be known here), got 0"
            )
        self.config, self.impl = config, impl
        self.transformers_fields: dict = {}  # of a transformers configuration, with no meaning here: kept for to_transformers
        C, E, inner = config.hidden, config.embedding_width, config.inner

        def table(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, E, device=device))

        self.word, self.position, self.token_type = (
            table(config.vocab_size),
            table(config.max_position),
            table(config.token_types),
        )
        self.embedding_norm = Affine((E,), E, device)
        self.embedding_map = Affine((C, E), C, device) if config.embedding else None
        feed_forward = {"inner_weight": (inner, C), "outer_weight": (C, inner)}
        if config.rank:  # expand @ reduce is the matrix of a whole layer
            feed_forward = {"inner_reduce": (config.rank, C), "inner_expand": (inner, config.rank)} | {
                "outer_reduce": (config.rank, inner), "outer_expand": (C, config.rank)}  # fmt: skip
        qkv = sum(config.qkv_widths)
        self.bank = LayerBank(
            config.layers if rows is None else rows,
            {"qkv_weight": (qkv, C), "out_weight": (C, C)} | feed_forward,
            {"qkv_bias": (qkv,), "out_bias": (C,), "inner_bias": (inner,), "outer_bias": (C,)}
            | {"norm1_weight": (C,), "norm1_bias": (C,), "norm2_weight": (C,), "norm2_bias": (C,)},
            device=device,
        )
        self.final_norm = Affine((C,), C, device) if config.norm == "pre" else None
        self.mlm = MlmHead(C, E, config.vocab_size, config.activation, config.norm_eps, device)
        self.pair = None if config.objective == "mlm" else PairHead(C, device)
        self.register_parameter("projection", None)
        self.register_buffer("word_before", None, persistent=False)
        if self.word.device.type != "meta":  # there a model has shapes only
            self._initialise(seed)
        depth = config.layers
        self.use(depth, rows=() if len(self.bank) == depth else tuple(min(i, len(self.bank) - 1) for i in range(depth)))

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for row in range(len(self.bank)):
            self.initialise_row(row, seed)
        if self.config.equal_init:
            self.bank.weights[1:] = self.bank.weights[0]
        for name, parameter in self.always_on_parameters().items():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif parameter.dim() == 2:
                generator = generator_for(seed, name)
                parameter.copy_(torch.empty(parameter.shape).normal_(0, self.config.init_std, generator=generator))

    @torch.no_grad()
    def initialise_row(self, row: int, seed: int) -> None:
        """The initial weights of a layer, a function of (seed, row) alone."""
        self.bank.initialise(row, seed, self.config.init_std)
        for slot in self.bank.layout:
            if slot.name in FACTORS:  # equally large ones, so that their product is as large as a whole matrix
                slot.view(self.bank.weights[row]).mul_((self.config.init_std * self.config.rank**0.5) ** -0.5)
        if self.config.scaled_init:
            for slot in self.bank.layout:
                if slot.name in ENDS_OF_BRANCHES:
                    slot.view(self.bank.weights[row]).mul_((2 * self.config.layers) ** -0.5)

    # ---- what learns

    def use(
        self,
        depth: int,
        train_from: int = 0,
        embeddings: str = "train",
        frozen_dropout: bool = True,
        rows: tuple[int, ...] = (),
        ffn_rows: tuple[int, ...] = (),
        retie: str = "decoder",
    ) -> None:
        """Sets a stage: layers [0, depth) run, [train_from, depth) and the heads learn, the embeddings by policy (config.Stage).

        Layer i reads row rows[i] of the bank, its feed-forward half ffn_rows[i]; by default its own, and the same.

        Without frozen_dropout nothing below train_from has dropout, the embeddings' included.
        Leaving "untie", the word embedding takes the values that the decoder's private copy has learned, or with retie "mean" the mean
        of these and its own. Entering "output_grad", it is copied (`word_before`) so that `word_drift` can tell how far it has gone.
        Gradients of layers start at zero.
        """
        layers = self.config.layers
        if not 1 <= depth <= layers or not 0 <= train_from < depth:
            raise ValueError(
                f"Bert.use: wanted 0 <= train_from < depth <= {layers}, got train_from {train_from}, depth {depth}"
            )
        if embeddings not in EMBEDDING_POLICIES:
            raise ValueError(f"Bert.use: embeddings must be one of {', '.join(EMBEDDING_POLICIES)}, got {embeddings!r}")
        if train_from > 0 and embeddings == "train":
            raise ValueError(
                f"Bert.use: embeddings cannot be 'train' where train_from is {train_from}: the boundary is detached"
            )
        self.depth, self.train_from, self.embeddings, self.frozen_dropout = (
            depth,
            train_from,
            embeddings,
            frozen_dropout,
        )
        self.rows = tuple(rows) or tuple(range(depth))
        self.ffn_rows = tuple(ffn_rows) or self.rows
        if len(self.rows) != depth or len(self.ffn_rows) != depth or self.bank_rows > len(self.bank):
            raise ValueError(
                f"Bert.use: rows must name one of {len(self.bank)} rows for each of {depth} layers, got {self.rows} and {self.ffn_rows}"
            )
        self.bank.set_window(train_from, self.bank_rows)

        learn = embeddings in ("train", "full")
        below = [self.position, self.token_type, *self.embedding_norm.parameters()]
        below += [] if self.embedding_map is None else self.embedding_map.parameters()
        for parameter in below:
            parameter.requires_grad_(learn)
        self.word.requires_grad_(learn or embeddings == "output_grad")
        if embeddings == "untie":
            if self.mlm.decoder is None:
                self.mlm.decoder = nn.Parameter(self.word.detach().clone())
        elif self.mlm.decoder is not None:
            with torch.no_grad():
                self.word.copy_(self.mlm.decoder if retie == "decoder" else (self.word + self.mlm.decoder) / 2)
            self.mlm.decoder = None
        if embeddings != "output_grad":
            self.word_before = None
        elif self.word_before is None:
            self.word_before = self.word.detach().clone()
        for parameter in self.always_on_parameters().values():
            if not parameter.requires_grad:
                parameter.grad = None

    @torch.no_grad()
    def project_to(self, width: int, seed: int = 0) -> None:
        """Makes `projection` [width, C], through which a layer's vectors are compared with others of that width, a parameter that learns
        like the heads; none for 0 or for the hidden size itself. One of the right shape stays as it is."""
        C = self.config.hidden
        if width in (0, C):
            self.projection = None
        elif self.projection is None or self.projection.shape != (width, C):
            generator = generator_for(seed, "projection")
            drawn = torch.empty(width, C).normal_(0, self.config.init_std, generator=generator)
            self.projection = nn.Parameter(drawn.to(self.word))

    def word_drift(self) -> float | None:
        """How far the word embedding, the input of frozen layers, has gone since it began to learn from the decoder alone, as a share of its
        norm then; None where it does not."""
        if self.word_before is None:
            return None
        return float((self.word.detach() - self.word_before).norm() / self.word_before.norm())

    @property
    def bank_rows(self) -> int:
        """The layers in use read rows [0, bank_rows) of the bank."""
        return max(self.rows + self.ffn_rows) + 1

    def always_on_parameters(self) -> dict[str, nn.Parameter]:
        """Embeddings and heads, by name; requires_grad says which of them learn in this stage."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("bank.")}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.bank.zero_grad()
        for parameter in self.always_on_parameters().values():
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad = torch.zeros_like(parameter.grad)

    # ---- the encoder

    def encode(
        self,
        batch: Tokens,
        *,
        rng: Tensor | None = None,
        rows: Tensor | None = None,
        dropout: bool | None = None,
        gates: Sequence[float] | None = None,
        taps: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """The encoder's output [T, C], or only its `rows` [n, C]: indices into T, where alone the last layer is then computed.

        Of a batch with windows, T are the rows of its pooled stream.

        With `rows`, the masks of the last layer's row ops have row numbers of the gathered tensor as coordinates.
        dropout None = as self.training says. `gates`, one a layer: what a pre-norm layer's residual branches are multiplied by; a layer
        whose gate is 0 is left out. `taps` is filled with the outputs [T, C] of the layers that are its keys, counted from 1, of those
        that learn; where the last is one of them, it is computed everywhere.
        """
        self._check(batch)
        taps = {} if taps is None else taps
        if any(not self.train_from < layer <= self.depth for layer in taps):
            raise ValueError(
                f"Bert: taps must name layers that learn, of {self.train_from + 1} to {self.depth}, got {sorted(taps)}"
            )
        dropout = self.training if dropout is None else dropout
        if rng is None and dropout and max(self.config.dropout, self.config.attention_dropout) > 0:
            raise ValueError("Bert: rng must be given in training with dropout (ops.new_rng(seed, step)), got None")
        if gates is not None and (self.config.norm != "pre" or len(gates) != self.depth):
            raise ValueError(
                f"Bert: gates must be one for each of {self.depth} layers of a pre-norm encoder, got {len(gates)} with norm "
                f"{self.config.norm!r}"
            )
        learn = torch.is_grad_enabled()
        if learn:
            self.bank.reattach()
        # Below the window nothing is saved for a backward pass, and nothing above can pull autograd through it.
        dropout_below = dropout and (self.frozen_dropout or self.train_from == 0)
        with torch.set_grad_enabled(learn and self.embeddings in ("train", "full")):
            x = self._embed(batch, dropout_below, rng)
            stream = _stream(batch)
            if stream is not batch:
                x = pool(x, stream)
            for i in range(self.train_from):
                x = self._layer(i, x, stream, dropout_below, rng)
        last = None if self.depth in taps else rows
        for i in range(self.train_from, self.depth):
            only, gate = last if i == self.depth - 1 else None, 1.0 if gates is None else gates[i]
            if gate == 0.0:
                x = x if only is None else x.index_select(0, only)
            else:
                x = self._layer(i, x, stream, dropout, rng, only, gate)
            if i + 1 in taps:
                taps[i + 1] = x
        if rows is not None and last is None:
            x = x.index_select(0, rows)
        if self.final_norm is not None:
            x = ops.layer_norm(x, self.final_norm.weight, self.final_norm.bias, self.config.norm_eps, impl=self.impl)
        return x

    def _embed(self, batch: Tokens, dropout: bool, rng: Tensor | None) -> Tensor:
        kind = batch.input_ids.device.type
        x = ops.embedding_layer_norm(
            batch.input_ids, batch.positions, batch.token_types, self.word, self.position, self.token_type,
            self.embedding_norm.weight, self.embedding_norm.bias, dropout_p=self.config.dropout if dropout else 0.0,
            rng=rng, site=EMBEDDING_SITE, eps=self.config.norm_eps,
            # the stream between layers keeps the matrix products' dtype
            dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, impl=self.impl,
        )  # fmt: skip
        if self.embedding_map is None:
            return x
        return F.linear(x, self.embedding_map.weight, self.embedding_map.bias)  # [T, E] -> [T, C]

    def _layer(
        self,
        i: int,
        x: Tensor,
        stream: Tokens | Pooled,
        dropout: bool,
        rng: Tensor | None,
        rows: Tensor | None = None,
        gate: float = 1.0,
    ) -> Tensor:
        """x [T, C] -> [T, C], or [n, C] at `rows`."""
        w: Layer = self.bank.layers[self.rows[i]]
        f: Layer = self.bank.layers[self.ffn_rows[i]]
        p = self.config.dropout if dropout else 0.0
        eps, impl, site = self.config.norm_eps, self.impl, 4 * (i + 1)
        pre = self.config.norm == "pre"

        h = ops.layer_norm(x, w.norm1_weight, w.norm1_bias, eps, impl=impl) if pre else x
        qkv = F.linear(h, w.qkv_weight, w.qkv_bias)
        narrow = self.config.score_dim
        heads = self.config.heads, self.config.head_dim
        attention = ops.attention_qkv_varlen(
            fill_heads(qkv, *heads, narrow) if narrow else qkv.view(len(h), 3, *heads),
            stream.cu_seqlens,
            stream.max_seqlen,
            dropout_p=self.config.attention_dropout if dropout else 0.0,
            rng=rng,
            site=site + ATTENTION_SITE,
            scale=narrow**-0.5 if narrow else None,
            impl=impl,
        ).view(len(h), -1)
        if rows is not None:
            attention, x = attention.index_select(0, rows), x.index_select(0, rows)
        out = F.linear(attention, w.out_weight)

        def join(y: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, place: int) -> Tensor:
            if pre:
                if gate != 1.0:
                    y, bias = y * gate, bias * gate
                return ops.dropout_add(y, residual, x_bias=bias, dropout_p=p, rng=rng, site=site + place, impl=impl)
            return ops.dropout_add_layer_norm(
                y, residual, weight, norm_bias, x_bias=bias, dropout_p=p, rng=rng, site=site + place, eps=eps, impl=impl
            )

        x = join(out, x, w.out_bias, w.norm1_weight, w.norm1_bias, ATTENTION_OUTPUT_SITE)
        h = ops.layer_norm(x, f.norm2_weight, f.norm2_bias, eps, impl=impl) if pre else x
        low = self.config.rank > 0
        h = F.linear(F.linear(h, f.inner_reduce), f.inner_expand) if low else F.linear(h, f.inner_weight)
        h = ops.bias_gelu(h, f.inner_bias, approximate=APPROXIMATE[self.config.activation], impl=impl)
        h = F.linear(F.linear(h, f.outer_reduce), f.outer_expand) if low else F.linear(h, f.outer_weight)
        return join(h, x, f.outer_bias, f.norm2_weight, f.norm2_bias, INNER_OUTPUT_SITE)

    def _check(self, batch: Tokens) -> None:
        tokens = batch.input_ids.shape
        for name, tensor in (("token_types", batch.token_types), ("positions", batch.positions)):
            if len(tokens) != 1 or tensor.shape != tokens:
                raise ValueError(f"Bert: input_ids and {name} must be [T], got {list(tokens)} and {list(tensor.shape)}")
        if batch.masked.shape != batch.labels.shape:
            raise ValueError(
                f"Bert: labels must be {list(batch.masked.shape)} to match masked, got {list(batch.labels.shape)}"
            )
        self._check_length(batch.max_seqlen)
        if batch.input_ids.device.type == "cpu":  # elsewhere a look at the values would wait for the device
            self._check_values(batch)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position:
            raise ValueError(
                f"Bert: a sequence must fit max_position {self.config.max_position}, got one of {length} tokens"
            )

    def _check_values(self, batch: Tokens) -> None:
        for name, tensor, rows in (
            ("input_ids", batch.input_ids, self.config.vocab_size),
            ("token_types", batch.token_types, self.config.token_types),
            ("positions", batch.positions, self.config.max_position),
        ):
            low, high = (int(value) for value in tensor.aminmax()) if len(tensor) else (0, 0)
            if low < 0 or high >= rows:
                raise ValueError(f"Bert: {name} must be in [0, {rows}), got {low if low < 0 else high}")

    # ---- losses

    @property
    def decoder(self) -> Tensor:
        """[V, E]: the word embedding, or the private copy of a stage that unties it."""
        return self.word if self.mlm.decoder is None else self.mlm.decoder

    def forward(
        self,
        batch: Tokens | None = None,
        *,
        rng: Tensor | None = None,
        gates: Sequence[float] | None = None,
        align: tuple[int, Tensor] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = False,
    ) -> Output:
        """Losses of a packed batch; or, as in transformers, of padded input_ids [B, S] (attention_mask: 1 = a token; labels: -100 =
        not predicted; the loss is the mean over the others), with logits [B, S, V] on request.

        gates, of a packed batch: as in `encode`. align, of a packed batch: a layer, counted from 1, and vectors [T, W] that its output,
        through `projection` where there is one, is compared with. rng is needed in training with dropout; the padded form draws one from
        torch's generator if none is given.
        """
        if (batch is None) == (input_ids is None):
            raise ValueError(
                "Bert: wanted either a batch or input_ids=, got " + ("neither" if batch is None else "both")
            )
        if batch is not None:
            return self._losses(batch, rng, gates, align)
        if rng is None and self.training:
            rng = torch.randint(0, 2**62, (2,), dtype=torch.int64).to(input_ids.device)
        packed = pack(input_ids, attention_mask, token_type_ids, labels)
        self._check_length(input_ids.shape[1])
        self._check_values(packed)  # on any device: packing has waited for it already
        if not return_logits:
            return self._losses(packed, rng) if labels is not None else Output()
        return self._logits(packed, input_ids.shape, rng, labels is not None)

    def _losses(
        self,
        batch: Tokens,
        rng: Tensor | None,
        gates: Sequence[float] | None = None,
        align: tuple[int, Tensor] | None = None,
    ) -> Output:
        predicted, stream = len(batch.masked), _stream(batch)
        rows = stream.masked
        pair = self.pair is not None and batch.pair_labels is not None
        if pair:
            rows = torch.cat([rows, stream.cu_seqlens[:-1]])  # [CLS] is the first token of its sequence
        taps = None if align is None else {align[0]: None}
        x = self.encode(batch, rng=rng, rows=rows, gates=gates, taps=taps)
        loss = mlm = self._mlm_loss(x[:predicted], batch.labels)
        pair_loss = None
        if pair:
            pair_loss = F.cross_entropy(self.pair(x[predicted:]), batch.pair_labels)
            loss = mlm + pair_loss
        return Output(loss, mlm, pair_loss, None if align is None else self._alignment(taps[align[0]], align[1]))

    def _alignment(self, x: Tensor, target: Tensor) -> Tensor:
        return -mean_cosine(x if self.projection is None else F.linear(x, self.projection), target)

    def _mlm_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return ops.masked_lm_loss(
            self.mlm.features(hidden, self.impl), self.decoder, self.mlm.bias, labels, impl=self.impl
        )

    def _logits(self, batch: Packed, shape: torch.Size, rng: Tensor | None, with_loss: bool) -> Output:
        """For callers who want them: all logits of all tokens."""
        x = self.encode(batch, rng=rng)
        logits = F.linear(self.mlm.features(x, self.impl), self.decoder, self.mlm.bias.to(x.dtype))
        output = Output(
            logits=logits.new_zeros(shape.numel(), logits.shape[1]).index_copy(0, batch.places, logits).view(*shape, -1)
        )
        if self.pair is not None:
            lengths = batch.cu_seqlens.diff()
            rows = lengths.nonzero().flatten()
            pair = self.pair(x.index_select(0, batch.cu_seqlens[:-1].index_select(0, rows)))
            output.pair_logits = pair.new_zeros(len(lengths), 2).index_copy(0, rows, pair)
        if with_loss:
            output.loss = output.mlm_loss = self._mlm_loss(x.index_select(0, batch.masked), batch.labels)
        return output

    @torch.no_grad()
    def evaluate(self, batch: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the masked-LM losses, how many predictions are right, how many there are; without dropout."""
        hidden = self.mlm.features(self.encode(batch, rows=_stream(batch).masked, dropout=False), self.impl)
        return ops.masked_lm_predictions(hidden, self.decoder, self.mlm.bias, batch.labels, impl=self.impl)


def _stream(batch: Tokens) -> Tokens | Pooled:
    """What the encoder's layers read: the tokens, or where these are pooled, what they become."""
    return batch if batch.windows is None else batch.windows
