"""embedding_layer_norm in Triton: one launch forward. Backward writes dz once, [T, C] float32, and sums it by the rows of each table.

T tokens, C columns. benchmarks/notes/triton_optimizer_embedding.md counts bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from stackbert_kernels.ops import _triton, philox
from stackbert_kernels.ops.embedding.order import sorted_by_row
from stackbert_kernels.ops.embedding.reference import check_values
from stackbert_kernels.ops.embedding.triton_rows import backward_kernel, forward_kernel
from stackbert_kernels.ops.embedding.triton_sums import join_pieces_kernel, sum_pieces_kernel
from stackbert_kernels.ops.layer_norm import triton_kernel as layer_norm


@dataclass(frozen=True)
class Sums:
    piece: int  # tokens of a program
    columns: int  # of a program: 128 = 16 bytes for each lane of a warp
    ahead: int  # loads that a lane has under way


@dataclass(frozen=True)
class Configurations:
    forward: layer_norm.Configuration
    backward: layer_norm.Configuration
    sums: Sums


# What a tuning run tries; the first of each is kept until one has been measured.
CANDIDATES = {
    "forward": (layer_norm.Configuration(32, 4, 16), layer_norm.Configuration(32, 4, 12), layer_norm.Configuration(16, 4, 24)),
    "backward": (layer_norm.Configuration(24, 4, 8), layer_norm.Configuration(16, 4, 12)),
    "sums": (Sums(64, 128, 8), Sums(32, 128, 8), Sums(128, 128, 8), Sums(64, 128, 4)),
}  # fmt: skip
_FIRST = Configurations(*(candidates[0] for candidates in CANDIDATES.values()))
CONFIGURATIONS = {80: _FIRST, 90: _FIRST, 100: _FIRST}
JOIN = {"COLUMNS": 64, "PIECES": 16}


def _dense(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _forward(
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    rng: Tensor,
    site: int,
    threshold: int,
    eps: float,
    dtype: torch.dtype,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    indices, tables = _dense((ids, positions, token_types)), _dense((word, position, token_type))
    if word.device.type == "cpu":
        check_values(indices, tables)
    tokens, columns = len(ids), word.shape[1]
    y = word.new_empty((tokens, columns), dtype=dtype)
    mean, rstd = (word.new_empty(tokens, dtype=torch.float32) if statistics else None for _ in range(2))
    if tokens:
        chosen = _triton.configuration(CONFIGURATIONS, word.device).forward
        constants, num_warps = layer_norm.tiling(columns, word.element_size(), chosen)
        with _triton.on(word.device):
            forward_kernel[layer_norm.grid_of(tokens, constants["ROWS"], num_warps, chosen, word.device)](
                *indices, *tables, *_dense((weight, bias)), y, mean, rstd, rng if threshold else None,
                tokens, *map(len, tables), site, threshold, philox.scale(threshold), eps, **constants, num_warps=num_warps,
                maxnreg=layer_norm.registers(num_warps, chosen),
            )  # fmt: skip
    return y, mean, rstd


def embedding_layer_norm_fwd(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(*arguments, statistics=True)


def embedding_layer_norm_forward_only(*arguments) -> Tensor:
    return _forward(*arguments, statistics=False)[0]


def embedding_layer_norm_bwd(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor,
    site: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices, tables = _dense((ids, positions, token_types)), _dense((word, position, token_type))
    tokens, columns = dy.shape
    if tokens == 0:
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (*tables, weight, bias))
    dy = _triton.dense_rows(dy)
    chosen = _triton.configuration(CONFIGURATIONS, word.device)
    constants, num_warps = layer_norm.tiling(columns, word.element_size(), chosen.backward)
    (programs,) = grid = layer_norm.grid_of(tokens, constants["ROWS"], num_warps, chosen.backward, word.device)
    dz = dy.new_empty((tokens, columns), dtype=torch.float32)
    partial = dz.new_empty((2, programs, columns))
    with _triton.on(word.device):
        backward_kernel[grid](
            dy, *indices, *tables, weight.contiguous(), mean, rstd, dz, partial, rng if threshold else None, dy.stride(0), tokens,
            *map(len, tables), site, threshold, philox.scale(threshold), **constants, num_warps=num_warps,
            maxnreg=layer_norm.registers(num_warps, chosen.backward),
        )  # fmt: skip
        dweight, dbias = layer_norm.add_up(partial, weight, bias)
        dtables = [_sums_by_row(i, dz, t, chosen.sums) for i, t in zip(indices, tables, strict=True)]
    return *dtables, dweight, dbias


def _sums_by_row(index: Tensor, dz: Tensor, table: Tensor, chosen: Sums) -> Tensor:
    """The gradient of the table: row r is the sum of dz where index is r."""
    tokens, columns = dz.shape
    rows = len(table)
    row, token = sorted_by_row(index, rows)
    gradient = torch.zeros_like(table)
    pieces, constants = triton.cdiv(tokens, chosen.piece), {"C": columns, "PIECE": chosen.piece}
    parts = dz.new_empty((pieces, 2, columns))
    sum_pieces_kernel[(pieces, triton.cdiv(columns, chosen.columns))](
        row,
        token,
        dz,
        parts,
        gradient,
        tokens,
        rows,
        **constants,
        COLUMNS=chosen.columns,
        AHEAD=chosen.ahead,
        num_warps=1,
    )
    if pieces > 1:
        join_pieces_kernel[(pieces - 1, triton.cdiv(columns, JOIN["COLUMNS"]))](
            row, parts, gradient, tokens, rows, **constants, **JOIN, num_warps=4
        )
    return gradient


def compilations(arch: int) -> list[_triton.Compilation]:
    chosen = CONFIGURATIONS[arch]
    numbers = dict.fromkeys(("tokens", "words", "positions", "token_types", "site", "threshold", "rows"), "i32")
    numbers |= {"scale": "fp32", "eps": "fp32", "dy_stride": "i32:16"}
    indices = dict.fromkeys(("ids_ptr", "positions_ptr", "token_types_ptr", "rng_ptr", "token_ptr"), "*i64:16")

    def tokens_kernel(name: str, function, columns: int, tables: str, dtype: str, absent: tuple[str, ...] = ()):
        """absent: arguments that are None; without rng_ptr there is no dropout."""
        tuned = chosen.forward if function is forward_kernel else chosen.backward
        constants, num_warps = layer_norm.tiling(columns, 4 if tables == "fp32" else 2, tuned)
        constants |= dict.fromkeys(absent)
        kinds = numbers | indices | dict.fromkeys(("word_ptr", "position_ptr", "token_type_ptr"), f"*{tables}:16")
        kinds |= {"y_ptr": f"*{dtype}:16", "dy_ptr": f"*{dtype}:16"}
        return _triton.Compilation(
            f"embedding {name} {columns} {tables} to {dtype}",
            function,
            {n: kinds.get(n, "*fp32:16") for n in function.arg_names if n not in constants},
            constants,
            num_warps,
            maxnreg=layer_norm.registers(num_warps, tuned),
            max_registers=layer_norm.registers(num_warps, tuned),
            max_narrow=16
            if function is forward_kernel
            else 28,  # indices, statistics, half a vector of y; sums, once a program
        )

    def sums_kernel(name: str, function, **constants: int):
        kinds = numbers | indices | {"row_ptr": "*i16:16"}
        constants |= {"C": 768, "PIECE": chosen.sums.piece}
        return _triton.Compilation(
            f"embedding {name} 768 fp32",
            function,
            {n: kinds.get(n, "*fp32:16") for n in function.arg_names if n not in constants},
            constants,
            num_warps=1 if function is sum_pieces_kernel else 4,
            max_registers=128,
            max_narrow=36 if function is sum_pieces_kernel else 8,  # rows and tokens
        )

    return [
        tokens_kernel("fwd", forward_kernel, 768, "fp32", "bf16"),
        tokens_kernel("fwd", forward_kernel, 768, "fp32", "fp16"),
        tokens_kernel("fwd", forward_kernel, 1024, "fp32", "bf16"),
        tokens_kernel("fwd", forward_kernel, 768, "bf16", "bf16"),
        tokens_kernel("fwd, frozen, p 0", forward_kernel, 768, "fp32", "bf16", ("mean_ptr", "rstd_ptr", "rng_ptr")),
        tokens_kernel("bwd", backward_kernel, 768, "fp32", "bf16"),
        tokens_kernel("bwd", backward_kernel, 1024, "fp32", "bf16"),
        sums_kernel("sum pieces", sum_pieces_kernel, COLUMNS=chosen.sums.columns, AHEAD=chosen.sums.ahead),
        sums_kernel("join pieces", join_pieces_kernel, **JOIN),
    ]
