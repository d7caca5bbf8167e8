"""Phase 3: compute-sanitizer's memcheck and racecheck over every op and implementation on small shapes, judged by exit status.

The tools run side by side; each runs this module again (`--exercise`), which runs the ops one after another and names each it has done. torch's
caching allocator is off there: in one large block a read past the end of a tensor would be a read of the next one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .. import results_file
from ..machine_code import cuda_tool
from .build import setup_module

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status for an error that the tool found; no other part of this uses it
# What it says where it cannot run at all: the runtime of the machine does not let it, or it does not know the GPU.
REFUSAL = re.compile(
    r"^=========.*(Device not supported|Internal Sanitizer Error|No attachable process|not permitted|[Ii]nsufficient permission"
    r"|[Uu]nable to |driver.* not supported|before first instrumented API call)"
)
DTYPES = ("float32", "bfloat16", "float16")
# Takes compute-sanitizer's place where there is no GPU: runs what follows its options.
STAND_IN = "import os, sys; a = sys.argv[sys.argv.index('--') + 1:]; os.execv(a[0], a)"


def command(tool: list[str], check: str, exercise: list[str]) -> list[str]:
    options = ["--tool", check, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    return [*tool, *options, *exercise]


def plan(device: str) -> list[tuple[str, str, str]]:
    """(op, implementation, dtype): our kernels first, the reference, which runs torch's, last."""
    from stackbert_kernels import ops

    table = ops.available()
    cases = [(op, impl, dtype) for op in table for impl in table[op].get(device, []) for dtype in DTYPES]
    return sorted(cases, key=lambda case: (case[1] == "reference", case[2] == "float16"))


def exercise(device: str, seconds: float) -> int:
    """Forward and backward of each; ends in good time, so that a slow tool's work is not lost. Prints `done`, `refused` and `of` lines."""
    import torch

    from stackbert_kernels import doctor

    until = time.monotonic() + seconds
    cases, todo = doctor.cases(), plan(device)
    print(f"of {len(todo)}", flush=True)
    for op, impl, dtype in todo:
        if time.monotonic() > until:
            break
        tensors, call = cases[op]
        inputs = [t.to(device, getattr(torch, dtype)).requires_grad_() for t in tensors]
        try:
            y = call(*inputs, impl=impl)
        except ValueError as refusal:
            if f"impl={impl!r} cannot run here" not in str(refusal):
                raise
            print(f"refused {op} {impl} {dtype}: {refusal}", flush=True)
            continue
        if y.requires_grad:
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"done {op} {impl} {dtype}", flush=True)
    return 0


def verdict(status: int | None, output: str) -> dict:
    """What a tool's run means: passed, failed with the lines that say why, or skipped where the tool could not run."""
    done, refused = (len(re.findall(rf"^{word} ", output, flags=re.MULTILINE)) for word in ("done", "refused"))
    of = re.search(r"^of (\d+)$", output, flags=re.MULTILINE)
    counts = {"ran": done, "of": int(of[1]) - refused if of else None}
    refusal = next((line for line in output.splitlines() if REFUSAL.search(line)), None)
    if refusal and status != 0 and not done:
        return counts | {"state": "skipped", "reason": " ".join(refusal.strip("= ").split())}
    if status == 0 and done:
        return counts | {"state": "passed"}
    said = [line.strip("= ") for line in output.splitlines() if line.startswith("=========") and line.strip("= ")]
    said = [line for line in said if not line.startswith("COMPUTE-SANITIZER")] or output.strip().splitlines()[-1:]
    how = "errors found" if status == FOUND else f"exit status {status}"
    return counts | {"state": "failed", "reason": f"{how}: {' | '.join(said[:3])[:300]}", "said": said[:60]}


def summarise(verdicts: dict[str, dict]) -> dict:
    lines, failures = [], []
    for check, v in verdicts.items():
        count = f"{v['ran']} of {v['of']} op-implementation-dtype cases"
        line = f"{check} {v['state']}: {count if v['state'] == 'passed' else v['reason']}"
        (failures if v["state"] == "failed" else lines).append(line)
    result = {"verdicts": verdicts, "lines": lines, "failures": failures}
    reasons = [v["reason"] for v in verdicts.values() if v["state"] == "skipped"]
    return result | ({"skipped": reasons[0]} if len(reasons) == len(verdicts) else {})


def tool_command(root: Path, pretend: bool) -> list[str] | None:
    if pretend:
        return [sys.executable, "-c", STAND_IN]
    nvcc, _ = setup_module(root).find_nvcc(os.environ)
    found = shutil.which("compute-sanitizer") or cuda_tool("compute-sanitizer", nvcc)
    return [found] if found else None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--exercise", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--pretend", action="store_true")
    options = parser.parse_args()
    if options.exercise:
        return exercise(options.device, options.seconds)

    tool = tool_command(Path.cwd(), options.pretend)
    if tool is None:
        reason = "no compute-sanitizer on PATH or beside nvcc"
        results_file.write(options.result, {"skipped": reason, "lines": [reason]})
        return 0
    inner = [sys.executable, "-m", f"{__package__}.sanitize", "--exercise", "--device", options.device]
    inner += ["--seconds", str(0.75 * options.seconds)]  # the rest is for the tool's start and end
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    outputs = {check: options.result.with_name(f"{check}.txt") for check in TOOLS}
    running = {}
    for check, path in outputs.items():
        with path.open("w") as file:
            separator = ["--"] if options.pretend else []
            argv = command(tool, check, [*separator, *inner])
            running[check] = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=environment)
    verdicts = {}
    for check, process in running.items():
        status = process.wait()
        output = outputs[check].read_text(errors="replace")
        print(f"--- {check}: exit status {status}\n{output}")
        verdicts[check] = verdict(status, output)
        results_file.write(options.result, summarise(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
