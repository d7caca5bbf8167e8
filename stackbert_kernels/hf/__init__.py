"""What plugs into `transformers` (5.0 or newer) by its own extension points. Loaded when first used; so is transformers.

register()         the attention "stackbert" for `attn_implementation=`, with its mask function
StackingCallback,
grow_and_resume    layer stacking with transformers' Trainer, from checkpoint to checkpoint
"""

from importlib import import_module

_HOME = {"register": "attention", "StackingCallback": "stacking", "grow_and_resume": "stacking"}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
