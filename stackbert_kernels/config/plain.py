"""Configurations as plain JSON values, and what differs between two of them."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import fields, is_dataclass

from stackbert_kernels.config.checks import require
from stackbert_kernels.config.run import TeacherShape, TrainConfig
from stackbert_kernels.config.stage import Alignment, LayerDrop, Stage, Untying

MAY_CHANGE_ON_RESUME = ("checkpoint_every", "keep", "log_every")
"""Settings that do not change any computed number."""
NAMED = (Stage, LayerDrop, Alignment, Untying, TeacherShape)
"""Dataclasses whose fields are told by the name of what holds them, as stages[1].depth."""


def to_dict(config) -> dict:
    """A configuration as plain JSON values: nested dicts, lists, numbers, strings."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value):
    if is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def from_dict(values: dict, cls: type = TrainConfig):
    """The inverse of `to_dict`. A key that is missing takes its default; one that is unknown is a ConfigError."""
    return _read(cls, values, "")


def _read(wanted, value, where: str):
    """`value` (plain JSON) as the annotated type `wanted`; `where` is its path, such as stages[1].depth."""
    if is_dataclass(wanted):
        require(isinstance(value, dict), f"{where or wanted.__name__} must be an object, got {value!r}")
        annotations = typing.get_type_hints(wanted)
        prefix = f"{where}." if where else ""
        for name in value:
            near = difflib.get_close_matches(name, annotations, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(annotations)}"
            require(name in annotations, f"{wanted.__name__} has no field {prefix + name!r}{hint}")
        missing = [
            f.name for f in fields(wanted) if f.name not in value and f.default is f.default_factory
        ]  # both MISSING
        require(
            not missing, f"{where or wanted.__name__} needs {', '.join(missing)}, got {', '.join(value) or 'nothing'}"
        )
        return wanted(**{name: _read(annotations[name], v, prefix + name) for name, v in value.items()})
    if typing.get_origin(wanted) is tuple:
        require(isinstance(value, (list, tuple)), f"{where} must be a list, got {value!r}")
        item = typing.get_args(wanted)[0]
        return tuple(_read(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    choices = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in choices and type(value) is int:
        return float(value)
    fits = type(value) in choices
    names = " or ".join("null" if c is type(None) else c.__name__ for c in choices)
    require(fits, f"{where} must be {names}, got {value!r}")
    return value


def differences(old: TrainConfig, new: TrainConfig, leaving: tuple[str, ...] = MAY_CHANGE_ON_RESUME) -> list[str]:
    """What keeps a run made with `old` from being continued with `new`: "lr: 0.001 -> 0.002", empty if nothing does. Fields in `leaving` may differ."""
    found: list[str] = []
    for f in fields(old):
        if f.name not in leaving:
            _compare(f.name, getattr(old, f.name), getattr(new, f.name), found)
    return found


def _compare(name: str, old, new, found: list[str]) -> None:
    if is_dataclass(old):
        for f in fields(old):
            # The sections of TrainConfig add nothing to a name (field names are unique over them); the others do.
            inner = f"{name}.{f.name}" if isinstance(old, NAMED) else f.name
            _compare(inner, getattr(old, f.name), getattr(new, f.name), found)
    elif name == "stages" and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            _compare(f"stages[{i}]", a, b, found)
    elif name == "stages":
        found.append(f"stages: {len(old)} stages -> {len(new)} stages")
    elif old != new:
        found.append(f"{name}: {old!r} -> {new!r}")
