"""bias_gelu, forward and backward, beside F.gelu(x + bias) and a plain copy of as many bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import arguments, compare, report, speedup

from stackbert_kernels import ops

SHAPES = [(8192, 3072), (2048, 3072), (2048, 512)]  # (R, C)


def bytes_moved(rows: int, columns: int, itemsize: int) -> int:
    return rows * columns * itemsize * 5  # forward reads x and writes y; backward reads dy and x and writes dx


def measure(rows: int, columns: int, dtype: torch.dtype, approximate: str, repeats: int) -> dict[str, object]:
    x, bias, dy = torch.randn(rows, columns).to(dtype), torch.randn(columns), torch.randn(rows, columns).to(dtype)
    x.requires_grad_(), bias.requires_grad_()

    def native() -> torch.Tensor:
        return ops.bias_gelu(x, bias, approximate=approximate, impl="native")

    def torchs() -> torch.Tensor:
        return F.gelu(x + bias.to(dtype), approximate=approximate)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (x, bias), dy)

    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(native(), torchs(), **tolerance)
    torch.testing.assert_close(gradients(native())[0], gradients(torchs())[0], **tolerance)

    moved = bytes_moved(rows, columns, x.element_size())
    source, target = torch.ones(moved // 8), torch.zeros(moved // 8)
    kept = native()
    stats = compare(
        {
            "native": lambda: gradients(native()),
            "torch": lambda: gradients(torchs()),
            "copy": lambda: target.copy_(source),
            "forward": native,
            "backward": lambda: torch.autograd.grad(kept, (x, bias), dy, retain_graph=True),
        },
        repeats=repeats,
    )
    return {
        "R x C": f"{rows} x {columns}",
        "dtype": str(dtype).removeprefix("torch."),
        "approximate": approximate,
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
        measure(*shape, dtype, approximate, options.repeats)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for approximate in ("none", "tanh")
    ]
    report(rows, options.json)


if __name__ == "__main__":
    main()
