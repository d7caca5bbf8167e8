"""Modules that exist get another class, and get their own back: the machinery of `patch`, which knows no model.

A family of models is a module with `LOOKED_FOR`, a line for people, and

    plan(model, parts) -> list[Replacement | Skipped]

which changes nothing. A `Replacement` names a module and the kind, a subclass of `Swapped`, whose methods take over; parameters, buffers,
hooks and names stay where they are, so state dict, optimizer and checkpoints do not notice. `apply` swaps all or nothing.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from torch import nn

PARTS = ("attention", "add_norm", "gelu", "embeddings", "mlm_loss", "unpad")


@dataclass(frozen=True)
class Parts:
    """What is asked for."""

    attention: bool = True
    add_norm: bool = True
    gelu: bool = True
    embeddings: bool = True
    mlm_loss: bool = True
    unpad: bool = False

    @property
    def wanted(self) -> list[str]:
        return [part for part in PARTS if getattr(self, part)]


@dataclass(frozen=True)
class Replacement:
    """A module that gets the methods of `kind`. A kind with dropout in several places says how many `sites` it needs."""

    name: str
    module: nn.Module
    kind: type[Swapped]
    runs: dict[str, str]  # part -> what runs, as "dropout_add_layer_norm (native)"
    note: str = ""  # when it runs as before all the same
    options: Any = None  # the kind's own
    sites: int = 1


@dataclass(frozen=True)
class Skipped:
    """A part that stays as it is, and why."""

    name: str
    part: str
    reason: str


class Settings(NamedTuple):
    """What a swapped module knows beyond its own attributes, as `self._stackbert`."""

    parts: tuple[str, ...]
    site: int  # its first dropout site; no two modules of a model share one
    options: Any


class Swapped:
    """Base of every kind. Its instances keep the name of the class that they had: checkpoints, wrapping policies and registries of
    transformers go by it. `original` is that class."""

    def extra_repr(self) -> str:
        theirs = super().extra_repr()
        return ", ".join([*([theirs] if theirs else []), f"stackbert: {', '.join(self._stackbert.parts)}"])

    def __reduce_ex__(self, protocol):
        """Copies and pickles by kind and original: the class itself has no name under which to find it."""
        if type(self) is not swapped_class(self.kind, self.original):  # somebody swapped it again, as fully_shard does
            return super().__reduce_ex__(protocol)
        return _new, (self.kind, self.original), self.__getstate__()


def _new(kind: type[Swapped], original: type[nn.Module]) -> nn.Module:
    cls = swapped_class(kind, original)
    return cls.__new__(cls)


@cache
def swapped_class(kind: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The methods of kind before those of original, under original's name and with its signature of forward."""
    forward = kind.forward
    like = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    like.__kwdefaults__, like.__doc__ = forward.__kwdefaults__, original.forward.__doc__
    like.__signature__ = inspect.signature(original.forward)  # transformers' Trainer drops columns that are not in it
    names = {"kind": kind, "original": original, "forward": like}
    return type(
        original.__name__, (kind, original), names | {k: getattr(original, k) for k in ("__module__", "__qualname__")}
    )


def swapped(model: nn.Module) -> Iterator[tuple[str, Swapped]]:
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            yield name, module


def apply(replacements: list[Replacement]) -> None:
    """Swaps all, or none if one fails."""
    classes = [swapped_class(r.kind, type(r.module)) for r in replacements]
    done: list[tuple[nn.Module, type]] = []
    site = 0
    try:
        for replacement, cls in zip(replacements, classes, strict=True):
            module, before = replacement.module, type(replacement.module)
            module.__class__ = cls
            done.append((module, before))
            module.__dict__["_stackbert"] = Settings(tuple(replacement.runs), site, replacement.options)
            site += replacement.sites
    except BaseException:
        for module, before in reversed(done):
            module.__class__ = before
            module.__dict__.pop("_stackbert", None)
        raise


def restore(model: nn.Module) -> int:
    """Gives every swapped module its class back; how many there were. One that something else swapped since is a ValueError."""
    found = list(swapped(model))
    for name, module in found:
        if type(module) is not swapped_class(module.kind, module.original):
            raise ValueError(
                f"unpatch: {name or 'the model'} was given the class {type(module).__name__} after it was patched "
                "(by fully_shard?); undo that first"
            )
    for _, module in found:
        module.__class__ = module.original
        del module.__dict__["_stackbert"]
    return len(found)
