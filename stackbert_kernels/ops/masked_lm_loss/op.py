"""masked_lm_loss: decoder and cross entropy in one, over chunks of rows, so that [R, V] logits never exist.

The gradients of the inputs that need one are made in the forward pass, while a chunk's logits are there; the backward pass only
scales them with dloss. masked_lm_predictions is the same walk for evaluation: losses and hits, no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackbert_kernels.ops import _library as library
from stackbert_kernels.ops.masked_lm_loss import native, reference

TRITON = "stackbert_kernels.ops.masked_lm_loss.triton_kernel"
triton_fwd, triton_predictions = (
    library.lazy(TRITON, "masked_lm_loss_fwd"),
    library.lazy(TRITON, "masked_lm_predictions"),
)

TABLE = {
    "cpu": {"reference": reference.masked_lm_loss_fwd, "native": native.masked_lm_loss_fwd, "triton": triton_fwd},
    "cuda": {"reference": reference.masked_lm_loss_fwd, "native": native.masked_lm_loss_fwd_cuda, "triton": triton_fwd},
}
PREDICTIONS = {
    "cpu": {
        "reference": reference.masked_lm_predictions,
        "native": native.masked_lm_predictions,
        "triton": triton_predictions,
    },
    "cuda": {
        "reference": reference.masked_lm_predictions,
        "native": native.masked_lm_predictions_cuda,
        "triton": triton_predictions,
    },
}


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"masked_lm_loss: hidden must be floating point, got {hidden.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(f"masked_lm_loss: {name} must be {hidden.dtype} as hidden, or float32, got {tensor.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"masked_lm_loss: labels must be int64, got {labels.dtype}")
    if hidden.dim() != 2:
        raise ValueError(f"masked_lm_loss: hidden must be [rows, columns], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"masked_lm_loss: weight must be [vocabulary, {hidden.shape[1]}] to match hidden, got {list(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"masked_lm_loss: bias must be [{weight.shape[0]}] to match weight, got {list(bias.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"masked_lm_loss: labels must be [{hidden.shape[0]}] to match hidden, got {list(labels.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(f"masked_lm_loss: {name} must be on {hidden.device} as hidden, got {tensor.device}")


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(hidden, weight, bias, labels)

    def gradient(of: Tensor, need: bool) -> Tensor:
        return of.new_empty(of.shape if need else 0)

    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, gradient(hidden, need_hidden), gradient(weight, need_weight), gradient(bias, need_bias)


def _fake_predictions(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int, impl: str):
    _check(hidden, weight, bias, labels)
    return hidden.new_empty((), dtype=torch.float64), labels.new_empty(()), labels.new_empty(())


OP = library.Op("masked_lm_loss", TABLE, lambda impl, hidden, *_: library.only_dtypes(impl, hidden))
_masked_lm_loss_fwd = library.define(
    "masked_lm_loss_fwd(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, int ignore_index, "
    "bool need_hidden, bool need_weight, bool need_bias, str impl) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    TABLE,
    _fake,
)
_masked_lm_predictions = library.define(
    "masked_lm_predictions(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, int ignore_index, str impl) "
    "-> (Tensor loss, Tensor correct, Tensor count)",
    PREDICTIONS,
    _fake_predictions,
)


def _setup(ctx, inputs, output):
    _, dhidden, dweight, dbias = output
    ctx.needs = inputs[5:8]
    ctx.mark_non_differentiable(dhidden, dweight, dbias)
    ctx.save_for_backward(*(g for g, need in zip((dhidden, dweight, dbias), ctx.needs, strict=True) if need))


def _backward(ctx, dloss: Tensor, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("masked_lm_loss: its gradient cannot be differentiated again (create_graph=True)")
    saved = iter(ctx.saved_tensors)
    gradients = [next(saved) * dloss if need else None for need in ctx.needs]
    return *gradients, *[None] * 6


library.autograd("masked_lm_loss_fwd", _setup, _backward)


def masked_lm_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, ignore_index: int = -100, impl: str = "auto"
) -> Tensor:
    """The mean of -log softmax(hidden weight^T + bias)[label] over the rows whose label is not ignore_index.

        hidden   [R, C]  the matrix products run in its dtype, autocast or not
        weight   [V, C]  hidden's dtype or float32; its gradient is summed in float32
        bias     [V]     hidden's dtype or float32; -inf takes a word (a padded row of weight) out: no probability, no gradient
        labels   [R]     int64, in [0, V) or ignore_index; another value is a ValueError on the CPU. On a GPU nobody waits to look: native
                         and triton make the loss and the row's gradient NaN, reference stops with torch's device-side assertion
        returns  []      float32 (float64 for float64)

    Rows with ignore_index are not read and get zero gradients. Without any other row the loss is 0, where F.cross_entropy gives
    NaN. Inputs that do not require grad cost nothing. The second derivative does not exist.

    Before:
        loss = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    After:
        loss = sbk.ops.masked_lm_loss(hidden, weight, bias, labels)
    """
    _check(hidden, weight, bias, labels)
    impl = OP.resolve(impl, hidden)
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight, bias)]
    return _masked_lm_loss_fwd(hidden, weight, bias, labels, ignore_index, *needs, impl)[0]


@torch.no_grad()
def masked_lm_predictions(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, ignore_index: int = -100, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """For evaluation: the sum of the losses (float64), how many labels have the highest logit, how many labels there are (int64).

    Arguments as for masked_lm_loss. Of several words with the same highest logit the first counts.

    Before:
        rows = labels != -100
        logits = F.linear(hidden[rows], weight, bias)
        loss = F.cross_entropy(logits, labels[rows], reduction="sum").double()
        hits, count = (logits.argmax(1) == labels[rows]).sum(), rows.sum()
    After:
        loss, hits, count = sbk.ops.masked_lm_predictions(hidden, weight, bias, labels)
    """
    _check(hidden, weight, bias, labels)
    return _masked_lm_predictions(hidden, weight, bias, labels, ignore_index, OP.resolve(impl, hidden))
