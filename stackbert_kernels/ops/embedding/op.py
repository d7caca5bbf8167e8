"""embedding_layer_norm: where BERT begins, LN(word + position + token type) and dropout, in one pass over the tokens.

T tokens, C columns. Saved for backward are the indices, the tables and two statistics a token; the sum that is normalised and the
dropout mask are computed again. `embedding_layer_norm_forward_only` is taken where nothing needs a gradient, as in a frozen embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops import philox
from stackbert_kernels.ops.embedding import native, reference

CUDA_COLUMNS = (
    4096  # EMBEDDING_COLUMNS of the compiled module, where that has CUDA: a row lies in the registers of a block
)


def _check(ids, positions, token_types, word, position, token_type, weight, bias, eps, dtype) -> None:
    def wrong(kind: type, name: str, wanted: str, got) -> Exception:
        return kind(f"embedding_layer_norm: {name} must {wanted}, got {got}")

    for name, index in (("ids", ids), ("positions", positions), ("token_types", token_types)):
        if index.dtype != torch.int64:
            raise wrong(TypeError, name, "be int64", index.dtype)
        if index.dim() != 1 or index.shape != ids.shape:
            raise wrong(ValueError, name, "be [T] as ids", f"{list(index.shape)} for {list(ids.shape)}")
        if index.device != word.device:
            raise wrong(ValueError, name, f"be on word's device {word.device}", index.device)
    if not word.is_floating_point():
        raise wrong(TypeError, "word", "be floating point", word.dtype)
    for name, table in (("word", word), ("position", position), ("token_type", token_type)):
        if table.dim() != 2 or 0 in table.shape or table.shape[1] != word.shape[-1]:
            raise wrong(ValueError, name, "be [rows, C] with rows and C > 0 and word's C", list(table.shape))
        if table.dtype != word.dtype:
            raise wrong(TypeError, name, f"have word's dtype {word.dtype}", table.dtype)
        if table.device != word.device:
            raise wrong(ValueError, name, f"be on word's device {word.device}", table.device)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != word.shape[1:]:
            raise wrong(ValueError, name, f"be [{word.shape[1]}] to match word", list(parameter.shape))
        if parameter.dtype not in (word.dtype, torch.float32):
            raise wrong(TypeError, name, f"be float32 or word's {word.dtype}", parameter.dtype)
        if parameter.device != word.device:
            raise wrong(ValueError, name, f"be on word's device {word.device}", parameter.device)
    if not dtype.is_floating_point:
        raise wrong(TypeError, "dtype", "be floating point", dtype)
    if not eps >= 0.0:
        raise wrong(ValueError, "eps", "be >= 0", eps)


def _forward_only_fake(
    ids, positions, token_types, word, position, token_type, weight, bias, rng, site, threshold, eps, dtype, impl
):
    _check(ids, positions, token_types, word, position, token_type, weight, bias, eps, dtype)
    return word.new_empty(ids.shape[0], word.shape[1], dtype=dtype)


def _fwd_fake(*arguments):
    y, word = _forward_only_fake(*arguments), arguments[3]
    wide = torch.promote_types(word.dtype, torch.float32)
    return y, y.new_empty(y.shape[0], dtype=wide), y.new_empty(y.shape[0], dtype=wide)


def _bwd_fake(
    dy, ids, positions, token_types, word, position, token_type, weight, bias, mean, rstd, rng, site, threshold, impl
):
    if dy.shape != (ids.shape[0], word.shape[1]):
        wanted = [ids.shape[0], word.shape[1]]
        raise ValueError(f"embedding_layer_norm: dy must be {wanted} as the result, got {list(dy.shape)}")
    dtables = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (word, position, token_type))
    return *dtables, torch.empty_like(weight), torch.empty_like(bias)


def _table(name: str) -> library.Table:
    triton = library.lazy("stackbert_kernels.ops.embedding.triton_kernel", name)
    plain = getattr(reference, name)
    return {
        "cpu": {"reference": plain, "native": getattr(native, name), "triton": triton},
        "cuda": {"reference": plain, "native": getattr(native, f"{name}_cuda"), "triton": triton},
    }


FORWARD = _table("embedding_layer_norm_fwd")
FORWARD_ONLY = _table("embedding_layer_norm_forward_only")
BACKWARD = _table("embedding_layer_norm_bwd")


def _why_not(impl: str, word: Tensor) -> str | None:
    if impl == "native" and word.is_cuda and word.shape[1] > CUDA_COLUMNS:
        return f"native takes rows of at most {CUDA_COLUMNS} elements on a GPU, got {word.shape[1]}"
    return library.only_dtypes(impl, word)


OP = library.Op("embedding_layer_norm", FORWARD, _why_not)

_INPUTS = (
    "Tensor ids, Tensor positions, Tensor token_types, Tensor word, Tensor position, Tensor token_type, "
    "Tensor weight, Tensor bias"
)
_embedding_layer_norm_fwd = library.define(
    f"embedding_layer_norm_fwd({_INPUTS}, Tensor rng, int site, int threshold, float eps, ScalarType dtype, str impl)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    FORWARD,
    _fwd_fake,
)
_embedding_layer_norm_forward_only = library.define(
    f"embedding_layer_norm_forward_only({_INPUTS}, Tensor rng, int site, int threshold, float eps, ScalarType dtype, "
    "str impl) -> Tensor",
    FORWARD_ONLY,
    _forward_only_fake,
)
_embedding_layer_norm_bwd = library.define(
    f"embedding_layer_norm_bwd(Tensor dy, {_INPUTS}, Tensor mean, Tensor rstd, Tensor rng, int site, int threshold, "
    "str impl) -> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    BACKWARD,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.site, ctx.threshold, _, _, ctx.impl = inputs
    *tensors, rng = tensors
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd
    ctx.save_for_backward(*tensors, mean, rstd, rng)


def _backward(ctx, dy, dmean, drstd):
    if dy is None:
        return (None,) * 14
    gradients = _embedding_layer_norm_bwd(dy, *ctx.saved_tensors, ctx.site, ctx.threshold, ctx.impl)
    return None, None, None, *gradients, None, None, None, None, None, None


library.autograd("embedding_layer_norm_fwd", _setup, _backward)


def embedding_layer_norm(
    ids: Tensor,
    positions: Tensor,
    token_types: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    eps: float = 1e-12,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """dropout(layer_norm(word[ids] + position[positions] + token_type[token_types])) (Devlin et al. 2018).

        ids, positions, token_types  [...] int64   one shape
        word, position, token_type   [rows, C]     one floating dtype
        weight, bias                 [C]           of the norm; float32 or word's dtype
        dropout_p                    0..0.998      realised as round(256 p) / 256
        rng                          [2] int64     (seed, step) on word's device, from new_rng; None = drawn from torch's generator
        site                         an integer unique to the place in the model
        dtype                        of the result; None = word's
        returns                      [..., C]      computed in float32 (float64 for float64) and rounded once

    The mask is a pure function of (seed, step, site, token, column); backward draws it again. Gradients of the tables are dense, summed
    in an order that does not depend on threads or chance. An index out of range is a ValueError on the CPU; on a GPU, where looking
    would wait for the device, nothing is read for it, the token's row is NaN, and no row of that table gets its gradient.

    Before:
        x = F.embedding(ids, word) + F.embedding(positions, position) + F.embedding(token_types, token_type)
        y = F.dropout(F.layer_norm(x, x.shape[-1:], weight, bias, eps), p)
    After:
        y = sbk.ops.embedding_layer_norm(
            ids, positions, token_types, word, position, token_type, weight, bias, dropout_p=p, eps=eps
        )
    """
    threshold, rng = philox.dropout_arguments("embedding_layer_norm", dropout_p, rng, site, word.device)
    dtype = word.dtype if dtype is None else dtype
    shape = ids.shape
    for name, index in (("positions", positions), ("token_types", token_types)):
        if index.shape != shape:
            raise ValueError(f"embedding_layer_norm: {name} must have the shape of ids, {list(shape)}, got {list(index.shape)}")  # fmt: skip
    indices = (ids.reshape(-1), positions.reshape(-1), token_types.reshape(-1))
    parameters = (word, position, token_type, weight, bias)
    _check(*indices, *parameters, eps, dtype)
    arguments = (*indices, *parameters, rng, site, threshold, eps, dtype, OP.resolve(impl, word))
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        y, _, _ = _embedding_layer_norm_fwd(*arguments)
    else:
        y = _embedding_layer_norm_forward_only(*arguments)
    return y.reshape(*shape, word.shape[1])
