"""What a table of timings has to be read with: the machine, the versions, the commit, and a digest of each op's sources.

A copy of the tree without its history (on a borrowed GPU machine, say) knows no commit; the digests still tell later which commit it was
and which ops have changed since.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_SOURCES = (
    "csrc/common",
    *(f"stackbert_kernels/ops/{name}.py" for name in ("_library", "_triton", "_triton_language", "philox")),
)
GPU_FIELDS = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem", "power.limit")


def machine(device: str, commit: str | None = None) -> dict[str, object]:
    """`commit` where the caller knows it and git does not."""
    facts: dict[str, object] = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        facts |= _gpu()
    return facts | _commit(commit)


def name(facts: dict[str, object]) -> str:
    """The folder of a machine's results: "h200", "xeon-2-cores"."""
    if facts["device"] == "cuda":
        words = [word for word in str(facts["gpu"]).lower().split() if word not in ("nvidia", "tesla", "geforce")]
        return words[0] if words else "gpu"
    cpu = str(facts["cpu"]).lower()
    kind = next((kind for kind in ("xeon", "epyc", "core", "ryzen", "neoverse", "apple") if kind in cpu), "cpu")
    return f"{kind}-{facts['cores']}-cores"


def places(folder: str) -> list[str]:
    """Where the sources of the op in this folder lie, and those that all ops share."""
    return [f"csrc/{folder}", f"stackbert_kernels/ops/{folder}", *SHARED_SOURCES]


def counts(path: str, folder: str, device: str) -> bool:
    """Whether this file can decide how fast the op is there. Kernels of the other device cannot."""
    if not any(path == place or path.startswith(f"{place}/") for place in places(folder)):
        return False
    of_the_other = ("_cpu.cpp",) if device == "cuda" else (".cu", ".cuh", "triton_kernel.py", "_triton.py", "_triton_language.py")  # fmt: skip
    return path.endswith((".h", ".cuh", ".cpp", ".cu", ".py")) and not path.endswith(of_the_other)


def digest(folder: str, device: str, blobs: Mapping[str, str] | None = None) -> str | None:
    """Of an op's sources, by the names that git gives their contents, so that it can be found again in the history.

    `blobs`: {path: name} of another tree than this one. None is the digest of an installed copy, which has no csrc.
    """
    if blobs is None:
        blobs = {f.relative_to(ROOT).as_posix(): _blob(f) for place in places(folder) for f in _files(ROOT / place)}
    lines = [f"{path} {name}\n" for path, name in sorted(blobs.items()) if counts(path, folder, device)]
    if not any(line.startswith("csrc/") for line in lines):
        return None
    return hashlib.sha1("".join(lines).encode()).hexdigest()[:16]


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]


def _blob(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def git(*arguments: str) -> str | None:
    """What git says of the tree that these benchmarks lie in, or None where there is no git or no history."""
    if not (ROOT / ".git").exists():  # an installed copy may lie inside somebody else's repository
        return None
    try:
        ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _commit(given: str | None) -> dict[str, object]:
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": given, "dirty": None}
    # Results and texts that a run before this one has written change nothing that is measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
    return {"commit": commit, "dirty": bool(changed)}


def _gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return facts | dict(zip((f.replace(".", "_") for f in GPU_FIELDS[1:]), values[1:], strict=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
