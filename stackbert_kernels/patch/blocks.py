"""The blocks of transformers' BERT family with fused ops: what BertSelfAttention, BertSelfOutput, BertOutput, BertIntermediate,
BertEmbeddings, their kin, and the transform of the masked-LM head run once they are patched.

Each does what its original does, to rounding, and calls that where an op would not: where a submodule was wrapped or replaced, say.
B sequences, S padded length, T packed tokens, H heads, D head dimension, C hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels import ops
from stackbert_kernels.patch.plain import dropout_p, linear, new_rng, plain, plain_norm, realised, taken
from stackbert_kernels.patch.swap import Swapped

TOKENS = "stackbert_tokens"  # the keyword under which the encoder's `Tokens` travel to its attention modules


class Tokens(NamedTuple):
    """Which tokens see each other; derived once a forward pass, by encoder.py."""

    lengths: Tensor | None  # [B] int32 of padded hidden states [B, S, C]
    cu_seqlens: Tensor | None = None  # [B + 1] int32 of packed ones [1, T, C]
    max_seqlen: int = 0


class SelfAttention(Swapped):
    """query, key, value, and ops.attention between them. Without `Tokens` among the arguments it is the original: the encoder gives none
    where a call asks for what the op does not do."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        tokens: Tokens | None = kwargs.pop(TOKENS, None)
        if tokens is None:
            return super().forward(hidden_states, *args, **kwargs)
        heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q, k, v = (project(hidden_states).view(heads) for project in (self.query, self.key, self.value))
        p = self.dropout.p if self.training else 0.0
        options = {"dropout_p": p, "rng": new_rng(p, q), "site": self._stackbert.site, "scale": self.scaling}
        if tokens.cu_seqlens is None:
            out = ops.attention(q, k, v, tokens.lengths, **options)  # [B, S, H, D]
        else:
            out = ops.attention_varlen(q[0], k[0], v[0], tokens.cu_seqlens, tokens.max_seqlen, **options)[None]
        return out.flatten(-2), None

    def fits(self) -> bool:
        """Whether the op can do what this module is set to now."""
        return (
            not self.is_decoder
            and not self.is_causal
            and realised(self.dropout.p if self.training else 0.0) is not None
        )


class AddNorm(Swapped):
    """BertSelfOutput and BertOutput: LayerNorm(input + dropout(dense(x)))."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        p, norm = dropout_p(self.dropout), self.LayerNorm
        if p is None or not plain_norm(norm):
            return super().forward(hidden_states, input_tensor)
        x, bias = linear(self.dense, hidden_states)
        x = x.to(input_tensor.dtype)
        return ops.dropout_add_layer_norm(
            x, input_tensor, taken(norm.weight, x), taken(norm.bias, x), x_bias=None if bias is None else taken(bias, x),
            dropout_p=p, rng=new_rng(p, x), site=self._stackbert.site, eps=norm.eps,
        )  # fmt: skip


def approximation(activation: object) -> str | None:
    """The argument of ops.bias_gelu that does what this activation does; None if it is no GELU."""
    if activation is F.gelu:
        return "none"
    if type(activation) is nn.GELU:
        return activation.approximate
    cls = type(activation)
    return OF_TRANSFORMERS.get(cls.__name__) if cls.__module__ == "transformers.activations" else None


OF_TRANSFORMERS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "FastGELUActivation": "tanh",
}


def dense_gelu(dense: nn.Module, activation: object, x: Tensor) -> Tensor | None:
    """activation(dense(x)), fused; None where that would not be the same."""
    approximate = approximation(activation)
    if approximate is None or not plain(dense, nn.Linear) or dense.bias is None:
        return None
    y = F.linear(x, dense.weight)
    return ops.bias_gelu(y, taken(dense.bias, y), approximate=approximate)


class Intermediate(Swapped):
    """BertIntermediate: gelu(dense(x))."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = dense_gelu(self.dense, self.intermediate_act_fn, hidden_states)
        return super().forward(hidden_states) if y is None else y


class Transform(Swapped):
    """What stands before a masked-LM decoder: norm(gelu(dense(x))); `options` are the names of dense, activation and norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.features(hidden_states)

    def features(self, x: Tensor) -> Tensor:
        dense, norm = getattr(self, self._stackbert.options[0]), getattr(self, self._stackbert.options[2])
        activation = getattr(self, self._stackbert.options[1], F.gelu)  # RoBERTa's is no module
        y = dense_gelu(dense, activation, x) if "gelu" in self._stackbert.parts else None
        y = activation(dense(x)) if y is None else y
        if "add_norm" in self._stackbert.parts and plain_norm(norm):
            return ops.layer_norm(y, taken(norm.weight, y), taken(norm.bias, y), norm.eps)
        return norm(y)


class Head(Transform):
    """RobertaLMHead: the same, and the decoder."""

    def forward(self, features: Tensor, **kwargs) -> Tensor:
        return self.decoder(self.features(features))


def plain_embedding(table: object) -> bool:
    return plain(table, nn.Embedding) and table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


class Embeddings(Swapped):
    """BertEmbeddings: dropout(LayerNorm(word + position + token type)). `options`: whether positions count tokens, as RoBERTa's, or
    columns."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        word, position, token_type = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        p, norm = dropout_p(self.dropout), self.LayerNorm
        fits = p is not None and plain_norm(norm) and all(plain_embedding(t) for t in (word, position, token_type))
        if inputs_embeds is not None or not fits:
            return super().forward(
                input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids,
                inputs_embeds=inputs_embeds, past_key_values_length=past_key_values_length,
            )  # fmt: skip
        shape = input_ids.shape
        if position_ids is None:
            position_ids = positions(self, input_ids, self._stackbert.options, past_key_values_length)
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[0][position_ids]
        kind = word.weight.device.type
        return ops.embedding_layer_norm(
            input_ids.long(), position_ids.long().expand(shape), token_type_ids.long().expand(shape),
            *(_without_padding_gradient(table) for table in (word, position, token_type)),
            taken(norm.weight, word.weight), taken(norm.bias, word.weight), dropout_p=p, rng=new_rng(p, word.weight), site=self._stackbert.site, eps=norm.eps,
            # between the layers autocast keeps the dtype of the matrix products, as the ops do their sums in float32
            dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )  # fmt: skip


def positions(embeddings: nn.Module, input_ids: Tensor, count_tokens: bool, past: int = 0) -> Tensor:
    """[B, S], or [1, S] where they are the same in each row."""
    if not count_tokens:
        return embeddings.position_ids[:, past : past + input_ids.shape[1]]
    token = input_ids.ne(embeddings.padding_idx)
    return (token.cumsum(1) + past) * token + embeddings.padding_idx


class _WithoutRow(torch.autograd.Function):
    """The table itself; its gradient has zeros in one row."""

    @staticmethod
    def forward(ctx, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.compiler.is_compiling():
            return gradient.index_fill(0, torch.tensor([ctx.row], device=gradient.device), 0.0), None
        gradient[ctx.row] = 0.0  # in place: it was made for this table alone, and a copy of BERT's is 94 MB
        return gradient, None


def _without_padding_gradient(table: nn.Embedding) -> Tensor:
    """nn.Embedding gives the row of padding_idx no gradient; a decoder tied to the table still does."""
    if table.padding_idx is None or not (table.weight.requires_grad and torch.is_grad_enabled()):
        return table.weight
    return _WithoutRow.apply(table.weight, table.padding_idx)
