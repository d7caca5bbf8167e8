"""The declarations, most important first: what a benchmark that is cut short should have measured."""

from __future__ import annotations

from . import (
    bench_attention,
    bench_dropout,
    bench_duplicate_layers,
    bench_embedding,
    bench_gelu,
    bench_layer_norm,
    bench_masked_lm_loss,
    bench_optimizer,
)
from .harness import Bench

BENCHES: tuple[Bench, ...] = (
    *bench_attention.BENCHES,
    bench_layer_norm.DROPOUT_ADD_LAYER_NORM,
    *bench_masked_lm_loss.BENCHES,
    *bench_gelu.BENCHES,
    *bench_optimizer.BENCHES,
    *bench_duplicate_layers.BENCHES,
    *bench_embedding.BENCHES,
    bench_layer_norm.LAYER_NORM,
    bench_layer_norm.DROPOUT_ADD,
    *bench_dropout.BENCHES,
)
