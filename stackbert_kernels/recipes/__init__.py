"""Training methods: a file each, a function from a base configuration to one with stages, the paper in its docstring.

What a method may decide, and where each decision is carried out, so that the loop knows no method by name:

    how deep, which layers learn      Stage.depth, .train_from, .embeddings: the active window, set by model.use
    how new layers begin              Stage.grow: a map of the bank's rows (growth/), applied to weights and moments alike
    which layers share weights        Stage.rows: the row of the bank that each layer reads; unsharing is a growth at equal depth
    which layers a step leaves out    Stage.drop: plan.Span.gates, a function of the seed and the step
    a finished model as a teacher     Stage.align, with TrainConfig.teacher (train/teacher.py): plan.Span.pull, a function of the step alone
    a smaller model's weights         Stage.grow of the first stage, with TrainConfig.source (growth/source.py)
    another shape in a stage          Stage.hidden, .heads, .inner, .depth: a new model and optimizer, by maps of their axes
    less in a layer in a stage        Stage.rank, .score_dim: a model with other slots in its bank, made whole by growth/refine.py
    a shorter stream for the encoder  Stage.pool, .pool_kind: windows of tokens, made beside the batches (data/windows.py)
    a window that moves each step     Stage.submodel: plan.Span.at, a function of seed and step
    the rate                          Stage.lr_policy, .lr_curve, .rewarm: plan.Span.lr, a function of the step alone
    the optimizer's state             Stage.optimizer_state: copied by the same map, zero, or reset
    another shape for the whole run   the recipe replaces fields of base.model, and says so in its docstring
"""

from __future__ import annotations

from stackbert_kernels.recipes.albert import AlbertOptions, albert
from stackbert_kernels.recipes.auto import AutoOptions, auto
from stackbert_kernels.recipes.baseline import BaselineOptions, baseline
from stackbert_kernels.recipes.bert2bert import Bert2bertOptions, bert2bert
from stackbert_kernels.recipes.compound_grow import CompoundGrowOptions, compound_grow
from stackbert_kernels.recipes.core import CoreOptions, core
from stackbert_kernels.recipes.incremental import IncrementalOptions, incremental
from stackbert_kernels.recipes.late_to_early import LateToEarlyOptions, late_to_early
from stackbert_kernels.recipes.mslt import MsltOptions, mslt
from stackbert_kernels.recipes.multi_level import MultiLevelOptions, multi_level
from stackbert_kernels.recipes.progressive_layer_dropping import (
    ProgressiveLayerDroppingOptions,
    progressive_layer_dropping,
)
from stackbert_kernels.recipes.share_then_unshare import ShareThenUnshareOptions, share_then_unshare
from stackbert_kernels.recipes.stacking import StackingOptions, stacking

RECIPES = {
    "baseline": (baseline, BaselineOptions),
    "mslt": (mslt, MsltOptions),
    "stacking": (stacking, StackingOptions),
    "incremental": (incremental, IncrementalOptions),
    "share_then_unshare": (share_then_unshare, ShareThenUnshareOptions),
    "albert": (albert, AlbertOptions),
    "progressive_layer_dropping": (progressive_layer_dropping, ProgressiveLayerDroppingOptions),
    "bert2bert": (bert2bert, Bert2bertOptions),
    "multi_level": (multi_level, MultiLevelOptions),
    "core": (core, CoreOptions),
    "compound_grow": (compound_grow, CompoundGrowOptions),
    "late_to_early": (late_to_early, LateToEarlyOptions),
    "auto": (auto, AutoOptions),
}
"""What --recipe accepts: the function, called as function(base, options), and the class of its options."""
NEED_SOURCE = ("bert2bert",)
"""Those that begin from TrainConfig.source."""
NEED_TEACHER = ("late_to_early",)
"""Those that learn from TrainConfig.teacher."""

__all__ = ["NEED_SOURCE", "NEED_TEACHER", "RECIPES", "AlbertOptions", "AutoOptions", "BaselineOptions", "Bert2bertOptions", "CompoundGrowOptions", "CoreOptions", "IncrementalOptions", "LateToEarlyOptions", "MsltOptions", "MultiLevelOptions",
           "ProgressiveLayerDroppingOptions", "ShareThenUnshareOptions", "StackingOptions", "albert", "auto", "baseline", "bert2bert", "compound_grow", "core",
           "incremental", "late_to_early", "mslt", "multi_level", "progressive_layer_dropping", "share_then_unshare", "stacking"]  # fmt: skip
