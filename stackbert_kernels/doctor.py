"""What this installation has and whether it computes right: `stackbert doctor`.

doctor() gathers everything as a plain dict (what --json prints), render() makes the text of it. Nothing heavy is imported before
doctor() is called, and a broken part (no torch, no compiled module, a failing kernel) becomes a line of the result.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

from stackbert_kernels import __version__

PACKAGES = ("torch", "numpy", "triton", "transformers", "tokenizers", "safetensors", "matplotlib")

# Largest error of an output or a gradient, as a share of the largest exact value. This tells a broken kernel from a sound one; how
# accurate each one is, the tests say (contract 3.10).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def doctor() -> dict:
    """versions, build, devices, ops (what "auto" takes where, and why not the others), self_test, passed."""
    report = {"versions": _versions(), "build": {}, "devices": [], "ops": {}}
    try:
        import_module("stackbert_kernels.ops")
    except Exception as error:
        reason = f"stackbert_kernels.ops cannot be imported: {type(error).__name__}: {error}"
        return report | {"self_test": {"seconds": 0.0, "results": [], "error": reason}, "passed": False}
    devices = _devices()
    report |= {"build": _build(), "devices": devices, "ops": _ops([d["device"] for d in devices])}
    start = time.perf_counter()
    results = [result for d in devices for result in _self_test(d["device"])]
    report["self_test"] = {"seconds": time.perf_counter() - start, "results": results, "error": None}
    return report | {"passed": all(r["passed"] for r in results)}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"stackbert_kernels": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _build() -> dict:
    from stackbert_kernels.ops._library import _C, WHY_NO_NATIVE

    if _C is None:
        return {"compiled": False, "reason": WHY_NO_NATIVE}
    return {"compiled": True, "file": _C.__file__, "isa": _C.isa(), **_C.build_info()}


def _devices() -> list[dict]:
    import torch

    devices = [{"device": "cpu", "name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append({
            "device": f"cuda:{index}",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        })  # fmt: skip
    return devices


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _ops(devices: list[str]) -> dict:
    """{op: {device: {auto, why_not {implementation: reason}}}} for float32 tensors."""
    import torch

    from stackbert_kernels import ops

    table: dict = {}
    for op in ops.available():
        table[op] = {}
        for device in devices:
            explanation = ops.explain(op, torch.empty(2, 2, device=device))
            table[op][device] = {"auto": explanation.chosen, "why_not": explanation.why_not}
    return table


# --- self-test ---


def cases() -> dict[str, tuple[list, Callable]]:
    """{op: (tensors that get gradients, the call on them and an implementation)}, small, with dropout and odd sizes."""
    import torch

    from stackbert_kernels import ops

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int):
        # Values that bfloat16 holds exactly: so the exact result is the same for every dtype.
        return torch.randn(*shape, generator=generator).bfloat16().double()

    def rng(x):
        return ops.new_rng(7, 11, device=x.device)

    x, residual, weight, bias = normal(19, 72), normal(19, 72), normal(72), normal(72)
    qkv = [normal(21, 2, 32) for _ in range(3)]
    lengths = torch.tensor([0, 5, 6, 21], dtype=torch.int32)
    labels = torch.tensor([(17 * i) % 150 if i % 4 else -100 for i in range(19)])
    indices = [torch.tensor([(step * i) % rows for i in range(19)]) for step, rows in ((11, 30), (1, 8), (3, 2))]
    dropout = {"dropout_p": 0.1, "site": 3}
    return {
        "embedding_layer_norm": (
            [normal(30, 72), normal(8, 72), normal(2, 72), weight, bias],
            lambda word, *rest, impl: ops.embedding_layer_norm(
                *(i.to(word.device) for i in indices), word, *rest, rng=rng(word), impl=impl, **dropout
            ),
        ),
        "attention": (
            qkv,
            lambda q, k, v, impl: ops.attention_varlen(q, k, v, lengths.to(q.device), 15, rng=rng(q), impl=impl, **dropout),
        ),
        "layer_norm": ([x, weight, bias], lambda *t, impl: ops.layer_norm(*t, impl=impl)),
        "dropout_add_layer_norm": (
            [x, residual, weight, bias, normal(72)],
            lambda x, residual, weight, bias, x_bias, impl: ops.dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, rng=rng(x), impl=impl, **dropout
            ),
        ),
        "dropout_add": (
            [x, residual, bias],
            lambda x, residual, x_bias, impl: ops.dropout_add(x, residual, x_bias=x_bias, rng=rng(x), impl=impl, **dropout),
        ),
        "bias_gelu": ([x, bias], lambda *t, impl: ops.bias_gelu(*t, impl=impl)),
        "dropout": ([x], lambda x, impl: ops.dropout(x, 0.1, rng=rng(x), site=3, impl=impl)),
        "masked_lm_loss": (
            [x, normal(150, 72), normal(150)],
            lambda *t, impl: ops.masked_lm_loss(*t, labels.to(t[0].device), impl=impl),
        ),
        # In place on a copy; its gradient is that of the copy, by torch.
        "duplicate_layers_": ([normal(6, 50)], lambda bank, impl: _duplicated(bank, impl)),
        **{
            op: ([x, residual], lambda weights, grads, impl, op=op: _stepped(op, weights, grads, impl))
            for op in ("adamw_", "lamb_", "lans_")
        },
        "global_norm": ([x, residual], lambda *t, impl: _norm(t, impl)),
    }  # fmt: skip


def _norm(tensors, impl: str):
    import torch

    from stackbert_kernels import ops

    with torch.no_grad():
        return ops.global_norm([t.float() if t.element_size() < 4 else t for t in tensors], impl=impl)


def _duplicated(bank, impl: str):
    import torch

    from stackbert_kernels import ops

    with torch.no_grad():
        return ops.duplicate_layers_(bank.clone(), [0, 0, 1, 1, 2, 2], impl=impl)


def _stepped(op: str, weights, grads, impl: str):
    import torch

    from stackbert_kernels import ops

    wide = torch.promote_types(weights.dtype, torch.float32)  # parameters are never narrower
    weights, grads = weights.detach().to(wide, copy=True), grads.detach().to(wide)
    moments = [torch.zeros_like(weights) for _ in range(2)]
    steps = torch.zeros(len(weights), device=weights.device)
    parts, clipped = ({}, {"max_norm": 1.0}) if op == "adamw_" else ({"parts": [[20, 30, 22]]}, {})
    getattr(ops, op)(
        [weights], [grads], [moments[0]], [moments[1]], [steps], [50], lr=0.1, weight_decay=0.5, norm=grads.norm(), impl=impl,
        **parts, **clipped,
    )  # fmt: skip
    return weights


def _self_test(device: str) -> list[dict]:
    from stackbert_kernels import ops

    kind = device.partition(":")[0]
    results = []
    for op, (tensors, call) in cases().items():
        exact = _outputs(call, tensors, "cpu", "float64", "reference")
        for impl in ops.available()[op].get(kind, []):
            for dtype in TOLERANCE:
                results.append(_judge(op, impl, device, dtype, call, tensors, exact))
    return results


def _judge(op: str, impl: str, device: str, dtype: str, call: Callable, tensors: list, exact: list) -> dict:
    result = {"op": op, "impl": impl, "device": device, "dtype": dtype, "allowed": TOLERANCE[dtype]}
    try:
        actual = _outputs(call, tensors, device, dtype, impl)
        errors = [float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, exact, strict=True)]
    except Exception as error:  # whatever a broken kernel raises belongs in the result
        return result | {"error": None, "passed": False, "message": f"{type(error).__name__}: {error}"}
    if not all(map(math.isfinite, errors)):
        return result | {"error": None, "passed": False, "message": "the result is not finite"}
    return result | {"error": max(errors), "passed": max(errors) <= TOLERANCE[dtype], "message": None}


def _outputs(call: Callable, tensors: list, device: str, dtype: str, impl: str) -> list:
    """The result and the gradient of every tensor, as float64 on the CPU."""
    import torch

    inputs = [t.to(device, getattr(torch, dtype)).requires_grad_() for t in tensors]
    y = call(*inputs, impl=impl)
    if not y.requires_grad:
        return [y.double().cpu()]
    # Exact in every dtype, of both signs, and not the same everywhere.
    dy = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.25])[torch.arange(y.numel()) % 5].reshape(y.shape)
    gradients = torch.autograd.grad(y, inputs, dy.to(y))
    return [t.detach().double().cpu() for t in (y, *gradients)]


# --- text ---


def render(report: dict) -> str:
    """What doctor() found, for people."""
    versions = [f"{name} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines = ["versions", *_wrapped(versions), "compiled module", f"  {_build_line(report['build'])}", "devices"]
    lines += [f"  {_device_line(device)}" for device in report["devices"]]
    if not any(device["device"].startswith("cuda") for device in report["devices"]):
        lines.append("  no GPU that torch can use")
    lines.append('ops: what impl="auto" takes')
    width = max((len(op) for op in report["ops"]), default=0)
    for op, by_device in report["ops"].items():
        for device, choice in by_device.items():
            others = "; ".join(
                f"not {i}: {reason.removeprefix(f'{op} has ')}" for i, reason in choice["why_not"].items()
            )
            lines.append(f"  {op:{width}}  {device:6}  {choice['auto']:9}  {others}".rstrip())
    return "\n".join([*lines, *_self_test_lines(report)])


def _wrapped(words: list[str]) -> list[str]:
    return [f"  {', '.join(words[i : i + 5])}" for i in range(0, len(words), 5)]


def _build_line(build: dict) -> str:
    if not build.get("compiled"):
        return f"none: {build.get('reason', 'not looked at')}"
    cuda = (
        f"CUDA {build['cuda']} for {', '.join(build['cuda_archs'])}"
        if build["cuda"]
        else f"no CUDA: {build['why_no_cuda']}"
    )
    return f"CPU kernels use {build['isa']}; {build['compiler']}, {build['build_type']}; {cuda}"


def _device_line(device: dict) -> str:
    if device["device"] == "cpu":
        return f"cpu: {device['name']}, {device['cores']} cores, {device['threads']} threads"
    return f"{device['device']}: {device['name']}, capability {device['capability']}, {device['memory_gib']} GiB"


def _self_test_lines(report: dict) -> list[str]:
    test = report["self_test"]
    if test["error"]:
        return [f"self-test FAILED: {test['error']}"]
    failed = [r for r in test["results"] if not r["passed"]]
    word = "passed" if report["passed"] else "FAILED"
    lines = [
        f"self-test {word}: {len(test['results']) - len(failed)} of {len(test['results'])} in {test['seconds']:.1f} s "
        "(each op and implementation, forward and backward, against float64)"
    ]
    for r in failed:
        what = r["message"] or f"relative error {r['error']:.2g}, allowed {r['allowed']:.2g}"
        lines.append(f"  {r['op']} {r['impl']} {r['device']} {r['dtype']}: {what}")
    return lines
