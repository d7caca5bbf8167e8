"""The fused ops. Each is a folder: op.py (contract, checks, registration, the public function), reference.py, native.py.

`impl="auto"` takes native, else triton, else reference; `explain(op, *tensors)` says which and why.
"""

from __future__ import annotations

from torch import Tensor

from stackbert_kernels.ops._library import Explanation, Op
from stackbert_kernels.ops.attention.op import OP as ATTENTION
from stackbert_kernels.ops.attention.op import attention, attention_qkv_varlen, attention_varlen
from stackbert_kernels.ops.dropout.op import OP as DROPOUT
from stackbert_kernels.ops.dropout.op import dropout
from stackbert_kernels.ops.duplicate_layers.op import OP as DUPLICATE_LAYERS
from stackbert_kernels.ops.duplicate_layers.op import duplicate_banks_, duplicate_layers_
from stackbert_kernels.ops.embedding.op import OP as EMBEDDING_LAYER_NORM
from stackbert_kernels.ops.embedding.op import embedding_layer_norm
from stackbert_kernels.ops.gelu.op import OP as BIAS_GELU
from stackbert_kernels.ops.gelu.op import bias_gelu
from stackbert_kernels.ops.layer_norm.op import (
    DROPOUT_ADD,
    DROPOUT_ADD_LAYER_NORM,
    LAYER_NORM,
    dropout_add,
    dropout_add_layer_norm,
    layer_norm,
)
from stackbert_kernels.ops.masked_lm_loss.op import OP as MASKED_LM_LOSS
from stackbert_kernels.ops.masked_lm_loss.op import masked_lm_loss, masked_lm_predictions
from stackbert_kernels.ops.optimizer.op import LAMB, LANS, adamw_, global_norm, lamb_, lans_
from stackbert_kernels.ops.optimizer.op import NORM as GLOBAL_NORM
from stackbert_kernels.ops.optimizer.op import OP as ADAMW
from stackbert_kernels.ops.philox import new_rng

OPS: tuple[Op, ...] = (
    EMBEDDING_LAYER_NORM,
    ATTENTION,
    LAYER_NORM,
    DROPOUT_ADD_LAYER_NORM,
    DROPOUT_ADD,
    BIAS_GELU,
    DROPOUT,
    MASKED_LM_LOSS,
    DUPLICATE_LAYERS,
    ADAMW,
    LAMB,
    LANS,
    GLOBAL_NORM,
)


def available() -> dict[str, dict[str, list[str]]]:
    """{op: {device: [implementation, ...]}}, best first."""
    return {op.name: op.available() for op in OPS}


def explain(op: str, *tensors: Tensor) -> Explanation:
    """Which implementation `impl="auto"` takes for these tensors, and why not the others."""
    for candidate in OPS:
        if candidate.name == op:
            return candidate.explain(*tensors)
    raise ValueError(f"explain: op must be one of {', '.join(o.name for o in OPS)}, got {op!r}")


__all__ = [
    "Explanation",
    "adamw_",
    "attention",
    "attention_qkv_varlen",
    "attention_varlen",
    "available",
    "bias_gelu",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "duplicate_banks_",
    "duplicate_layers_",
    "embedding_layer_norm",
    "explain",
    "global_norm",
    "lamb_",
    "lans_",
    "layer_norm",
    "masked_lm_loss",
    "masked_lm_predictions",
    "new_rng",
]
