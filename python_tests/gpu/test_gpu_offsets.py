"""More than 2^31 elements: an offset of 32 bits would wrap. What is computed for the last rows is compared with the same rows alone.

One of these fills much of a GPU's memory: benchmarks/gpu/tests.py gives them a process of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from gpu_cases import DTYPES, SITE, incoming, rng_on
from gpu_devices import Cuda, takes, targets
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.ops import philox

LAST = 8  # rows that are compared
P, THRESHOLD = 0.1, 26


@contextmanager
def room(device, impl: str, nbytes: int):
    """Our kernels need `nbytes`; the reference, in plain PyTorch, several wider copies of everything, and is left out where they do not
    fit."""
    free = device.free_bytes()
    if free < nbytes:
        pytest.skip(f"wants {nbytes / 2**30:.0f} GiB of free device memory, got {free / 2**30:.0f}")
    try:
        yield
    except torch.OutOfMemoryError:
        if impl != "reference":
            raise
        pytest.skip("the reference does not fit into the device memory")


def rows_of(device, columns: int) -> int:
    return device.many // columns + LAST


def values(device, *shape: int, dtype: torch.dtype) -> Tensor:
    """The same few rows over and over: no generator is asked for 2^31 numbers."""
    period = 4099
    few = torch.randn(period, *shape[1:], generator=torch.Generator().manual_seed(0)).to(device.kind, dtype)
    out = torch.empty(shape, dtype=dtype, device=device.kind)
    for first in range(0, shape[0], period):
        out[first : first + period] = few[: shape[0] - first]
    return out


def row_bytes_at(rng: Tensor, site: int, first: int, rows: int, columns: int) -> Tensor:
    """philox.row_bytes of a few rows far down."""
    k0, k1 = philox.subkey(rng, site)
    token = torch.arange(first, first + rows)[:, None, None]
    block = torch.arange((columns + 15) // 16)[None, :, None]
    words = philox.philox(k0, k1, block, token & philox.MASK, token >> 32, torch.zeros_like(token))
    return philox._bytes_of(words, torch.arange(16)).flatten(1)[:, :columns]


def with_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last rows: the output and the gradient, for an incoming gradient of ones."""
    x = x.detach().requires_grad_()
    y = call(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach()[-LAST:].clone(), dx[-LAST:].clone()


def assert_near(
    actual: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype, epsilons: float = 8
) -> None:
    """Both round in the same places, but a tile may end elsewhere."""
    for a, w in zip(actual, wanted, strict=True):
        atol = epsilons * torch.finfo(dtype).eps * w.abs().max().item()
        torch.testing.assert_close(a.double(), w.double(), rtol=0, atol=atol)


def test_the_bytes_are_those_of_the_contract():
    rng = rng_on("cpu")
    assert torch.equal(row_bytes_at(rng, 3, 11, 8, 50), philox.row_bytes(rng, 3, 19, 50)[11:])


@pytest.mark.parametrize(("device", "op", "impl"), targets("dropout", "dropout_add"))
def test_row_masks(device, op, impl):
    columns, dtype = 768, DTYPES["bf16" if device is Cuda else "fp32"]
    rows, rng = rows_of(device, columns), rng_on(device.kind)
    with room(device, impl, 8 * rows * columns * dtype.itemsize):
        x = torch.ones(rows, columns, dtype=dtype, device=device.kind)
        how = {"rng": rng, "site": SITE, "impl": impl}
        if op == "dropout":
            found = with_gradient(lambda x: ops.dropout(x, P, **how), x)
        else:
            zero = torch.zeros((), dtype=dtype, device=device.kind).expand(rows, columns).contiguous()
            found = with_gradient(lambda x: ops.dropout_add(x, zero, dropout_p=P, **how), x)
    wanted = row_bytes_at(rng_on("cpu"), SITE, rows - LAST, LAST, columns) >= THRESHOLD
    for kept in found:
        assert torch.equal(kept.cpu() != 0, wanted)


@pytest.mark.parametrize(("device", "op", "impl"), targets("layer_norm", "dropout_add_layer_norm", "bias_gelu"))
def test_rows(device, op, impl):
    columns, dtype = 768, DTYPES["bf16" if device is Cuda else "fp32"]
    rows = rows_of(device, columns)
    with room(device, impl, 10 * rows * columns * dtype.itemsize):
        weight, bias = (
            torch.randn(columns, generator=torch.Generator().manual_seed(i)).to(device.kind) for i in (1, 2)
        )
        x = values(device, rows, columns, dtype=dtype)

        def call(x: Tensor, residual: Tensor) -> Tensor:
            if op == "layer_norm":
                return ops.layer_norm(x, weight, bias, impl=impl)
            if op == "bias_gelu":
                return ops.bias_gelu(x, bias, impl=impl)
            return ops.dropout_add_layer_norm(x, residual, weight, bias, x_bias=bias, impl=impl)

        found = with_gradient(lambda part: call(part, x), x)
        few = x[-LAST:].clone()
        assert_near(found, with_gradient(lambda part: call(part, few), few), dtype)


@pytest.mark.parametrize(("device", "op", "impl"), targets("attention"))
def test_tokens(device, op, impl):
    """The last sequence beside the same sequence alone; without dropout, whose mask depends on the sequence's number."""
    heads, D, S = (12, 64, 128) if device is Cuda else (1, 16, 8)
    dtype = DTYPES["bf16" if device is Cuda else "fp32"]
    sequences = device.many // (S * 3 * heads * D) + 2
    T = sequences * S
    with room(device, impl, 8 * T * 3 * heads * D * dtype.itemsize):
        qkv = values(device, T, 3, heads, D, dtype=dtype)
        cu = torch.arange(0, T + 1, S, dtype=torch.int32, device=device.kind)
        found = with_gradient(lambda x: ops.attention_qkv_varlen(x, cu, S, impl=impl), qkv)
        wanted = with_gradient(lambda x: ops.attention_qkv_varlen(x, cu[:2], S, impl=impl), qkv[-S:].clone())
        assert_near(found, wanted, dtype)


@pytest.mark.parametrize(("device", "op", "impl"), targets("masked_lm_loss"))
def test_logits(device, op, impl):
    """Rows times words pass 2^31; a row's gradient depends on the other rows only by their number."""
    columns, words = (64, 30_528) if device is Cuda else (16, 101)
    dtype = DTYPES["bf16" if device is Cuda else "fp32"]
    rows = rows_of(device, words)
    with room(device, impl, 40 << 30 if device is Cuda else 1 << 20):
        hidden = values(device, rows, columns, dtype=dtype)
        weight = values(device, words, columns, dtype=dtype) * columns**-0.5
        bias = torch.zeros(words, device=device.kind)
        labels = (torch.arange(rows, device=device.kind) * 17) % words

        def gradient(hidden: Tensor, labels: Tensor) -> Tensor:
            hidden = hidden.detach().requires_grad_()
            (dhidden,) = torch.autograd.grad(ops.masked_lm_loss(hidden, weight, bias, labels, impl=impl), hidden)
            return dhidden[-LAST:] * len(labels)  # without the mean

        found, wanted = gradient(hidden, labels), gradient(hidden[-LAST:], labels[-LAST:])
        assert_near((found,), (wanted,), dtype, epsilons=16)


@pytest.mark.parametrize(("device", "op", "impl"), targets("embedding_layer_norm"))
def test_embedded_tokens(device, op, impl):
    """The last tokens have a word that no other has: its gradient is theirs alone."""
    columns, words, dtype = (768, 1000, DTYPES["bf16"]) if device is Cuda else (200, 32, DTYPES["fp32"])
    tokens = rows_of(device, columns)
    with room(device, impl, 12 * tokens * columns * dtype.itemsize):
        word, other = (values(device, words, columns, dtype=dtype) for _ in range(2))
        ids = torch.arange(tokens, device=device.kind) % (words - 1)
        ids[-LAST:] = words - 1
        weight, bias = torch.ones(columns, device=device.kind), torch.zeros(columns, device=device.kind)

        def last(ids: Tensor) -> tuple[Tensor, Tensor]:
            table = word.clone().requires_grad_()
            y = ops.embedding_layer_norm(ids, ids, ids, table, other, other, weight, bias, impl=impl)
            # Rows that are normalised have no gradient for ones.
            dy = incoming(torch.empty(columns, dtype=dtype, device=device.kind)).expand(y.shape)
            (dword,) = torch.autograd.grad(y, table, dy)
            return y.detach()[-LAST:].clone(), dword[-1]

        assert_near(last(ids), last(ids[-LAST:]), dtype)


@pytest.mark.parametrize(("device", "op", "impl"), targets("adamw_", "lamb_"))
def test_a_step_of_one_tensor(device, op, impl):
    size = device.many + 1000
    with room(device, impl, 20 * size):
        weights, grads, *moments = (torch.zeros(size, device=device.kind) for _ in range(4))
        grads[-1000:] = incoming(grads[-1000:])
        step = [torch.zeros((), device=device.kind)]
        few = [t[-1000:].clone() for t in (weights, grads, *moments)]
        for w, g, m, v in ((weights, grads, *moments), few):
            getattr(ops, op)([w], [g], [m], [v], [step[0].clone()], [0], lr=0.1, impl=impl)
        for t, alone_ in zip((weights, *moments), (few[0], *few[2:]), strict=True):
            assert torch.equal(t[-1000:], alone_) and alone_.abs().min() > 0
            assert t[:1000].abs().max() == 0


@pytest.mark.parametrize(("device", "op", "impl"), targets("duplicate_layers_"))
def test_rows_of_a_bank(device, op, impl):
    """A row of more than 2^31 bytes, three of more than 2^32."""
    columns = device.many // 4 + 4096
    with room(device, impl, 4 * 4 * columns):
        bank = torch.zeros(3, columns, device=device.kind)
        bank[0, -1000:] = incoming(bank[0, -1000:])
        ops.duplicate_layers_(bank, [0, 0, 0], impl=impl)
        assert torch.equal(bank[1], bank[0]) and torch.equal(bank[2], bank[0]) and bank[2, -1000:].ne(0).all()


@pytest.mark.parametrize(("device", "op", "impl"), targets("layer_norm"))
def test_what_does_not_take_a_dtype_says_so(device, op, impl):
    reason = takes(op, impl, torch.empty(2, 2, dtype=torch.float64, device=device.kind))
    assert impl == "reference" or (reason and impl in reason)
