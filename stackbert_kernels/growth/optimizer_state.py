"""The optimizer's state in a checkpoint of transformers' Trainer, grown by the same map as the weights.

optimizer.pt numbers parameters and does not name them. Their names are in `param_names` where the optimizer was built from
named_parameters; else they follow from how Trainer groups the parameters of the model that config.json describes: those with
weight decay, then the others, each in the model's order. That is believed only if every count and every shape agrees.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from stackbert_kernels.config import ConfigError
from stackbert_kernels.growth.origins import Layers, Origin

SHAPED_AS_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg")

Shapes = dict[str, tuple[int, ...]]  # in the model's order


def grow_optimizer(
    path: Path, settings: dict, new_settings: dict, layers: Layers, optimizer_state: str
) -> tuple[dict, list[Origin]]:
    """(the deeper model's optimizer.pt, where each parameter's state is from). ConfigError if the parameters cannot be named.

    copy: a layer's whole state (moments, step count) is a copy of its source's; fresh layers have none, which optimizers fill at
    their first step. zero: layers that changed have none. reset: no parameter has any. Groups keep their rates and decays. The file
    is never left out: without it Trainer would not load its scheduler either.
    """
    saved = _load(path)
    model, deeper = _parameters(path, settings), _parameters(path, new_settings)
    groups = _groups(path, saved["param_groups"], model, settings)
    _check_order(path, groups, list(model))
    position = {name: index for index, name in enumerate(name for group in groups for name in group)}
    state = {position_of: entry for position_of, entry in saved["state"].items() if type(position_of) is int}
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    _check_shapes(path, {name: state.get(numbers[i], {}) for name, i in position.items()}, model)

    new_state, new_groups, report = {}, [], []
    for names, group in zip(groups, saved["param_groups"], strict=True):
        members = set(names)
        new_names = [name for name in deeper if layers.like(name) in members]
        first = sum(len(g["params"]) for g in new_groups)
        new_groups.append(group | {"params": list(range(first, first + len(new_names)))})
        if "param_names" in group:
            new_groups[-1]["param_names"] = new_names
        for number, name in enumerate(new_names, first):
            source = layers.source(name)
            changed = source != name
            if source is None or optimizer_state == "reset" or (changed and optimizer_state == "zero"):
                report.append(Origin(name, None, "none"))
                continue
            entry = state.get(numbers[position[source]])
            if entry is not None:
                new_state[number] = copy.deepcopy(entry)
            report.append(Origin(name, source, "none" if entry is None else "copied" if changed else "kept"))
    return saved | {"state": new_state, "param_groups": new_groups}, report


def _load(path: Path) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no class for what a damaged or a hostile file raises
        raise ConfigError(
            f"grow: {path} cannot be read as tensors and numbers: {str(error).splitlines()[0]}"
        ) from error
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not isinstance(saved.get("state"), dict):
        raise ConfigError(f"grow: {path} must hold a torch optimizer's state and param_groups")
    return saved


def _model(path: Path, settings: dict) -> torch.nn.Module:
    """The model that config.json names, without memory for its weights."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"grow: naming the parameters of {path} needs transformers: {error}") from error
    name = (settings.get("architectures") or ["none"])[0]
    cls = getattr(transformers, name, None)
    if cls is None or not hasattr(cls, "config_class"):
        raise ConfigError(
            f"grow: {path} belongs to a model that transformers does not have, got architectures {name!r}"
        )
    with torch.device("meta"):
        model = cls(cls.config_class.from_dict(settings))
    model.tie_weights()  # transformers 5.0 leaves that out on meta
    return model


def _parameters(path: Path, settings: dict) -> Shapes:
    return {name: tuple(p.shape) for name, p in _model(path, settings).named_parameters()}


def _groups(path: Path, saved: list[dict], model: Shapes, settings: dict) -> list[list[str]]:
    """The names of each group's parameters."""
    sizes = [len(group["params"]) for group in saved]
    if all("param_names" in group for group in saved):
        groups = [list(group["param_names"]) for group in saved]
        unknown = [name for group in groups for name in group if name not in model]
        if unknown or [len(names) for names in groups] != sizes:
            raise ConfigError(f"grow: {path} names parameters that the model does not have, such as {unknown[:1]}")
        return groups
    from transformers import Trainer

    decays = set(Trainer.get_decay_parameter_names(None, _model(path, settings)))
    groups = [[name for name in model if name in decays], [name for name in model if name not in decays]]
    if [len(names) for names in groups] != sizes:
        raise ConfigError(
            f"grow: {path} must have groups of {len(groups[0])} and {len(groups[1])} parameters, as Trainer makes them of this model, "
            f"got {' and '.join(map(str, sizes))}: which are frozen or grouped otherwise is not recorded; "
            "remove optimizer.pt, or build the optimizer from named_parameters, which records names"
        )
    return groups


def _check_order(path: Path, groups: list[list[str]], order: list[str]) -> None:
    for names in groups:
        members = set(names)
        if names != [name for name in order if name in members]:
            raise ConfigError(
                f"grow: the parameters of {path} must be in the model's order, or those of new layers have no place"
            )


def _check_shapes(path: Path, state: dict[str, dict], model: Shapes) -> None:
    for name, entry in state.items():
        for key in SHAPED_AS_PARAMETERS:
            moment = entry.get(key)
            if isinstance(moment, torch.Tensor) and tuple(moment.shape) != model[name]:
                raise ConfigError(
                    f"grow: {path} has a {key} of shape {list(moment.shape)} where {name} {list(model[name])} is expected: "
                    "its parameters are not in the order of transformers' Trainer"
                )
