"""Phase 2: `pytest -m gpu`. The tests that fill the GPU's memory run one after another beside the others, which several processes share."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

FILLS_MEMORY = "python_tests/gpu/test_gpu_offsets.py"
WORKERS = 12  # they share one GPU; what they save is time on the host, where Triton compiles some hundred kernels
PRETEND = {"others": "dropout and fp32 and (oracle or mask)", "memory": "dropout"}


def commands(outcomes: Path, pretend: bool) -> dict[str, list[str]]:
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", f"{__package__}.outcomes"]
    argv += ["--outcomes", str(outcomes), "--continue-on-collection-errors", "--tb=short"]
    if pretend:
        others = [*argv, f"--ignore={FILLS_MEMORY}", "python_tests/gpu", "-k", PRETEND["others"]]
        return {"others": others, "memory": [*argv, FILLS_MEMORY, "-k", PRETEND["memory"]]}
    shared = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    others = [*argv, *shared, "-m", "gpu", f"--ignore={FILLS_MEMORY}", "python_tests"]
    return {"others": others, "memory": [*argv, "-m", "gpu", FILLS_MEMORY]}


def worst(statuses: list[int]) -> int:
    """0 and 1 are pytest's for tests that ran; anything else, a signal too, is a run that broke."""
    broken = [status for status in statuses if status not in (0, 1)]
    return abs(broken[0]) + (128 if broken[0] < 0 else 0) if broken else max(statuses)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--pretend", action="store_true")
    options = parser.parse_args()
    made = commands(options.outcomes, options.pretend)
    output = options.outcomes.with_suffix(".txt")
    with output.open("w") as file:
        beside = subprocess.Popen(made["memory"], stdout=file, stderr=subprocess.STDOUT)
        statuses = [subprocess.run(made["others"]).returncode, beside.wait()]
    print(f"--- {FILLS_MEMORY}\n{output.read_text(errors='replace')}", flush=True)
    return worst(statuses)


if __name__ == "__main__":
    sys.exit(main())
