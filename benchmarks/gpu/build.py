"""Phase 1: the extension for the GPU that is here, and what each of its kernels costs in registers, shared memory and stack."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from .. import machine_code, results_file

SKIP = "STACKBERT_SKIP_CUDA_BUILD"


def setup_module(root: Path) -> ModuleType:
    """setup.py of the source tree: it knows where nvcc is, and which architectures have instructions of their own."""
    spec = importlib.util.spec_from_file_location("stackbert_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def architecture(capability: tuple[int, int], own: tuple[str, ...]) -> str:
    """(9, 0) -> "90a-real" where "90a" is in `own`."""
    number = f"{capability[0]}{capability[1]}"
    return f"{number}a-real" if f"{number}a" in own else f"{number}-real"


def build(root: Path, arch: str) -> int:
    """setup.py's exit status. The compiler's own account of registers and spills goes to the log."""
    flags = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_FLAGS=-Xptxas=-v".strip()
    environment = {name: value for name, value in os.environ.items() if name != SKIP}
    environment |= {"STACKBERT_FORCE_CUDA_BUILD": "1", "STACKBERT_CUDA_ARCHS": arch, "CMAKE_ARGS": flags}
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root, env=environment).returncode


def build_info(root: Path) -> dict:
    """What the module says about itself, in a process of its own: this one may have imported an older one."""
    code = "import json; from stackbert_kernels import _C; print(json.dumps({'file': _C.__file__, **_C.build_info()}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the module does not load: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout)


def lines(info: dict, rows: list[dict]) -> list[str]:
    built = (
        f"CUDA {info['cuda']} for {' '.join(info['cuda_archs'])}" if info["cuda"] else f"no CUDA: {info['why_no_cuda']}"
    )
    summary = [f"{info['compiler']}, {built}"]
    if rows:
        most, stacked = rows[0], [row for row in rows if row["stack"]]
        summary[0] += f"; {len(rows)} kernels, most registers {most['registers']} ({most['kernel']})"
        summary += [f"stack {row['stack']} B, {row['registers']} registers: {row['kernel']}" for row in stacked[:4]]
        summary += [f"and {len(stacked) - 4} more with a stack"] if len(stacked) > 4 else []
    return summary


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--pretend", action="store_true", help="take the module that is built already")
    options = parser.parse_args()
    root = Path.cwd()
    setup = setup_module(root)
    if options.pretend:
        print("pretend: nothing is built, the module that is here is looked at")
    else:
        import torch

        arch = architecture(torch.cuda.get_device_capability(), setup.DEFAULT_ARCHS)
        print(f"building for {arch}")
        status = build(root, arch)
        if status:
            return 2
    info = build_info(root)
    result = {"info": info, "kernels": [], "lines": lines(info, [])}
    results_file.write(options.result, result)

    nvcc, _ = setup.find_nvcc(os.environ)
    cuobjdump = machine_code.cuda_tool("cuobjdump", nvcc)
    if not info["cuda"]:
        return 0
    if cuobjdump is None:
        result["lines"] += ["registers and spills not read: no cuobjdump beside nvcc, on PATH or in Triton"]
        results_file.write(options.result, result)
        return 0
    usage = subprocess.run([cuobjdump, "-res-usage", info["file"]], capture_output=True, text=True).stdout
    rows = machine_code.resource_usage(usage)
    for row, name in zip(rows, machine_code.readable(row["kernel"] for row in rows), strict=True):
        row["kernel"] = name
    print(f"{'registers':>9} {'shared':>7} {'stack':>6}  kernel")
    for row in rows:
        print(f"{row['registers']:>9} {row['shared']:>7} {row['stack']:>6}  {row['kernel']}")
    results_file.write(options.result, result | {"kernels": rows, "lines": lines(info, rows)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
