"""From padded tensors, as transformers takes them, to the packed form that the model computes on.

B sequences, S padded length, T packed tokens, R predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """The fields of a packed batch that the model reads, and where its tokens stood."""

    input_ids: Tensor  # [T] int64
    token_types: Tensor  # [T] int64
    positions: Tensor  # [T] int64, the column of each token: transformers counts padding on the left as positions too
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    masked: Tensor  # [R] int64, indices into T of the tokens with a label
    labels: Tensor  # [R] int64
    pair_labels: None
    windows: None
    places: Tensor  # [T] int64, indices into the flattened [B, S]


def pack(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, labels: Tensor | None
) -> Packed:
    """Drops the padding. Any pattern of the mask will do: left, right, holes, rows with no token. Labels at padding are not read."""
    if input_ids.dim() != 2:
        raise ValueError(f"Bert: input_ids must be [B, S], got {list(input_ids.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"Bert: {name} must be {list(input_ids.shape)} to match input_ids, got {list(tensor.shape)}"
            )
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    places = keep.flatten().nonzero().flatten()
    lengths = keep.sum(1)
    ids = input_ids.flatten().index_select(0, places).long()
    types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids.flatten().index_select(0, places).long()
    if labels is None:
        masked = targets = ids[:0]
    else:
        wanted = labels.flatten().index_select(0, places).long()
        masked = (wanted != IGNORE).nonzero().flatten()
        targets = wanted.index_select(0, masked)
    return Packed(
        input_ids=ids,
        token_types=types,
        positions=places % max(1, input_ids.shape[1]),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=int(lengths.max()) if len(lengths) else 0,
        masked=masked,
        labels=targets,
        pair_labels=None,
        windows=None,
        places=places,
    )
