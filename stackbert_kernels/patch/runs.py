"""Which implementation of an op would run: for the report, and to leave alone what would only run the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels import ops


def runs(op: str, *shapes: tuple[int, ...], like: Tensor) -> tuple[str | None, str]:
    """("op (native)", "") or (None, why). Autocast may give float32 parameters bfloat16 activations."""
    why = ""
    for dtype in dict.fromkeys((like.dtype, torch.bfloat16 if like.dtype == torch.float32 else like.dtype)):
        explained = ops.explain(op, *(like.new_empty(shape, dtype=dtype) for shape in shapes))
        if explained.chosen != "reference":
            return f"{op} ({explained.chosen})", ""
        why = why or "; ".join(explained.why_not.values())
    return None, f"only its reference would run: {why}"
