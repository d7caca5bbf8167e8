"""The build: what setup.py decides from the environment, and real builds of a fresh copy of the sources."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from stackbert_kernels import _C

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("stackbert_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build  # dataclasses look their module up
_spec.loader.exec_module(build)

NVCC, WHY_NO_NVCC = build.find_nvcc(os.environ)
CODES_13 = "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_103 sm_110 sm_120 sm_121"
CODES_12_4 = "sm_50 sm_70 sm_75 sm_80 sm_86 sm_89 sm_90"


@pytest.fixture
def toolkit(tmp_path):
    """Makes a folder with an nvcc that only answers questions."""

    def make(name: str, release: str = "13.0", codes: str = CODES_13) -> Path:
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        answers = (
            f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V1";; *) echo {codes};; esac'
        )
        nvcc.write_text(f"#!/bin/sh\n{answers}\n")
        nvcc.chmod(0o755)
        return nvcc

    return make


@pytest.fixture
def no_usual_place(monkeypatch):
    """As on a machine without CUDA in /usr/local."""
    which = shutil.which
    monkeypatch.setattr(
        build.shutil, "which", lambda name, **k: None if "/usr/local/cuda" in str(name) else which(name, **k)
    )


def test_nvcc_is_looked_for_where_it_is_named(toolkit):
    a, b, c = toolkit("a"), toolkit("b"), toolkit("c")
    path = str(c.parent)
    assert build.find_nvcc({"CUDACXX": str(a), "CUDA_HOME": str(b.parents[1]), "PATH": path})[0] == a
    assert build.find_nvcc({"CUDA_HOME": str(a.parents[1]), "CUDA_PATH": str(b.parents[1]), "PATH": path})[0] == a
    assert build.find_nvcc({"CUDA_PATH": str(b.parents[1]), "PATH": path})[0] == b
    assert build.find_nvcc({"CUDACXX": "nvcc", "PATH": path})[0] == c
    assert build.find_nvcc({"PATH": path})[0] == c


def test_a_named_place_without_nvcc_is_believed(toolkit):
    path = str(toolkit("c").parent)
    assert build.find_nvcc({"CUDA_HOME": "/nowhere", "PATH": path}) == (None, "no nvcc at CUDA_HOME=/nowhere")


def test_no_nvcc(no_usual_place):
    cuda = build.find_cuda({"PATH": "/nowhere"})
    assert cuda.nvcc is None and cuda.why_not == "no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    with pytest.raises(build.BuildError, match="STACKBERT_FORCE_CUDA_BUILD=1: no nvcc in"):
        build.find_cuda({"PATH": "/nowhere", "STACKBERT_FORCE_CUDA_BUILD": "1"})


def test_an_old_toolkit_is_none(toolkit):
    environment = {"CUDACXX": str(toolkit("old", "12.4", CODES_12_4))}
    assert build.find_cuda(environment).why_not.endswith("nvcc is CUDA 12.4, wanted 12.8 or newer")
    with pytest.raises(build.BuildError, match=r"wanted 12\.8 or newer"):
        build.find_cuda(environment | {"STACKBERT_FORCE_CUDA_BUILD": "1"})


def test_skip_and_force(toolkit):
    environment = {"CUDACXX": str(toolkit("a"))}
    assert build.find_cuda(environment | {"STACKBERT_SKIP_CUDA_BUILD": "1"}).why_not == "STACKBERT_SKIP_CUDA_BUILD=1"
    assert build.find_cuda(environment | {"STACKBERT_FORCE_CUDA_BUILD": "1"}).nvcc
    with pytest.raises(build.BuildError, match="at most one of"):
        build.find_cuda({"STACKBERT_SKIP_CUDA_BUILD": "1", "STACKBERT_FORCE_CUDA_BUILD": "1"})
    with pytest.raises(build.BuildError, match="STACKBERT_SKIP_CUDA_BUILD must be 0 or 1, got 'yes'"):
        build.find_cuda({"STACKBERT_SKIP_CUDA_BUILD": "yes"})


def test_default_architectures_are_those_that_the_toolkit_knows(toolkit):
    assert build.find_cuda({"CUDACXX": str(toolkit("a"))}).archs == (
        "80-real;86-real;89-real;90a-real;100a-real;120a-real;120-virtual"
    )
    assert build.default_archs(CODES_12_4) == "80-real;86-real;89-real;90a-real;90-virtual"
    with pytest.raises(build.BuildError, match=r"nvcc must know one of 80, .*, got sm_50"):
        build.default_archs("sm_50")


def test_architectures_by_precedence(toolkit):
    environment = {"CUDACXX": str(toolkit("a")), "TORCH_CUDA_ARCH_LIST": "9.0;10.0+PTX"}
    assert build.find_cuda(environment).archs == "90-real;100-real;100-virtual"
    environment["CMAKE_CUDA_ARCHITECTURES"] = "86"
    assert build.find_cuda(environment).archs == "86"
    environment["CMAKE_ARGS"] = "-DX=1 -DCMAKE_CUDA_ARCHITECTURES:STRING=80;89-real"
    assert build.find_cuda(environment).archs == "80;89-real"
    environment["STACKBERT_CUDA_ARCHS"] = "90a, 120-virtual"
    cuda = build.find_cuda(environment)
    assert cuda.archs == "90a;120-virtual"
    arguments = build.cmake_arguments(cuda, environment)
    assert arguments[:2] == ["-DX=1", "-DCMAKE_CUDA_ARCHITECTURES:STRING=80;89-real"]  # CMake takes the last
    assert arguments[-1] == "-DCMAKE_CUDA_ARCHITECTURES=90a;120-virtual"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "entries such as 9.0, 9.0a or 10.0+PTX, got 'Hopper'"),
        ("CMAKE_CUDA_ARCHITECTURES", "native", "entries such as 80, 90a-real or 120-virtual, got 'native'"),
        ("STACKBERT_CUDA_ARCHS", "9.0", "entries such as 80, 90a-real or 120-virtual, got '9.0'"),
        ("STACKBERT_CUDA_ARCHS", ";", "at least one architecture, got ';'"),
    ],
)
def test_bad_architectures(variable, value, message):
    with pytest.raises(build.BuildError, match=re.escape(f"{variable} must list {message}")):
        build.wanted_archs({variable: value})


def test_torch_spelling():
    assert build.from_torch("8.0 8.6,9.0a") == "80-real;86-real;90a-real"
    assert build.from_torch("12.0+PTX") == "120-real;120-virtual"


def test_jobs():
    assert build.jobs({"MAX_JOBS": "3"}) == 3 and build.jobs({}) >= 1
    with pytest.raises(build.BuildError, match="MAX_JOBS must be a number >= 1, got '0'"):
        build.jobs({"MAX_JOBS": "0"})


def test_the_benchmarks_are_installed_inside_the_package():
    names = build.packages()
    assert {"stackbert_kernels", "stackbert_kernels.ops.attention", "stackbert_kernels.benchmarks"} <= set(names)
    assert all(name.split(".")[0] == "stackbert_kernels" for name in names)


def test_tools_come_from_their_package_or_else_from_path(tmp_path, monkeypatch):
    """In an isolated build the package is there, but its folder of scripts is another environment's."""
    for folder in ("package", "path"):
        (tmp_path / folder).mkdir()
    (tmp_path / "path" / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "path" / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(build, "import_module", lambda name: SimpleNamespace(BIN_DIR=str(tmp_path / "package")))
    assert build._tool("ninja", "BIN_DIR") == str(tmp_path / "path" / "ninja")
    shutil.copy(tmp_path / "path" / "ninja", tmp_path / "package" / "ninja")
    assert build._tool("ninja", "BIN_DIR") == str(tmp_path / "package" / "ninja")
    monkeypatch.setenv("PATH", "")
    (tmp_path / "package" / "ninja").unlink()
    with pytest.raises(build.BuildError, match="ninja must be on PATH or installed"):
        build._tool("ninja", "BIN_DIR")


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (["80-real"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        (["86-real"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["90a-real"], [(9, 0)], [(8, 9), (10, 0)]),
        (["100a-real", "120a-real"], [(10, 0), (12, 0)], [(10, 3), (12, 1)]),
        (["100f-real"], [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        (["90-virtual"], [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        (["80"], [(8, 0), (12, 0)], [(7, 5)]),
        ([], [], [(9, 0)]),
    ],
)
def test_which_devices_built_code_runs_on(archs, runs, does_not):
    assert [_C.cuda_archs_why_not(archs, *device) for device in runs] == [""] * len(runs)
    for major, minor in does_not:
        message = f"the device is sm_{major}{minor}, this module was built for {' '.join(archs)}; build it again with "
        assert _C.cuda_archs_why_not(archs, major, minor) == f"{message}STACKBERT_CUDA_ARCHS={major}{minor}"


def test_build_info_is_whole():
    info = _C.build_info()
    assert set(info) == {"compiler", "build_type", "cuda", "cuda_archs", "why_no_cuda"}
    assert (info["cuda"] is None) == bool(info["why_no_cuda"]) == (not _C.cuda_archs())
    assert info["cuda"] or not _C.cuda_available()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What a clone has: no build folder, no compiled module. Later builds in it compile only what differs."""
    copy = tmp_path_factory.mktemp("clone")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy / file.name)
    for folder in ("csrc", "stackbert_kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def wheel(sources: Path, into: Path, **settings: str) -> tuple[Path, str]:
    """The wheel, and what the build printed. Isolation would download the build's requirements; those of this environment serve."""
    environment = {
        name: value for name, value in os.environ.items() if not re.match(r"STACKBERT_|CMAKE_|TORCH_CUDA", name)
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        into,
        sources,
    ]
    ran = subprocess.run(
        command, env=environment | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    (built,) = into.glob("*.whl")
    return built, ran.stdout


def ask_in_clean_environment(built: Path, folder: Path, question: str) -> str:
    """Installs the wheel alone in a new environment, runs a line of Python in it outside the sources."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    target = next((folder / "lib").glob("python3*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-index", "--target", target, built]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([python, "-c", question], capture_output=True, text=True, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


ASK = "from stackbert_kernels import _C, __version__; i = _C.build_info(); print(__version__, _C.isa(), i['why_no_cuda'], *i['cuda_archs'])"


@pytest.mark.slow
def test_a_wheel_without_cuda(sources, tmp_path):
    built, printed = wheel(sources, tmp_path / "wheels", STACKBERT_SKIP_CUDA_BUILD="1")
    assert printed.count("built without CUDA: STACKBERT_SKIP_CUDA_BUILD=1") == 1
    names = zipfile.ZipFile(built).namelist()
    ours = ("stackbert_kernels/", "stackbert_kernels-")
    assert "stackbert_kernels/config/__init__.py" in names and not [n for n in names if not n.startswith(ours)]
    assert "stackbert_kernels/benchmarks/__main__.py" in names and not [n for n in names if "results/" in n]
    answer = ask_in_clean_environment(built, tmp_path / "environment", ASK)
    assert answer == f"0.1.0 {_C.isa()} STACKBERT_SKIP_CUDA_BUILD=1"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason=WHY_NO_NVCC)
def test_a_wheel_with_cuda(sources, tmp_path):
    """Imports without a driver, needs no CUDA library, and holds machine code for what was asked."""
    settings = {"STACKBERT_FORCE_CUDA_BUILD": "1", "STACKBERT_CUDA_ARCHS": "80-real;90a-real"}
    built, printed = wheel(sources, tmp_path / "wheels", **settings)
    assert "built for CUDA 80-real;90a-real" in printed
    assert built.stat().st_size < 50 << 20
    environment = tmp_path / "environment"
    assert ask_in_clean_environment(built, environment, ASK) == f"0.1.0 {_C.isa()} None 80-real 90a-real"
    (module,) = environment.rglob("_C*.so")
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"cuda|cublas|nvrtc|torch|not found", needed.replace(str(environment), ""))
    cuobjdump = NVCC.resolve().parent / "cuobjdump"
    if cuobjdump.exists():
        listed = subprocess.run([cuobjdump, "--list-elf", module], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"sm_\w+(?=\.cubin)", listed)) == {"sm_80", "sm_90a"}
