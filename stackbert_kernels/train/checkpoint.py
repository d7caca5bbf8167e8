"""Checkpoints that a kill, a full disk or a flipped bit cannot take away (contract 3.9).

A checkpoint is a folder step-N of safetensors and JSON files (no pickle) with a MANIFEST.json that holds their sizes and SHA-256.
It is written under another name and renamed when everything is on the disk, so that step-N either is whole or does not exist.
Which one is the newest is computed from what is valid, never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is loaded by what handles tensors alone: verifying needs none and starts at once
    from torch import Tensor

FORMAT = 1
MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"  # a folder with this prefix is nobody's: start-up removes it
NEVER_PRUNED = 2  # the newest valid checkpoints, whatever `keep` says

Tensors = dict[str, dict[str, "Tensor"]]  # file stem -> name -> tensor
Documents = dict[str, dict]  # file stem -> JSON object


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message is one line."""


def save(directory: Path, step: int, tensors: Tensors, documents: Documents, *, keep: int = NEVER_PRUNED) -> Path:
    """Writes directory/step-N, whole or not at all, then removes old ones: all but the newest max(keep, 2) valid.

    A step that is already there and valid is left as it is. Raises CheckpointError; earlier checkpoints are untouched then.
    """
    directory = Path(directory)
    final = directory / f"step-{step}"
    temporary = directory / f"{TEMPORARY}step-{step}-{uuid.uuid4().hex}"
    try:
        os.makedirs(directory, exist_ok=True)
        if os.path.isdir(final):
            if not verify(final):
                return final
            _remove(final)  # it was found damaged, and training came past it again
        os.mkdir(temporary)
        entries = {}
        for name, content in _contents(tensors, documents):
            _write(temporary / name, content)
            entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _write(temporary / MANIFEST, _manifest(step, entries))
        _sync_directory(temporary)
        os.rename(temporary, final)
        _sync_directory(directory)
    except OSError as error:
        _discard(temporary)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {directory}: {_reason(error)}; earlier ones are untouched"
        ) from error
    try:
        _prune(directory, keep)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} is saved, but old ones in {directory} cannot be removed: {_reason(error)}"
        ) from error
    return final


def load(path: Path) -> tuple[Tensors, Documents]:
    """What `save` was given. The checkpoint must be valid: take it from `latest`, or look at `verify` first."""
    import safetensors.torch

    path = Path(path)
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        tensors = {
            n.removesuffix(".safetensors"): safetensors.torch.load_file(path / n)
            for n in files
            if n.endswith(".safetensors")
        }
        documents = {n.removesuffix(".json"): json.loads((path / n).read_text()) for n in files if n.endswith(".json")}
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {_reason(error)}") from error
    return tensors, documents


def saved(directory: Path) -> list[Path]:
    """The checkpoints of a folder, newest first, valid or not."""
    steps = []
    if os.path.isdir(directory):
        steps = [int(m[1]) for m in map(re.compile(r"step-(0|[1-9]\d*)").fullmatch, os.listdir(directory)) if m]
    return [Path(directory) / f"step-{step}" for step in sorted(steps, reverse=True)]


def latest(directory: Path, *, warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Path | None:
    """The newest valid checkpoint; each newer one that is damaged is named in one line."""
    for path in saved(directory):
        problems = verify(path)
        if not problems:
            return path
        warn(f"checkpoint {path} is damaged and not used: {problems[0]}")
    return None


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint; empty when every byte is as it was written."""
    path = Path(path)
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        return [f"{MANIFEST}: {_reason(error)}"]
    try:
        manifest = json.loads(text)
        step, files = manifest["step"], manifest["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        intact = text == _manifest(step, files) and all(os.path.basename(name) == name for name in wanted)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        return [f"{MANIFEST}: is not a manifest of format {FORMAT}, or is damaged"]

    problems = []
    if path.resolve().name != f"step-{step}":
        problems.append(f"{MANIFEST}: is of step {step}, the folder is {path.resolve().name}")
    for name, (size, sha256) in wanted.items():
        try:
            found = os.path.getsize(path / name)
            if found != size:
                problems.append(f"{name}: {size} bytes were written, {found} are there")
            elif _sha256(path / name) != sha256:
                problems.append(f"{name}: its SHA-256 is not the one that was written")
        except OSError as error:
            problems.append(f"{name}: {_reason(error)}")
    return problems


def clean(directory: Path) -> None:
    """Removes what an interrupted save or removal left behind."""
    if not os.path.isdir(directory):
        return
    try:
        for name in os.listdir(directory):
            if name.startswith(TEMPORARY):
                _empty(Path(directory) / name)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be cleaned: {_reason(error)}") from error


def _contents(tensors: Tensors, documents: Documents):
    """(file name, bytes) one at a time: only one file's bytes are in memory."""
    import safetensors.torch

    for stem, named in tensors.items():
        yield (
            f"{stem}.safetensors",
            safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in named.items()}),
        )
    for stem, document in documents.items():
        yield f"{stem}.json", json.dumps(document, indent=1, allow_nan=False).encode()


def _manifest(step: int, files: dict[str, dict]) -> bytes:
    """The one rendering of these facts, so that any other byte in the file is damage."""
    facts = {n: {"bytes": files[n]["bytes"], "sha256": files[n]["sha256"]} for n in sorted(files)}
    return json.dumps({"format": FORMAT, "step": step, "files": facts}, indent=1).encode()


def _write(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prune(directory: Path, keep: int) -> None:
    valid = 0
    for path in saved(directory):
        if valid >= max(keep, NEVER_PRUNED):
            _remove(path)
        elif not verify(path):
            valid += 1


def _remove(path: Path) -> None:
    """Renames first: a removal that is interrupted must not leave a step-N with half of its files."""
    doomed = path.parent / f"{TEMPORARY}removed-{uuid.uuid4().hex}"
    os.rename(path, doomed)
    _empty(doomed)


def _empty(path: Path) -> None:
    for name in os.listdir(path):
        os.unlink(path / name)
    os.rmdir(path)


def _discard(temporary: Path) -> None:
    try:
        _empty(temporary)
    except OSError:
        return  # the error that is being reported came first; the next start removes the rest


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).splitlines()[0]
