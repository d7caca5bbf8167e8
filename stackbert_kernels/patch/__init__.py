"""The fused ops in modules that exist already: `transformers`' BERT family and torch.nn's encoder.

    swap             the machinery: a plan of class swaps, applied all or nothing, undone exactly
    admission        what is refused before anything is looked for
    report           what was done, as a table
    plain            whether a module may be bypassed at a call
    runs             which implementation of an op would run
    huggingface      which classes of transformers get which methods: blocks, encoder, masked_lm
    torch_encoder    torch.nn.TransformerEncoder and its layers

`sbk.patch` is both this package and its function, whichever was asked for first: the package can be called.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from torch import nn

from stackbert_kernels.patch import admission, swap
from stackbert_kernels.patch.report import PatchReport, Row
from stackbert_kernels.patch.swap import Parts, Replacement, Skipped

FAMILIES = ("huggingface", "torch_encoder")  # modules of this package; swap.py says what each must have


def patch(
    model: nn.Module,
    attention: bool = True,
    add_norm: bool = True,
    gelu: bool = True,
    embeddings: bool = True,
    mlm_loss: bool = True,
    strict: bool = True,
    unpad: bool = False,
) -> PatchReport:
    """Puts the fused ops into the modules of `model` that they fit, in place, and says what it did.

        attention   softmax(q k^T) v
        add_norm    layer_norm(residual + dropout(x + bias)), and other layer norms beside a gelu
        gelu        gelu(x + bias)
        embeddings  dropout(layer_norm(word + position + token type))
        mlm_loss    the decoder and the masked-LM loss of labelled tokens only, in training
        unpad       everything between embeddings and heads on the tokens alone, without the padding, whose outputs are then zero
        strict      a model in which nothing was found to replace is a ValueError that names what was looked for

    Parameters, names, state dict and class names stay. `unpatch(model)` undoes it. Refused with the model untouched: one that is patched
    already or in parts, compiled, sharded, quantized or on meta.
    """
    admission.refuse(model)
    parts = Parts(attention, add_norm, gelu, embeddings, mlm_loss, unpad)
    if not parts.wanted:
        raise ValueError(f"patch: wanted at least one of {', '.join(swap.PARTS)}, got none")
    families = [import_module(f"{__name__}.{family}") for family in FAMILIES]
    entries = [entry for family in families for entry in family.plan(model, parts)]
    found = [entry for entry in entries if isinstance(entry, Replacement)]
    _refuse_patched(model, found)
    seen = {part for entry in entries for part in (entry.runs if isinstance(entry, Replacement) else [entry.part])}
    if not entries:
        if strict:
            looked_for = "; ".join(family.LOOKED_FOR for family in families)
            raise ValueError(f"patch: found nothing to replace in {type(model).__name__}; looked for {looked_for}")
    elif not found and strict:
        reasons = dict.fromkeys(f"{entry.part}: {entry.reason}" for entry in entries)
        raise ValueError(f"patch: nothing can be replaced in {type(model).__name__}: {'; '.join(reasons)}")
    entries += [Skipped("", part, "the model has no such place") for part in parts.wanted if part not in seen]
    swap.apply(found)
    return PatchReport.of(type(model).__name__, entries)


def _refuse_patched(model: nn.Module, found: list[Replacement]) -> None:
    names = [name for name, _ in swap.swapped(model)]
    if not names:
        return
    if not found:
        raise ValueError(f"patch: the model is patched already ({len(names)} modules): sbk.unpatch(model) first")
    raise ValueError(
        f"patch: the model is patched in parts: {len(names)} modules are (as {names[0] or 'itself'}), {len(found)} are "
        f"not (as {found[0].name or 'itself'}): sbk.unpatch(model) first"
    )


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`: every module has its class back, and nothing is left of it. Copies of patched models can be unpatched too."""
    if not swap.restore(model):
        raise ValueError(f"unpatch: no module of this {type(model).__name__} is patched")


@contextmanager
def patched(model: nn.Module, **options) -> Iterator[PatchReport]:
    """`with sbk.patched(model, unpad=True) as report:` patches inside, with the options of `patch`."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        swap.restore(model)


class _Callable(types.ModuleType):
    """The import system binds `stackbert_kernels.patch` to the package as soon as one of its modules is imported."""

    __call__ = staticmethod(patch)


sys.modules[__name__].__class__ = _Callable
__signature__ = inspect.signature(patch)  # what help and editors show of `sbk.patch`

__all__ = ["PatchReport", "Row", "patch", "patched", "unpatch"]
