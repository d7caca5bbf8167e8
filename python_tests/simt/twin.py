"""The CUDA kernels on the host: builds csrc/simt and runs a native CUDA function of an op on CPU tensors.

    with Device(twin, seed=3, inputs={"x": x}):
        y = native.layer_norm_forward_only_cuda(x, weight, bias, 1e-12)

What is a named input may be read; what torch allocates inside may be written too; any other address stops the kernel. Fresh tensors are
NaN, so that what a kernel forgets to write is seen.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stackbert_kernels.ops import _library as library

ROOT = Path(__file__).parents[2]
SEEDS = range(8)


def build(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """The module `_simt` of these sources, compiled in `folder`: only what changed since it was there last. One process loads one."""
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", csrc / "simt", "-B", folder, "-G", "Ninja", f"-DCSRC={csrc}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", folder]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{ran.stdout}\n{ran.stderr}")
    (file,) = folder.glob("_simt.*.so")
    return file


def load(file: Path) -> object:
    spec = importlib.util.spec_from_file_location("_simt", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Device(TorchDispatchMode):
    """While it is entered, library.launch and library.ask reach the twin."""

    def __init__(self, module, seed: int, inputs: dict[str, torch.Tensor]):
        super().__init__()
        self.module, self.seed, self.kept = module, seed, []
        self.inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def __enter__(self):
        self.module.forget()
        self.module.set_seed(self.seed)
        for name, tensor in self.inputs.items():
            storage = tensor.untyped_storage()
            self.module.allow(storage.data_ptr(), storage.nbytes(), False, name)
        self.known = {tensor.untyped_storage().data_ptr() for tensor in self.inputs.values()}
        self.real = library.launch, library.ask
        library.launch, library.ask = self.launch, self.ask
        return super().__enter__()

    def __exit__(self, *raised):
        library.launch, library.ask = self.real
        self.module.forget()
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(tensor):
                self._allow(function, tensor)
        return result

    def _allow(self, function, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in self.known:
            return
        if "empty" in function.name() and tensor.is_floating_point():
            tensor.fill_(torch.nan)
        self.known.add(storage.data_ptr())
        self.kept.append(tensor)  # its address must not be given out again
        self.module.allow(storage.data_ptr(), storage.nbytes(), True, f"allocation {len(self.kept)}")

    def launch(self, function: str, x: torch.Tensor, /, **arguments) -> None:
        getattr(self.module, function)(**arguments, device=0, stream=0)

    def ask(self, function: str, x: torch.Tensor, /, **arguments) -> int:
        return getattr(self.module, function)(**arguments, device=0)
