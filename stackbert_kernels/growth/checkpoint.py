"""Growth from one checkpoint directory of a Hugging Face model to another, tensor by tensor, by name.

Any encoder whose layers are one list of equal parts (prefix.0, prefix.1, ...) and whose config.json counts them: BERT, RoBERTa,
ELECTRA, CamemBERT, XLM-R, DistilBERT and others alike; no model class is looked at. In a checkpoint of transformers' Trainer
(checkpoint-N) the optimizer's state grows by the same map (optimizer_state.py).

Everything is checked before torch is loaded, all is read before anything is written, and what is written appears under its name
whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stackbert_kernels.config import OPTIMIZER_STATES, ConfigError, check_growth
from stackbert_kernels.growth.depth import layer_map
from stackbert_kernels.growth.origins import GrowthReport, Layers, Origin, find_layers, origins

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX, OPTIMIZER, STATE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "optimizer.pt",
    "trainer_state.json",
)
DEPTHS = ("num_hidden_layers", "n_layers")  # how config.json counts layers
NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt")
"""Weights in other files or formats would be the shallower model's."""
COPIED_ALL_THE_SAME = ("training_args.bin",)
SHARDED = ("global_step*", "pytorch_model_fsdp*", "optimizer_*", "optimizer.bin", "rank*-of-*-optimizer.pt")
FLOATING, INTEGER = ("F", "BF"), ("I", "U")  # safetensors' names of dtypes begin so
BEST = ("best_metric", "best_global_step", "best_model_checkpoint")


@dataclass(frozen=True)
class Source:
    """A checkpoint directory that can grow: what its files say, nothing of their tensors."""

    path: Path
    settings: dict  # config.json
    depth_name: str
    files: dict[str, str]  # tensor -> file
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors calls them

    @property
    def depth(self) -> int:
        return self.settings[self.depth_name]


def grow_checkpoint(
    source: Path | str,
    out: Path | str,
    layers: int,
    operator: str = "stack",
    *,
    optimizer_state: str = "copy",
    seed: int = 0,
    overwrite: bool = False,
) -> GrowthReport:
    """Writes to `out` the checkpoint `source`, grown to `layers` layers by an operator of growth/depth.py; says where every tensor is from.

        source           what save_pretrained or transformers' Trainer wrote: config.json, safetensors (one file or several)
        out              a new or empty directory; with overwrite, also a checkpoint that is to be replaced
        optimizer_state  of Trainer's optimizer.pt: copy (by the map), zero (no state in layers that changed), reset (none at all)
        seed             with a tensor's name, decides what random and identity draw

    config.json gets the new depth; the tokenizer, the scheduler, random states and other files are copied. ConfigError for what
    cannot work, before anything is written; OSError if the disk refuses.
    """
    source, out = Path(source), Path(out)
    if optimizer_state not in OPTIMIZER_STATES:
        raise ConfigError(
            f"grow: optimizer_state must be one of {', '.join(OPTIMIZER_STATES)}, got {optimizer_state!r}"
        )
    found = read_source(source)
    _check_out(source, out, overwrite)
    check_growth(operator, found.depth, layers, where="grow: ")
    rows = layer_map(operator, found.depth, layers)
    where = find_layers(found.shapes, found.depth, rows, where=str(source))
    floating = {rest for rest in where.rests if found.dtypes[where.name(0, rest)].startswith(FLOATING)}
    tensors = origins(found.shapes, where, _numbered(found, where), floating)
    changed = _config(found, where)
    settings = found.settings | changed
    state, state_of = None, []
    if (source / OPTIMIZER).exists():
        from stackbert_kernels.growth.optimizer_state import grow_optimizer

        state, state_of = grow_optimizer(source / OPTIMIZER, found.settings, settings, where, optimizer_state)
    copied, left_out = _files(found)

    with written_whole(out) as folder:
        _write_weights(found, folder, tensors, where, seed)
        _write_json(folder / "config.json", settings)
        if state is not None:
            import torch

            torch.save(state, folder / OPTIMIZER)
        if (source / STATE).exists():
            best = dict.fromkeys(BEST)  # of a shallower model: Trainer would load its weights into the deeper one
            _write_json(folder / STATE, json.loads((source / STATE).read_text()) | best)
        for name in copied:
            shutil.copy2(source / name, folder / name)
    return GrowthReport(
        source=str(source),
        out=str(out),
        operator=operator,
        from_layers=found.depth,
        layers=layers,
        map=rows,
        prefix=where.prefix,
        tensors=tensors,
        config=changed,
        optimizer_state=None if state is None else optimizer_state,
        optimizer=state_of,
        copied=copied,
        left_out=left_out,
    )


# Reading: what is there, and what cannot grow.


def read_source(path: Path) -> Source:
    """The checkpoint at `path`; ConfigError that says what it is if it cannot be grown."""
    if (path / "MANIFEST.json").exists():
        raise ConfigError(
            f"grow: {path} is a checkpoint of stackbert pretrain, whose recipe grows it; grow the run's model/ instead"
        )
    if (path / "adapter_config.json").exists():
        raise ConfigError(
            f"grow: {path} holds a PEFT adapter; merge it into its model (merge_and_unload) and grow that"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"grow: source must be a transformers directory with a config.json, got {path}")
    settings = _read_json(path / "config.json")
    if "recipe" in settings and "stages" in settings:
        raise ConfigError(
            f"grow: {path} is a run of stackbert pretrain, whose recipe grows it; grow {path / 'model'} instead"
        )
    depth_name = next((name for name in DEPTHS if type(settings.get(name)) is int), None)
    if depth_name is None:
        raise ConfigError(f"grow: {path / 'config.json'} must count its layers as {' or '.join(DEPTHS)}")
    if settings.get("pruned_heads"):
        raise ConfigError(f"grow: layers with pruned heads are not alike, got pruned_heads {settings['pruned_heads']}")
    sharded = sorted(entry.name for pattern in SHARDED for entry in path.glob(pattern))
    if sharded:
        raise ConfigError(
            f"grow: {path} holds a state sharded by DeepSpeed or FSDP ({sharded[0]}); grow the model that save_model writes instead"
        )
    if (path / WEIGHTS).exists():
        files = dict.fromkeys(_header(path / WEIGHTS), WEIGHTS)
    elif (path / INDEX).exists():
        files = _read_json(path / INDEX).get("weight_map")
        if not isinstance(files, dict) or any(Path(file).name != file for file in files.values()):
            raise ConfigError(f"grow: {path / INDEX} must have a weight_map of file names")
    else:
        others = ", ".join(sorted(p.name for p in path.glob("pytorch_model*"))) or "none"
        raise ConfigError(
            f"grow: {path} must hold {WEIGHTS} or {INDEX}, got {others}; "
            "to convert: AutoModel's from_pretrained, then save_pretrained to a new directory"
        )
    shapes, dtypes = {}, {}
    for file in dict.fromkeys(files.values()):
        for name, (shape, dtype) in _header(path / file).items():
            if files.get(name) == file:
                shapes[name], dtypes[name] = shape, dtype
    missing = sorted(set(files) - set(shapes))
    if missing:
        raise ConfigError(f"grow: {path / files[missing[0]]} lacks {missing[0]}, which {INDEX} says is there")
    return Source(path, settings, depth_name, files, shapes, dtypes)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of each tensor of a safetensors file; torch is not loaded."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"grow: {path} cannot be read: {_reason(error)}") from error


def _numbered(found: Source, layers: Layers) -> set[str]:
    """The integers that hold their layer's number: [0] in layer 0, [1] in layer 1, ..."""
    import safetensors

    result = set()
    for rest in layers.rests:
        names = [layers.name(i, rest) for i in range(found.depth)]
        if found.dtypes[names[0]].startswith(INTEGER) and found.shapes[names[0]] in ((), (1,)) and found.depth > 1:
            values = []
            for name in names:
                with safetensors.safe_open(found.path / found.files[name], framework="numpy") as file:
                    values.append(int(file.get_tensor(name).reshape(())))
            if values == list(range(found.depth)):
                result.add(rest)
    return result


def _config(found: Source, layers: Layers) -> dict[str, object]:
    """The new depth, and each list of config.json that has an entry for each layer; a fresh layer is as the topmost one."""
    changed: dict[str, object] = {found.depth_name: len(layers.rows)}
    for name, value in found.settings.items():
        if isinstance(value, list) and "layer" in name and len(value) == found.depth:
            changed[name] = [value[row if row >= 0 else -1] for row in layers.rows]
    return changed


def _files(found: Source) -> tuple[list[str], list[str]]:
    """(copied as they are, left out); what is written anew is in neither."""
    written = {"config.json", OPTIMIZER, STATE, INDEX, *found.files.values()}
    copied, left_out = [], []
    for entry in sorted(found.path.iterdir()):
        if entry.name in written:
            continue
        other = entry.name not in COPIED_ALL_THE_SAME and any(entry.match(pattern) for pattern in NOT_COPIED)
        (left_out if other or not entry.is_file() else copied).append(entry.name + ("/" if entry.is_dir() else ""))
    return copied, left_out


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    ours, theirs = out.resolve(), source.resolve()
    if ours == theirs or theirs in ours.parents or ours in theirs.parents:
        raise ConfigError(f"grow: out must be another directory than the source, not in it or around it, got {out}")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise ConfigError(f"grow: out must be a directory, got a file or a link: {out}")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"grow: out must be a new or empty directory, got {out}; --overwrite replaces a checkpoint")
    if not (out / "config.json").is_file():
        raise ConfigError(f"grow: only a checkpoint is overwritten, and {out} has no config.json")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"grow: {path} cannot be read: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"grow: {path} must hold a JSON object, got {type(value).__name__}")
    return value


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).splitlines()[0]


# Writing.


def _write_weights(found: Source, folder: Path, tensors: list[Origin], layers: Layers, seed: int) -> None:
    """File by file: a new tensor is in the file of the one that it copies, or is like."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    new_files = {tensor.name: found.files[layers.like(tensor.name)] for tensor in tensors}
    sizes, counts = 0, 0
    for file in dict.fromkeys(found.files.values()):
        with safe_open(found.path / file, framework="pt") as opened:
            new = {}
            for tensor in tensors:
                if new_files[tensor.name] == file:
                    like = opened.get_tensor(layers.like(tensor.name))  # a view of the file
                    new[tensor.name] = _made(tensor, like, layers, found.settings.get("initializer_range", 0.02), seed)
                    if tensor.name not in found.files:
                        sizes, counts = sizes + like.nbytes, counts + like.numel()
            save_file(new, folder / file, metadata=opened.metadata())
    if (found.path / INDEX).exists() and WEIGHTS not in found.files.values():
        index = _read_json(found.path / INDEX)
        totals = {"total_size": sizes, "total_parameters": counts}
        metadata = {
            name: value + totals.get(name, 0) if isinstance(value, int | float) else value
            for name, value in index.get("metadata", {}).items()
        }
        _write_json(folder / INDEX, index | {"metadata": metadata, "weight_map": dict(sorted(new_files.items()))})


def _made(tensor: Origin, like: Tensor, layers: Layers, std: float, seed: int) -> Tensor:
    """The tensor that `tensor` describes; `like` is its source, or has its shape and dtype."""
    import torch

    if tensor.how in ("kept", "copied"):
        return like.clone()
    if tensor.how == "numbered":
        return torch.full_like(like, layers.of(tensor.name)[0])
    if tensor.how == "drawn":
        key = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8]) >> 1)
        return (torch.randn(like.shape, generator=generator) * std).to(like.dtype)
    return torch.full_like(like, 1 if tensor.how == "ones" else 0)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out`, on the disk and under that name, when the block ends; if it fails, nothing is left.

    What stood at `out` is replaced: it is removed once the new one is there.
    """
    temporary, replaced = (out.parent / f".tmp-{out.name}-{part}{uuid.uuid4().hex}" for part in ("", "replaced-"))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in (*temporary.iterdir(), temporary):
            _sync(entry)
        if out.exists():
            os.rename(out, replaced)
        try:
            os.rename(temporary, out)
        except OSError:
            if replaced.exists():
                os.rename(replaced, out)
            raise
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
