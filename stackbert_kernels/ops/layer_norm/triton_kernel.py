"""layer_norm, dropout_add_layer_norm and dropout_add in Triton. R rows, C columns.

A row belongs to one warp, or to a few where it is long, and lies in registers as CHUNKS blocks of COLUMNS, of which each lane
holds 16 bytes: so every access is 128-bit, and 768 columns are 3 x 256 with no lane idle. Programs are persistent and walk over the
rows ROWS at a time. benchmarks/notes/triton_rows.md counts bytes and instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from stackbert_kernels.ops import _triton, philox
from stackbert_kernels.ops.dropout.triton_kernel import dropout
from stackbert_kernels.ops.layer_norm.triton_backward import add_up_kernel, dropout_bias_bwd_kernel, norm_bwd_kernel
from stackbert_kernels.ops.layer_norm.triton_forward import forward_kernel


@dataclass(frozen=True)
class Configuration:
    """How a kernel walks over the rows."""

    lane: int  # elements of a row that a lane holds, at most: sets how many warps a row has
    num_warps: int  # of a program, at least
    warps: int  # on an SM: as many programs as that are started, and registers must suffice for them
    stages: int = 1  # this many tiles less one are loaded ahead


@dataclass(frozen=True)
class Configurations:
    forward: Configuration
    backward: Configuration
    dropout_bias_bwd: Configuration


# What a tuning run tries; the first of each is kept until one has been measured.
CANDIDATES = {
    "forward": (Configuration(32, 1, 24), Configuration(32, 4, 24), Configuration(32, 1, 20), Configuration(16, 4, 32)),
    "backward": (Configuration(24, 4, 8, 3), Configuration(24, 4, 8, 2), Configuration(24, 4, 8), Configuration(16, 4, 12, 3)),
    "dropout_bias_bwd": (Configuration(32, 4, 24), Configuration(32, 4, 16)),
}  # fmt: skip
_FIRST = Configurations(*(candidates[0] for candidates in CANDIDATES.values()))
# sm_86, sm_89 and sm_120 hold at most 16 or 24 programs on an SM: not enough of one warp.
_FEW_PROGRAMS = replace(_FIRST, forward=CANDIDATES["forward"][1])
CONFIGURATIONS = {80: _FEW_PROGRAMS, 90: _FIRST, 100: _FIRST, 120: _FEW_PROGRAMS}

AHEAD = 96 << 10  # bytes of shared memory for tiles loaded ahead: fits the 99 KB of sm_86, sm_89 and sm_120


def tiling(columns: int, itemsize: int, configuration: Configuration) -> tuple[dict[str, int], int]:
    """The constants of a kernel, and its warps."""
    vector = 16 // itemsize
    warps_a_row = triton.next_power_of_2(triton.cdiv(columns, 32 * configuration.lane))
    chunk = min(max(triton.next_power_of_2(columns), 16), 32 * vector * warps_a_row)
    num_warps = max(configuration.num_warps, warps_a_row)
    constants = {"C": columns, "ROWS": num_warps * 32 * vector // chunk, "COLUMNS": chunk}
    return constants | {"CHUNKS": triton.cdiv(columns, chunk), "GROUP": vector}, num_warps


def _stages(constants: dict[str, int], tensors: int, configuration: Configuration) -> int:
    tile = tensors * constants["ROWS"] * constants["COLUMNS"] * constants["CHUNKS"] * 16 // constants["GROUP"]
    return 1 + min(configuration.stages - 1, AHEAD // tile)


def _programs_of_an_sm(num_warps: int, configuration: Configuration) -> int:
    return max(1, configuration.warps // num_warps)


def registers(num_warps: int, configuration: Configuration) -> int:
    """Of a thread, at most: so that all programs of an SM are there at once. One that had to wait would double the time."""
    fitting = 65536 // (32 * num_warps * _programs_of_an_sm(num_warps, configuration))
    return min(fitting // 8 * 8, 255)


def grid_of(
    rows: int, rows_a_tile: int, num_warps: int, configuration: Configuration, device: torch.device
) -> tuple[int]:
    programs = _programs_of_an_sm(num_warps, configuration) * _triton.multiprocessors(device)
    return (min(triton.cdiv(rows, rows_a_tile), programs),)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    site: int,
    threshold: int,
    eps: float,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, residual = _triton.dense_rows(x), None if residual is None else _triton.dense_rows(residual)
    x_bias, weight, bias = _dense(x_bias), _dense(weight), _dense(bias)
    rows, columns = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) if statistics else None for _ in range(2))
    if rows == 0:
        return y, mean, rstd
    chosen = _triton.configuration(CONFIGURATIONS, x.device).forward
    constants, num_warps = tiling(columns, x.element_size(), chosen)
    with _triton.on(x.device):
        forward_kernel[grid_of(rows, constants["ROWS"], num_warps, chosen, x.device)](
            x, residual, x_bias, weight, bias, y, mean, rstd, rng, x.stride(0), _stride(residual), rows, site, threshold,
            philox.scale(threshold), eps, **constants, DROPOUT=threshold > 0, num_warps=num_warps,
            maxnreg=registers(num_warps, chosen),
        )  # fmt: skip
    return y, mean, rstd


def _adding_up(columns: int) -> dict[str, int]:
    """The tile of add_up_kernel: 4,096 elements, narrow enough that a row makes some 30 programs, which the launch is over with sooner."""
    width = min(max(triton.next_power_of_2(columns) // 32, 32), 256)
    return {"C": columns, "ROWS": 4096 // width, "COLUMNS": width}


def add_up(partial: Tensor, *parameters: Tensor) -> list[Tensor]:
    """partial [planes, programs, C] -> the sum of each plane, in the dtype of its parameter."""
    sums = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
    planes, programs, columns = partial.shape
    first, second, third = (*sums, None, None)[:3]
    constants = _adding_up(columns)
    grid = (triton.cdiv(columns, constants["COLUMNS"]), planes)
    add_up_kernel[grid](partial, first, second, third, programs, **constants, num_warps=4)
    return sums


def _norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    site: int,
    threshold: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    parameters = [weight, bias] if x_bias is None else [weight, bias, x_bias]
    dz = torch.empty_like(x, memory_format=torch.contiguous_format)
    dx = None if residual is None else torch.empty_like(dz)
    rows, columns = x.shape
    if rows == 0:
        sums = [torch.zeros_like(p) for p in parameters]
    else:
        dy, x, residual = (t if t is None else _triton.dense_rows(t) for t in (dy, x, residual))
        chosen = _triton.configuration(CONFIGURATIONS, x.device).backward
        constants, num_warps = tiling(columns, x.element_size(), chosen)
        (programs,) = grid = grid_of(rows, constants["ROWS"], num_warps, chosen, x.device)
        partial = x.new_empty((len(parameters), programs, columns), dtype=torch.float32)
        with _triton.on(x.device):
            norm_bwd_kernel[grid](
                dy, x, residual, _dense(x_bias), _dense(weight), mean, rstd, dx, dz, partial, rng, dy.stride(0), x.stride(0),
                _stride(residual), rows, site, threshold, philox.scale(threshold), **constants, DROPOUT=threshold > 0,
                STAGES=_stages(constants, 2 if residual is None else 3, chosen), num_warps=num_warps,
                maxnreg=registers(num_warps, chosen),
            )  # fmt: skip
            sums = add_up(partial, *parameters)
    return dx, dz, *sums, *([] if x_bias is not None else [weight.new_empty(0)])


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, None, None, weight, bias, None, 0, 0, eps, statistics=True)


def layer_norm_forward_only(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _forward(x, None, None, weight, bias, None, 0, 0, eps, statistics=False)[0]


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_bwd(dy, x, None, weight, bias, None, mean, rstd, None, 0, 0)[1:4]


def dropout_add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    rng: Tensor,
    site: int,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, x_bias, weight, bias, rng, site, threshold, eps, statistics=True)


def dropout_add_layer_norm_forward_only(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    rng: Tensor,
    site: int,
    threshold: int,
    eps: float,
) -> Tensor:
    return _forward(x, residual, x_bias, weight, bias, rng, site, threshold, eps, statistics=False)[0]


dropout_add_layer_norm_bwd = _norm_bwd


def dropout_add_fwd(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int
) -> Tensor:
    return _forward(x, residual, x_bias, None, None, rng, site, threshold, 0.0, statistics=False)[0]


def dropout_add_bwd(dy: Tensor, x_bias: Tensor | None, rng: Tensor, site: int, threshold: int) -> tuple[Tensor, Tensor]:
    rows, columns = dy.shape
    if x_bias is None:
        dx = dropout(dy, rng, site, threshold) if threshold else dy.clone(memory_format=torch.contiguous_format)
        return dx, dy.new_empty(0)
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    if rows == 0:
        return dx, torch.zeros_like(x_bias)
    dy = _triton.dense_rows(dy)
    chosen = _triton.configuration(CONFIGURATIONS, dy.device).dropout_bias_bwd
    constants, num_warps = tiling(columns, dy.element_size(), chosen)
    (programs,) = grid = grid_of(rows, constants["ROWS"], num_warps, chosen, dy.device)
    partial = dy.new_empty((1, programs, columns), dtype=torch.float32)
    with _triton.on(dy.device):
        dropout_bias_bwd_kernel[grid](
            dy, dx, partial, rng, dy.stride(0), rows, site, threshold, philox.scale(threshold), **constants,
            DROPOUT=threshold > 0, num_warps=num_warps,
            maxnreg=registers(num_warps, chosen),
        )  # fmt: skip
        (dx_bias,) = add_up(partial, x_bias)
    return dx, dx_bias


def compilations(arch: int) -> list[_triton.Compilation]:
    tuned = CONFIGURATIONS[arch]

    def kernel(name: str, function, columns: int, dtype: str, absent: tuple[str, ...] = (), max_spills: int = 0):
        """absent: arguments that are None; without rng_ptr there is no dropout."""
        chosen = {forward_kernel: tuned.forward, norm_bwd_kernel: tuned.backward}.get(function, tuned.dropout_bias_bwd)
        constants, num_warps = tiling(columns, 4 if dtype == "fp32" else 2, chosen)
        constants |= dict.fromkeys(absent) | {"DROPOUT": "rng_ptr" not in absent}
        if function is norm_bwd_kernel:
            constants["STAGES"] = _stages(constants, 2 if "residual_ptr" in absent else 3, chosen)
        kinds = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr", "dy_ptr", "dx_ptr", "dz_ptr"), f"*{dtype}:16")
        kinds |= {
            "rng_ptr": "*i64:16",
            "rows": "i32",
            "site": "i32",
            "threshold": "i32",
            "scale": "fp32",
            "eps": "fp32",
        }
        kinds |= {n: "i32:16" for n in function.arg_names if n.endswith("_stride")}
        single_numbers = {
            forward_kernel: 2 * ("mean_ptr" not in absent),
            norm_bwd_kernel: 6 + 3 * 12,  # mean and rstd of three tiles; the sums, once a program
            dropout_bias_bwd_kernel: 12,
        }[function] + 2 * constants["DROPOUT"]  # seed and step
        return _triton.Compilation(
            f"{name} {columns} {dtype}",
            function,
            {n: kinds.get(n, "*fp32:16") for n in function.arg_names if n not in constants},
            constants,
            num_warps,
            maxnreg=registers(num_warps, chosen),
            max_registers=registers(num_warps, chosen),
            max_spills=max_spills,
            max_narrow=single_numbers,
        )

    plain, frozen, no_norm = (
        ("residual_ptr", "x_bias_ptr", "rng_ptr"),
        ("mean_ptr", "rstd_ptr"),
        ("weight_ptr", "bias_ptr"),
    )
    add_norm, few = "dropout_add_layer_norm", 24  # spills of the widest rows, to L1, in a kernel that waits for memory
    planes = dict.fromkeys(("partial_ptr", "first_ptr", "second_ptr", "third_ptr"), "*fp32:16")
    return [
        kernel("layer_norm fwd", forward_kernel, 768, "bf16", plain),
        kernel(f"{add_norm} fwd", forward_kernel, 768, "bf16"),
        kernel(f"{add_norm} fwd", forward_kernel, 1024, "bf16", max_spills=2),
        kernel(f"{add_norm} fwd", forward_kernel, 768, "fp32", max_spills=2),
        kernel(f"{add_norm} fwd", forward_kernel, 768, "fp16"),
        kernel(f"{add_norm} fwd", forward_kernel, 8192, "bf16", max_spills=few),
        kernel(f"{add_norm} fwd, frozen, p 0", forward_kernel, 768, "bf16", (*frozen, "rng_ptr")),
        kernel("dropout_add fwd", forward_kernel, 768, "bf16", (*frozen, *no_norm)),
        kernel("layer_norm bwd", norm_bwd_kernel, 768, "bf16", (*plain, "dx_ptr")),
        kernel(f"{add_norm} bwd", norm_bwd_kernel, 768, "bf16"),
        kernel(f"{add_norm} bwd", norm_bwd_kernel, 1024, "bf16"),
        kernel(f"{add_norm} bwd", norm_bwd_kernel, 768, "fp32"),
        kernel(f"{add_norm} bwd", norm_bwd_kernel, 768, "fp16"),
        kernel(f"{add_norm} bwd", norm_bwd_kernel, 8192, "bf16", max_spills=few),
        kernel("dropout_add bwd", dropout_bias_bwd_kernel, 768, "bf16"),
        _triton.Compilation(
            "add_up 768 fp32", add_up_kernel, planes | {"programs": "i32"}, _adding_up(768), max_narrow=3
        ),
    ]
