"""dropout_add_layer_norm and layer_norm, forward and backward, beside torch's composite and a plain copy of as many bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import arguments, compare, report, speedup

from stackbert_kernels import ops

SHAPES = [(8192, 768), (2048, 768), (8192, 128)]  # (R, C)
EPS = 1e-12


def bytes_moved(rows: int, columns: int, itemsize: int, residual: bool) -> int:
    """Forward reads x (and the residual) and writes y; backward reads dy and the same and writes their gradients."""
    return rows * columns * itemsize * (8 if residual else 5)


def measure(rows: int, columns: int, dtype: torch.dtype, p: float | None, repeats: int) -> dict[str, object]:
    """p None: layer_norm alone."""
    x, residual, dy = (torch.randn(rows, columns).to(dtype) for _ in range(3))
    x.requires_grad_(), residual.requires_grad_()
    weight, bias = torch.randn(columns, requires_grad=True), torch.randn(columns, requires_grad=True)
    inputs = [x, weight, bias] if p is None else [x, residual, weight, bias]
    rng = ops.new_rng(0)

    def forward(impl: str, p: float | None = p) -> torch.Tensor:
        if p is None:
            return ops.layer_norm(x, weight, bias, EPS, impl=impl)
        return ops.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=p, rng=rng, eps=EPS, impl=impl)

    def torchs(p: float | None = p) -> torch.Tensor:
        z = x if p is None else residual + F.dropout(x, p)
        return F.layer_norm(z, (columns,), weight.to(dtype), bias.to(dtype), EPS)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy)

    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(forward("native"), forward("reference"), **tolerance)
    torch.testing.assert_close(gradients(forward("native"))[0], gradients(forward("reference"))[0], **tolerance)
    without = None if p is None else 0.0
    torch.testing.assert_close(forward("native", without), torchs(without), **tolerance)

    moved = bytes_moved(rows, columns, x.element_size(), p is not None)
    source, target = torch.ones(moved // 8), torch.zeros(moved // 8)
    kept = forward("native")
    stats = compare(
        {
            "native": lambda: gradients(forward("native")),
            "torch": lambda: gradients(torchs()),
            "copy": lambda: target.copy_(source),
            "forward": lambda: forward("native"),
            "backward": lambda: torch.autograd.grad(kept, inputs, dy, retain_graph=True),
        },
        repeats=repeats,
    )
    return {
        "op": "layer_norm" if p is None else f"dropout_add_layer_norm p={p:g}",
        "R x C": f"{rows} x {columns}",
        "dtype": str(dtype).removeprefix("torch."),
        "native ms": 1e3 * stats["native"].median,
        "forward ms": 1e3 * stats["forward"].median,
        "backward ms": 1e3 * stats["backward"].median,
        "native GB/s": moved / stats["native"].median / 1e9,
        "share of copy": speedup(stats, "copy", "native").median,
        "torch ms": 1e3 * stats["torch"].median,
        "speed-up": speedup(stats, "torch", "native").median,
        "p20": speedup(stats, "torch", "native").p20,
    }


def main() -> None:
    options = arguments(__doc__)
    rows = [
        measure(*shape, dtype, p, options.repeats)
        for p in (0.1, 0.0, None)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
