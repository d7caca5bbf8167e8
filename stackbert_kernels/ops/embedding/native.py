"""embedding_layer_norm by csrc/embedding. T tokens, C columns. `run` is where it runs: _cpu or _cuda."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, as_float32, empty, empty_like
from stackbert_kernels.ops.embedding.order import sorted_by_row


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _inputs(indices: list[Tensor], tables: list[Tensor], dtype: torch.dtype) -> dict:
    """The arguments of both passes that say what is gathered."""
    return {
        "ids": [i.data_ptr() for i in indices],
        "tables": [t.data_ptr() for t in tables],
        "table_rows": [len(t) for t in tables],
        "tokens": len(indices[0]),
        "columns": tables[0].shape[1],
        "table_dtype": NATIVE_DTYPES[tables[0].dtype],
        "dtype": NATIVE_DTYPES[dtype],
    }


def _cpu(function: str, x: Tensor, /, **arguments) -> None:
    getattr(_C, function)(**arguments, threads=torch.get_num_threads())


def _cuda(function: str, x: Tensor, /, **arguments) -> None:
    library.launch(f"{function}_cuda", x, **arguments)


def _held(run: Callable, dtype: torch.dtype) -> torch.dtype:
    """What the kernels write; other dtypes go by float32."""
    taken = (torch.float32, torch.bfloat16, torch.float16) if run is _cuda else (torch.float32, torch.bfloat16)
    return dtype if dtype in taken else torch.float32


def _forward(
    run: Callable,
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
    indices, tables = _dense(ids, positions, token_types), _dense(word, position, token_type)
    weight, bias = as_float32(weight), as_float32(bias)
    shape, held, scratch = (len(ids), word.shape[1]), _held(run, dtype), {}
    if run is _cpu:
        y, workspace = empty(shape, held), weight.new_empty(_C.row_workspace(*shape, 0))
        scratch["workspace"] = workspace.data_ptr()
    else:
        y = word.new_empty(shape, dtype=held)
    mean, rstd = (weight.new_empty(len(ids)), weight.new_empty(len(ids))) if statistics else (None, None)
    run(
        "embedding_fwd",
        y,
        **_inputs(indices, tables, y.dtype),
        **scratch,
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        mean=0 if mean is None else mean.data_ptr(),
        rstd=0 if rstd is None else rstd.data_ptr(),
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
        eps=eps,
    )
    return y.to(dtype), mean, rstd


def _fwd(run: Callable, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(run, *arguments, statistics=True)


def _forward_only(run: Callable, *arguments) -> Tensor:
    return _forward(run, *arguments, statistics=False)[0]


embedding_layer_norm_fwd, embedding_layer_norm_fwd_cuda = partial(_fwd, _cpu), partial(_fwd, _cuda)
embedding_layer_norm_forward_only = partial(_forward_only, _cpu)
embedding_layer_norm_forward_only_cuda = partial(_forward_only, _cuda)


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
    indices, tables = _dense(ids, positions, token_types), _dense(word, position, token_type)
    dy, factor = dy.to(_held(_cpu, dy.dtype)).contiguous(), as_float32(weight)
    dtables = [empty_like(t) for t in tables]
    dweight, dbias = torch.empty_like(factor), torch.empty_like(factor)
    dz = empty(dy.shape, torch.float32)
    order = ids.new_empty(_C.embedding_order(len(ids), sum(map(len, tables))))
    workspace = factor.new_empty(_C.embedding_workspace(*dy.shape))
    _C.embedding_bwd(
        **_inputs(indices, tables, dy.dtype),
        threads=torch.get_num_threads(),
        dy=dy.data_ptr(),
        weight=factor.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        dtables=[t.data_ptr() for t in dtables],
        dweight=dweight.data_ptr(),
        dbias=dbias.data_ptr(),
        dz=dz.data_ptr(),
        order=order.data_ptr(),
        workspace=workspace.data_ptr(),
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
    )
    return *dtables, dweight.to(weight.dtype), dbias.to(bias.dtype)


def embedding_layer_norm_bwd_cuda(
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
    indices, tables = _dense(ids, positions, token_types), _dense(word, position, token_type)
    dy, factor = dy.to(_held(_cuda, dy.dtype)).contiguous(), as_float32(weight)
    sizes = {"tokens": dy.shape[0], "columns": dy.shape[1]}
    dweight, dbias = torch.empty_like(factor), torch.empty_like(factor)
    dz = dy.new_empty(dy.shape, dtype=torch.float32)
    workspace = dz.new_empty(library.ask("embedding_rows_bwd_workspace_cuda", dy, **sizes))
    _cuda(
        "embedding_rows_bwd",
        dy,
        **_inputs(indices, tables, dy.dtype),
        dy=dy.data_ptr(),
        weight=factor.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        dz=dz.data_ptr(),
        dweight=dweight.data_ptr(),
        dbias=dbias.data_ptr(),
        workspace=workspace.data_ptr(),
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
    )
    dtables = [torch.zeros_like(t) for t in tables]
    places = [sorted_by_row(i, len(t)) for i, t in zip(indices, tables, strict=True)]
    parts = dz.new_empty(library.ask("embedding_parts_cuda", dy, **sizes))
    _cuda(
        "embedding_sums",
        dy,
        rows=[row.data_ptr() for row, _ in places],
        order=[token.data_ptr() for _, token in places],
        narrow=[row.dtype == torch.int16 for row, _ in places],
        table_rows=[len(t) for t in tables],
        dtables=[t.data_ptr() for t in dtables],
        **sizes,
        table_dtype=NATIVE_DTYPES[word.dtype],
        dz=dz.data_ptr(),
        parts=parts.data_ptr(),
    )
    return *dtables, dweight.to(weight.dtype), dbias.to(bias.dtype)
