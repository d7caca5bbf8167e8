"""embedding_layer_norm by csrc/embedding. T tokens, C columns."""

import torch
from torch import Tensor

from stackbert_kernels.ops._library import _C, NATIVE_DTYPES, as_float32, empty, empty_like


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
        "threads": torch.get_num_threads(),
    }


def _held(dtype: torch.dtype) -> torch.dtype:
    """float16 goes by float32."""
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32


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
    indices, tables = _dense(ids, positions, token_types), _dense(word, position, token_type)
    weight, bias = as_float32(weight), as_float32(bias)
    y = empty((len(ids), word.shape[1]), _held(dtype))
    workspace = weight.new_empty(_C.row_workspace(*y.shape, 0))
    mean, rstd = (weight.new_empty(len(ids)), weight.new_empty(len(ids))) if statistics else (None, None)
    _C.embedding_fwd(
        **_inputs(indices, tables, y.dtype),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        y=y.data_ptr(),
        mean=0 if mean is None else mean.data_ptr(),
        rstd=0 if rstd is None else rstd.data_ptr(),
        workspace=workspace.data_ptr(),
        rng=rng.data_ptr(),
        site=site,
        threshold=threshold,
        eps=eps,
    )
    return y.to(dtype), mean, rstd


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
    indices, tables = _dense(ids, positions, token_types), _dense(word, position, token_type)
    dy, factor = dy.to(_held(dy.dtype)).contiguous(), as_float32(weight)
    dtables = [empty_like(t) for t in tables]
    dweight, dbias = torch.empty_like(factor), torch.empty_like(factor)
    dz = empty(dy.shape, torch.float32)
    order = ids.new_empty(_C.embedding_order(len(ids), sum(map(len, tables))))
    workspace = factor.new_empty(_C.embedding_workspace(*dy.shape))
    _C.embedding_bwd(
        **_inputs(indices, tables, dy.dtype),
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
