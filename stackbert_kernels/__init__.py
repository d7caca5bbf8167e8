"""stackbert_kernels: fast BERT training by fused kernels and layer stacking.

The flow, which is also the reading order:

    config     what a run is
    recipes    a training method: a function from one configuration to another, with stages
    plan       configuration -> the spans of steps that the loop executes, and what they cost
    growth     how new layers get their weights and moments
    model      the encoder, its layers in one LayerBank; to and from transformers
    ops        the fused ops, each with a PyTorch reference
    csrc       their kernels in C++ and CUDA

For models that are not ours: `patch` puts the ops into modules that exist, `nn` has them as modules, `hf` plugs into transformers.

`data` feeds `train`, which executes the plan; `sweep` runs several plans, `compare` says what each cost; `cli` is the `stackbert` command.

The names below are loaded when they are first used: importing the package, or its config, loads neither torch nor anything of ours.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "DataConfig": "config",
    "OptimConfig": "config",
    "Stage": "config",
    "TrainConfig": "config",
    "ConfigError": "config",
    "baseline": "recipes",
    "mslt": "recipes",
    "Bert": "model",
    "from_transformers": "model.hf",
    "to_transformers": "model.hf",
    "unpatch": "patch",
    "patched": "patch",
    "PatchReport": "patch",
}
_PARTS = ("config", "data", "growth", "hf", "model", "nn", "ops", "patch", "plan", "recipes", "train")

__all__ = ["__version__", *_HOME, *_PARTS]


def __getattr__(name: str):
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
