"""Attention for models of `transformers` that attend in both directions, under the name "stackbert".

The mask function and the attention function belong together: with the second alone, transformers hands every layer None for a mask and the
padding is attended to without a word. So `register` registers both, the mask function never gives None, and attention refuses it.

B sequences, S padded length, T packed tokens, H heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stackbert_kernels import ops

NAME = "stackbert"


class Padding(NamedTuple):
    """Which keys are tokens: what the mask function makes of the [B, S] mask, once a forward pass, for all layers."""

    lengths: Tensor | None = None  # [B] int32; None = no padding
    order: Tensor | None = None  # [B, S] the columns, those of tokens first; None = they are first
    place: Tensor | None = None  # [B, S] the inverse of order


def register() -> None:
    """Makes "stackbert" an `attn_implementation` of transformers, attention and mask function together. Again does no harm.

        sbk.hf.register()
        model = AutoModel.from_pretrained(path, attn_implementation="stackbert")    # or model.set_attn_implementation("stackbert")

    Padding may be anywhere; its rows of the output are zero, as with transformers' flash attention. Packed batches come as there with
    `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`. Decoders and masks that are no padding mask are a ValueError.
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"sbk.hf.register: wanted transformers 5.0 or newer, got {transformers.__version__}")
    transformers.AttentionMaskInterface.register(NAME, padding_of)
    transformers.AttentionInterface.register(NAME, attention)


def padding_of(
    batch_size: int, *lengths, attention_mask: Tensor | None = None, mask_function=None, q_length=None, kv_length=None, **rest
) -> Padding:  # fmt: skip
    """The mask function: transformers calls it once a forward pass with the bool [B, S] mask, or None."""
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not None and mask_function is not bidirectional_mask_function:
        name = getattr(mask_function, "__name__", "another")
        raise ValueError(f"stackbert attention: wanted a padding mask in both directions, got {name}")
    if q_length is not None and kv_length is not None and q_length != kv_length:
        raise ValueError(f"stackbert attention: wanted as many keys as queries, got {kv_length} and {q_length}")
    if attention_mask is None:
        return Padding()
    count = attention_mask.sum(1, dtype=torch.int32)
    if not torch.compiler.is_compiling() and _tokens_first(attention_mask, count):
        return Padding(count)
    order = torch.argsort(~attention_mask, dim=1, stable=True)
    return Padding(count, order, torch.argsort(order, dim=1))


def _tokens_first(mask: Tensor, count: Tensor) -> bool:
    """One look for all layers, in place of reordering in each; compiled code, which cannot look, reorders."""
    return bool((mask == (torch.arange(mask.shape[1], device=mask.device) < count[:, None])).all())


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Padding | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    is_causal: bool | None = None,
    **rest,
) -> tuple[Tensor, None]:
    """The attention function: query, key and value [B, H, S, D] -> ([B, S, H, D], None)."""
    if is_causal if is_causal is not None else getattr(module, "is_causal", False):
        raise ValueError(f"stackbert attention: {type(module).__name__} is causal; this attends in both directions")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {
        "dropout_p": dropout,
        "rng": torch.randint(2**62, (2,), device=q.device) if dropout else None,
        "site": getattr(module, "layer_idx", None) or 0,
        "scale": scaling,
    }
    if cu_seq_lens_q is not None:
        return _packed(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options), None
    if attention_mask is None:
        raise ValueError(
            'stackbert attention: no mask function came with it, so padding would be attended to: call sbk.hf.register(), which '
            'registers both, and pass the model its attention_mask as usual'
        )  # fmt: skip
    if not isinstance(attention_mask, Padding):
        raise ValueError(f"stackbert attention: wanted a padding mask [B, S], got {list(attention_mask.shape)}")
    padding = attention_mask
    if padding.order is None:
        return ops.attention(q, k, v, padding.lengths, **options), None
    q, k, v = (_in_order(x, padding.order) for x in (q, k, v))
    return _in_order(ops.attention(q, k, v, padding.lengths, **options), padding.place), None


def _packed(q, k, v, cu_q: Tensor, cu_k: Tensor | None, max_q, max_k, options: dict) -> Tensor:
    if q.shape[0] != 1:
        raise ValueError(f"stackbert attention: with cu_seq_lens_q the batch must be [1, T], got {q.shape[0]} rows")
    if (cu_k is not None and cu_k.shape != cu_q.shape) or (max_k is not None and max_q is not None and max_k != max_q):
        raise ValueError("stackbert attention: cu_seq_lens_k and max_length_k must be those of q")
    longest = q.shape[1] if max_q is None else int(max_q)
    return ops.attention_varlen(q[0], k[0], v[0], cu_q.to(torch.int32), longest, **options)[None]


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Each row's columns in its order. x [B, S, H, D]"""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))
