"""Builds the compiled module by CMake; everything else about the package is in pyproject.toml.

What the environment says:

    STACKBERT_SKIP_CUDA_BUILD=1    CPU kernels only
    STACKBERT_FORCE_CUDA_BUILD=1   no nvcc is an error (else: CPU kernels only, and one line that says so)
    STACKBERT_CUDA_ARCHS           devices to build for, as CMake writes them: "80;90a;120-virtual"; wins over
    CMAKE_CUDA_ARCHITECTURES       the same, here or in CMAKE_ARGS; wins over
    TORCH_CUDA_ARCH_LIST           the same in torch's spelling: "9.0;10.0+PTX"
    CUDACXX, CUDA_HOME, CUDA_PATH  where nvcc is; else PATH, then /usr/local/cuda
    MAX_JOBS                       compilers at once; default: one a core
    CMAKE_ARGS                     more arguments for CMake
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "stackbert_kernels"
OLDEST_CUDA = (12, 8)
# 'a' devices: their own instructions (wgmma on 90a, tcgen05 on 100a) exist in no other code.
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100a", "120a")


class BuildError(RuntimeError):
    """A setting that cannot work; the message is one line that says what was wanted and what was given."""


@dataclass(frozen=True)
class Cuda:
    """nvcc and what to build with it; or nvcc None and the reason."""

    nvcc: Path | None
    archs: str = ""
    why_not: str = ""


def flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def find_nvcc(environment: Mapping[str, str]) -> tuple[Path | None, str]:
    """nvcc, or None and why there is none. A variable that names a place is believed: nothing else is tried then."""
    for name, below in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        if environment.get(name):
            found = shutil.which(Path(environment[name]) / below, path=environment.get("PATH", ""))
            return (Path(found), "") if found else (None, f"no nvcc at {name}={environment[name]}")
    for candidate in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate, path=environment.get("PATH", ""))
        if found:
            return Path(found), ""
    return None, "no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"


def nvcc_version(text: str) -> tuple[int, int]:
    """From what `nvcc --version` prints."""
    match = re.search(r"release (\d+)\.(\d+)", text)
    if not match:
        raise BuildError(f"nvcc --version must name its release, got {text.strip()!r}")
    return int(match[1]), int(match[2])


def from_torch(archs: str) -> str:
    """'9.0a;10.0+PTX' -> '90a-real;100-real;100-virtual'"""
    translated = []
    for entry in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must list entries such as 9.0, 9.0a or 10.0+PTX, got {entry!r}")
        number = match[1] + match[2] + match[3]
        translated += [f"{number}-real"] + ([f"{number}-virtual"] if match[4] else [])
    return ";".join(translated)


def from_cmake(name: str, archs: str) -> str:
    entries = [entry for entry in re.split(r"[;,\s]+", archs) if entry]
    for entry in entries:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", entry):
            raise BuildError(f"{name} must list entries such as 80, 90a-real or 120-virtual, got {entry!r}")
    if not entries:
        raise BuildError(f"{name} must list at least one architecture, got {archs!r}")
    return ";".join(entries)


def default_archs(gpu_codes: str) -> str:
    """Those of DEFAULT_ARCHS that the toolkit knows (`nvcc --list-gpu-code`), and PTX of the newest for what comes after it."""
    known = {int(number) for number in re.findall(r"sm_(\d+)", gpu_codes)}
    archs = [arch for arch in DEFAULT_ARCHS if int(arch.rstrip("a")) in known]
    if not archs:
        raise BuildError(f"nvcc must know one of {', '.join(DEFAULT_ARCHS)}, got {' '.join(gpu_codes.split())}")
    newest = archs[-1].rstrip("a")  # PTX of an 'a' device runs on that device alone
    return ";".join([f"{arch}-real" for arch in archs] + [f"{newest}-virtual"])


def wanted_archs(environment: Mapping[str, str]) -> str | None:
    """The architectures that the environment asks for, as CMake spells them; None = the default."""
    if environment.get("STACKBERT_CUDA_ARCHS"):
        return from_cmake("STACKBERT_CUDA_ARCHS", environment["STACKBERT_CUDA_ARCHS"])
    for argument in reversed(shlex.split(environment.get("CMAKE_ARGS", ""))):
        match = re.fullmatch(r"-DCMAKE_CUDA_ARCHITECTURES(?::\w+)?=(.*)", argument)
        if match:
            return from_cmake("CMAKE_CUDA_ARCHITECTURES", match[1])
    if environment.get("CMAKE_CUDA_ARCHITECTURES"):
        return from_cmake("CMAKE_CUDA_ARCHITECTURES", environment["CMAKE_CUDA_ARCHITECTURES"])
    if environment.get("TORCH_CUDA_ARCH_LIST"):
        return from_torch(environment["TORCH_CUDA_ARCH_LIST"])
    return None


def find_cuda(environment: Mapping[str, str]) -> Cuda:
    force, skip = flag(environment, "STACKBERT_FORCE_CUDA_BUILD"), flag(environment, "STACKBERT_SKIP_CUDA_BUILD")
    if force and skip:
        raise BuildError("at most one of STACKBERT_FORCE_CUDA_BUILD and STACKBERT_SKIP_CUDA_BUILD may be 1, got both")
    if skip:
        return Cuda(None, why_not="STACKBERT_SKIP_CUDA_BUILD=1")
    nvcc, why_not = find_nvcc(environment)
    if nvcc:
        version = nvcc_version(_output(nvcc, "--version"))
        if version < OLDEST_CUDA:
            nvcc, why_not = None, f"{nvcc} is CUDA {version[0]}.{version[1]}, wanted 12.8 or newer"
    if nvcc is None:
        if force:
            raise BuildError(f"STACKBERT_FORCE_CUDA_BUILD=1: {why_not}")
        return Cuda(None, why_not=why_not)
    return Cuda(nvcc, wanted_archs(environment) or default_archs(_output(nvcc, "--list-gpu-code")))


def cmake_arguments(cuda: Cuda, environment: Mapping[str, str]) -> list[str]:
    """CMAKE_ARGS, then what is decided here, so that it holds. Each is always given: the build folder's cache remembers older ones."""
    return [
        *shlex.split(environment.get("CMAKE_ARGS", "")),
        f"-DSTACKBERT_CUDA={'ON' if cuda.nvcc else 'OFF'}",
        f"-DSTACKBERT_WHY_NO_CUDA={cuda.why_not}",
        *([f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={cuda.archs}"] if cuda.nvcc else []),
    ]


def jobs(environment: Mapping[str, str]) -> int:
    value = environment.get("MAX_JOBS") or str(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    if not value.isdigit() or int(value) < 1:
        raise BuildError(f"MAX_JOBS must be a number >= 1, got {value!r}")
    return int(value)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _run(*command: str | Path) -> None:
    status = subprocess.run(command).returncode
    if status:
        raise BuildError(
            f"{shlex.join(map(str, command[:3]))} ... failed with exit status {status}; its output says why"
        )


def _tool(name: str, folder: str) -> str:
    """cmake or ninja: from the Python package of that name, whose `folder` need not be on PATH, else from PATH (an isolated build)."""
    try:
        packaged = getattr(import_module(name), folder)
    except ImportError:
        packaged = ""
    found = shutil.which(name, path=packaged) or shutil.which(name)
    if not found:
        raise BuildError(f"{name} must be on PATH or installed (pip install {name})")
    return found


def packages() -> list[str]:
    """Ours, and the benchmarks, which lie beside the package and are installed inside it: their name alone belongs to everybody."""
    benchmarks = [f"{PACKAGE}.{name}" for name in find_packages(ROOT, include=["benchmarks", "benchmarks.*"])]
    return find_packages(ROOT, include=[PACKAGE, f"{PACKAGE}.*"]) + benchmarks


class CMakeBuild(build_ext):
    """One build folder for wheels, editable and in-place builds of an interpreter, so that each compiles only what changed."""

    def build_extension(self, ext):
        import pybind11

        cuda = find_cuda(os.environ)
        print(
            f"built for CUDA {cuda.archs} with {cuda.nvcc}" if cuda.nvcc else f"built without CUDA: {cuda.why_not}",
            flush=True,
        )
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{self.plat_name}"
        cmake = _tool("cmake", "CMAKE_BIN_DIR")
        _run(
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja', 'BIN_DIR')}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *cmake_arguments(cuda, os.environ),
        )
        _run(cmake, "--build", build, "--parallel", str(jobs(os.environ)))
        _run(cmake, "--install", build, "--prefix", output.parent)


if __name__ == "__main__":
    try:
        setup(
            packages=packages(),
            package_dir={f"{PACKAGE}.benchmarks": "benchmarks"},
            ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
            cmdclass={"build_ext": CMakeBuild},
        )
    except BuildError as error:
        sys.exit(f"stackbert_kernels: {error}")
