"""What a run is: frozen dataclasses, checked where they are built. Field names are the names of the command line's options.

    sections   the model, the text, the optimizer
    stage      a stretch of steps, by itself
    sequence   what must hold between stages
    run        all of it
    plain      as JSON and back; what differs

Nothing here imports torch: a wrong option is refused before anything slow is loaded.
"""

from __future__ import annotations

from stackbert_kernels.config.checks import ConfigError
from stackbert_kernels.config.plain import MAY_CHANGE_ON_RESUME, differences, from_dict, to_dict
from stackbert_kernels.config.run import TeacherShape, TrainConfig
from stackbert_kernels.config.sections import OBJECTIVES, DataConfig, ModelConfig, OptimConfig
from stackbert_kernels.config.sequence import (
    FROM_SOURCE,
    GROWTH_OPERATORS,
    LEVELS,
    REFINE,
    RESHAPES,
    UNSHARE,
    WIDEN,
    check_coalescing,
    check_growth,
    check_unsharing,
    stage_model,
)
from stackbert_kernels.config.stage import (
    EMBEDDING_POLICIES,
    LAYER_GROUPS,
    LR_POLICIES,
    OPTIMIZER_STATES,
    POOL_KINDS,
    RETIES,
    SHARED_GRADIENTS,
    WIDTH_MAPS,
    Alignment,
    LayerDrop,
    Stage,
    Untying,
)

__all__ = [
    "EMBEDDING_POLICIES",
    "FROM_SOURCE",
    "GROWTH_OPERATORS",
    "LAYER_GROUPS",
    "LEVELS",
    "LR_POLICIES",
    "MAY_CHANGE_ON_RESUME",
    "OBJECTIVES",
    "OPTIMIZER_STATES",
    "POOL_KINDS",
    "REFINE",
    "RESHAPES",
    "RETIES",
    "SHARED_GRADIENTS",
    "UNSHARE",
    "WIDEN",
    "WIDTH_MAPS",
    "Alignment",
    "ConfigError",
    "DataConfig",
    "LayerDrop",
    "ModelConfig",
    "OptimConfig",
    "Stage",
    "TeacherShape",
    "TrainConfig",
    "Untying",
    "check_coalescing",
    "check_growth",
    "check_unsharing",
    "differences",
    "from_dict",
    "stage_model",
    "to_dict",
]
