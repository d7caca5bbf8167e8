"""Depth growth: operators are maps (depth.py), one function applies any map to weights and moments (apply.py).

grow_checkpoint does the same to checkpoints of Hugging Face models and of their Trainer (checkpoint.py).
"""

from importlib import import_module

_HOME = {"grow_checkpoint": "checkpoint", "GrowthReport": "origins"}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
