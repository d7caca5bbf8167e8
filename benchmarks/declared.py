"""The declarations, most important first: what a benchmark that is cut short should have measured."""

from __future__ import annotations

from . import bench_layer_norm
from .harness import Bench

BENCHES: tuple[Bench, ...] = (*bench_layer_norm.BENCHES,)
