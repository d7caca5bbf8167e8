"""BertModel and its kin once patched: what its attention modules need is derived here, once a forward pass, and padding is taken out and put back.

B sequences, S padded length, T packed tokens, C hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels.patch.blocks import TOKENS, SelfAttention, Tokens, positions
from stackbert_kernels.patch.swap import Swapped


class Options(NamedTuple):
    arguments: tuple[str, ...]  # of the original's forward
    unpad: bool
    count_tokens: bool  # whether positions count tokens, as RoBERTa's, or columns
    reads_first: bool  # whether a head reads the first column: what stands there must be a token


class Packed(NamedTuple):
    """A batch without its padding."""

    places: Tensor  # [T] int64, where in the flattened [B, S]
    shape: tuple[int, int]
    tokens: Tokens

    def of(self, x: Tensor | None) -> Tensor | None:
        """[B, S] or [1, S] -> [1, T]"""
        return None if x is None else x.expand(self.shape).flatten().index_select(0, self.places)[None]

    def padded(self, x: Tensor) -> Tensor:
        """[1, T, C] -> [B, S, C], zero at padding"""
        rows = x.new_zeros(self.shape[0] * self.shape[1], x.shape[-1]).index_copy(0, self.places, x[0])
        return rows.view(*self.shape, -1)


class Encoder(Swapped):
    """Attention is fused where a row has no padding, or where the padding is packed away; elsewhere it is the original's, which also
    computes what stands at padding."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *args, **kwargs):
        options: Options = self._stackbert.options
        kwargs.update(zip(options.arguments[2:], args, strict=False))
        return_dict = kwargs.pop("return_dict", None)
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        kwargs["return_dict"] = True
        like = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        packed = None
        if like is not None and self._may_fuse(like, attention_mask, kwargs):
            tokens = _unpadded(like, attention_mask)
            if tokens is None and options.unpad and input_ids is not None:
                packed = pack(attention_mask, options.reads_first)
            if tokens is not None:
                attention_mask = None
                kwargs[TOKENS] = tokens
        if packed is not None:
            outputs = self._forward_packed(packed, input_ids, kwargs)
        else:
            outputs = super().forward(input_ids, attention_mask, **kwargs)
        if like is not None and torch.is_autocast_enabled(like.device.type):
            _widen(outputs, self.embeddings.LayerNorm.weight.dtype)
        return outputs if return_dict else outputs.to_tuple()

    def _forward_packed(self, packed: Packed, input_ids: Tensor, kwargs: dict):
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = positions(self.embeddings, input_ids, self._stackbert.options.count_tokens)
        kwargs["position_ids"] = packed.of(position_ids)
        kwargs["token_type_ids"] = packed.of(kwargs.get("token_type_ids"))
        kwargs[TOKENS] = packed.tokens
        outputs = super().forward(packed.of(input_ids), None, **kwargs)
        last = outputs.last_hidden_state = packed.padded(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            states = [None if h is None else packed.padded(h) for h in outputs.hidden_states[:-1]]
            outputs.hidden_states = (*states, last if outputs.hidden_states[-1] is not None else None)
        if getattr(self, "pooler", None) is not None:
            outputs.pooler_output = self.pooler(last)  # the original saw only the first row's first token
        return outputs

    def _may_fuse(self, like: Tensor, mask: Tensor | None, kwargs: dict) -> bool:
        """Whether this call asks only for what the op does."""
        if kwargs.get("output_attentions") or (
            kwargs.get("output_attentions") is None and self.config.output_attentions
        ):
            return False
        if any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values", "cu_seq_lens_q")):
            return False
        if self.config.is_decoder or kwargs.get("is_causal") or getattr(self.config, "is_causal", False):
            return False
        if mask is not None and mask.shape != like.shape[:2]:
            return False
        return all(isinstance(attention, SelfAttention) and attention.fits() for attention in attentions(self))


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.attention.self for layer in model.encoder.layer]


def _unpadded(like: Tensor, mask: Tensor | None) -> Tokens | None:
    """The Tokens of a batch without padding, else None. One look at the mask, as transformers itself takes for sdpa; compiled code, which
    cannot look, takes every mask for padding."""
    if mask is not None and (torch.compiler.is_compiling() or not bool((mask != 0).all())):
        return None
    return Tokens(torch.full(like.shape[:1], like.shape[1], dtype=torch.int32, device=like.device))


@torch.compiler.disable
def pack(mask: Tensor, reads_first: bool) -> Packed | None:
    """None where nothing is left, or where a head would read padding, so that the original's values are wanted there."""
    keep = mask != 0
    if reads_first and not bool(keep[:, 0].all()):
        return None
    places = keep.flatten().nonzero().flatten()
    if len(places) == 0:
        return None
    cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Packed(places, tuple(keep.shape), Tokens(None, cu_seqlens, keep.shape[1]))


def _widen(outputs, dtype: torch.dtype) -> None:
    """What leaves the encoder has the dtype that it had: under autocast the original's layer norms give float32."""
    outputs.last_hidden_state = outputs.last_hidden_state.to(dtype)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(None if h is None else h.to(dtype) for h in outputs.hidden_states)
