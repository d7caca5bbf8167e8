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


def sources(folder: str) -> list[Path]:
    """The files that decide how fast the op in this folder is."""
    places = [ROOT / "csrc" / folder, ROOT / "stackbert_kernels/ops" / folder, *(ROOT / s for s in SHARED_SOURCES)]
    files = [f for place in places for f in ([place] if place.is_file() else place.rglob("*"))]
    return sorted(f for f in files if f.suffix in (".h", ".cuh", ".cpp", ".cu", ".py"))


def digest(folder: str) -> str | None:
    """Of an op's sources, by git's blob names, so that it can be found again in the history. None: an installed copy, without csrc."""
    if not (ROOT / "csrc").is_dir():
        return None
    lines = [f"{f.relative_to(ROOT).as_posix()} {_blob(f.read_bytes())}\n" for f in sources(folder)]
    return hashlib.sha1("".join(lines).encode()).hexdigest()[:16]


def _blob(content: bytes) -> str:
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
    changed = git("status", "--porcelain", "--untracked-files=no")
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
