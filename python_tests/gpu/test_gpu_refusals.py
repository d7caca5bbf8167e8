"""A call that is refused leaves the device as it was: the next good call gives the same bits as the one before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import cases, inputs, integers, results, rng_on
from gpu_devices import targets

from stackbert_kernels import ops

WRONG_DTYPE = torch.float64


def bad_calls(op: str, t: dict, n: dict, rng, impl: str) -> dict[str, Callable[[], object]]:
    """Wrong shapes, dtypes, devices and numbers, by what is wrong with them."""
    elsewhere = torch.empty(2, dtype=torch.int64, device="meta")
    if op == "attention":
        q, k, v, cu = t["q"], t["k"], t["v"], n["cu"]

        def attend(q=q, k=k, v=v, cu=cu, longest=200, p=0.1, rng=rng, **more):
            return ops.attention_varlen(q, k, v, cu, longest, dropout_p=p, rng=rng, impl=impl, **more)

        return {
            "shape of k": lambda: attend(k=k[1:]),
            "dtype of v": lambda: attend(v=v.to(WRONG_DTYPE)),
            "int64 lengths": lambda: attend(cu=cu.long()),
            "negative longest": lambda: attend(longest=-1),
            "p": lambda: attend(p=1.5),
            "rng elsewhere": lambda: attend(rng=elsewhere),
        }
    if op == "masked_lm_loss":
        hidden, weight, bias, labels = t["hidden"], t["weight"], t["bias"], n["labels"]
        return {
            "width": lambda: ops.masked_lm_loss(hidden[:, 1:], weight, bias, labels, impl=impl),
            "words": lambda: ops.masked_lm_loss(hidden, weight, bias[1:], labels, impl=impl),
            "labels": lambda: ops.masked_lm_loss(hidden, weight, bias, labels[1:], impl=impl),
            "int32 labels": lambda: ops.masked_lm_loss(hidden, weight, bias, labels.int(), impl=impl),
        }
    if op == "duplicate_layers_":
        bank = t["bank"].detach()
        return {
            "source above": lambda: ops.duplicate_layers_(bank, [1, 0], impl=impl),
            "too long": lambda: ops.duplicate_layers_(bank, [0] * 100, impl=impl),
            "negative": lambda: ops.duplicate_layers_(bank, [-1], impl=impl),
            "rows not dense": lambda: ops.duplicate_layers_(bank.T, [0, 0], impl=impl),
        }
    if op == "embedding_layer_norm":
        return {
            "int32 ids": lambda: ops.embedding_layer_norm(**(n | {"ids": n["ids"].int()}), **t, impl=impl),
            "width": lambda: ops.embedding_layer_norm(**n, **(t | {"position": t["position"][:, 1:]}), impl=impl),
            "lengths": lambda: ops.embedding_layer_norm(**(n | {"positions": n["positions"][1:]}), **t, impl=impl),
            "rng elsewhere": lambda: ops.embedding_layer_norm(**n, **t, dropout_p=0.1, rng=elsewhere, impl=impl),
        }
    if op == "adamw_":
        w = [x.detach() for x in t.values()]
        return {
            "shape": lambda: ops.adamw_([w[0]], [w[1][1:]], [w[2]], [w[3]], [n["steps"]], [0], lr=0.1, impl=impl),
            "decay": lambda: ops.adamw_([w[0]], [w[1]], [w[2]], [w[3]], [n["steps"]], [-1], lr=0.1, impl=impl),
            "rate": lambda: ops.adamw_([w[0]], [w[1]], [w[2]], [w[3]], [n["steps"]], [0], lr=-0.1, impl=impl),
            "count": lambda: ops.adamw_([w[0]], [], [w[2]], [w[3]], [n["steps"]], [0], lr=0.1, impl=impl),
        }
    if "x" not in t:
        return {}  # an op that has no case here
    x = t["x"]
    if op == "dropout":
        return {
            "p": lambda: ops.dropout(x, -0.1, rng=rng, impl=impl),
            "integers": lambda: ops.dropout(x.long(), 0.1, rng=rng, impl=impl),
            "rng elsewhere": lambda: ops.dropout(x, 0.1, rng=elsewhere, impl=impl),
            "site": lambda: ops.dropout(x, 0.1, rng=rng, site=-1, impl=impl),
        }
    if op == "bias_gelu":
        return {
            "width": lambda: ops.bias_gelu(x, t["bias"][1:], impl=impl),
            "dtype": lambda: ops.bias_gelu(x, t["bias"].to(WRONG_DTYPE), impl=impl),
            "approximation": lambda: ops.bias_gelu(x, t["bias"], approximate="fast", impl=impl),
        }
    if op == "layer_norm":
        return {
            "width": lambda: ops.layer_norm(x, t["weight"][1:], t["bias"], impl=impl),
            "dtype": lambda: ops.layer_norm(x, t["weight"].to(WRONG_DTYPE), t["bias"], impl=impl),
            "eps": lambda: ops.layer_norm(x, t["weight"], t["bias"], -1.0, impl=impl),
        }
    if op == "dropout_add":
        return {
            "shape": lambda: ops.dropout_add(x, t["residual"][1:], dropout_p=0.1, rng=rng, impl=impl),
            "dtype": lambda: ops.dropout_add(x, t["residual"].to(WRONG_DTYPE), dropout_p=0.1, rng=rng, impl=impl),
            "p": lambda: ops.dropout_add(x, t["residual"], dropout_p=2.0, rng=rng, impl=impl),
        }
    if op == "dropout_add_layer_norm":
        both = x, t["residual"]
        return {
            "width": lambda: ops.dropout_add_layer_norm(*both, t["weight"][1:], t["bias"], impl=impl),
            "x_bias": lambda: ops.dropout_add_layer_norm(
                *both, t["weight"], t["bias"], x_bias=t["x_bias"][1:], impl=impl
            ),
            "rng": lambda: ops.dropout_add_layer_norm(
                *both, t["weight"], t["bias"], dropout_p=0.1, rng=elsewhere, impl=impl
            ),
        }
    return {}


@pytest.mark.parametrize(("device", "op", "impl"), targets())
def test_a_refused_call_leaves_the_device_alive(device, op, impl):
    case = cases(op, device.kind)[0]
    tensors, whole, rng = inputs(case, device.kind, torch.float32), integers(case, device.kind), rng_on(device.kind)
    wanted = results(case, tensors, whole, rng, impl)
    for what, call in bad_calls(op, tensors, whole, rng, impl).items():
        with pytest.raises((ValueError, TypeError)):
            call()
            pytest.fail(f"{what}: not refused")
        device.synchronize()  # an error that is still on its way would be raised here
        after = results(case, tensors, whole, rng, impl)
        device.synchronize()
        assert all(torch.equal(after[name], wanted[name]) for name in wanted), what


@pytest.mark.parametrize(("device", "op", "impl"), targets())
def test_an_unknown_implementation_is_named(device, op, impl):
    case = cases(op, device.kind)[0]
    tensors, whole = inputs(case, device.kind, torch.float32), integers(case, device.kind)
    with pytest.raises(ValueError, match=rf"usable: .*{impl}"):
        case.call(tensors, whole, rng_on(device.kind), "fastest")


@pytest.mark.parametrize(("device", "op", "impl"), targets("embedding_layer_norm"))
def test_an_index_out_of_range(device, op, impl):
    """An error on the CPU. On a GPU, where looking would wait for the device, a row of NaN and a device that is alive."""
    case = cases(op, device.kind)[0]
    tensors, whole, rng = inputs(case, device.kind, torch.float32), integers(case, device.kind), rng_on(device.kind)
    good = case.call(tensors, whole, rng, impl)
    for wrong in (-1, 1 << 40):
        ids = whole["ids"].clone()
        ids[3] = wrong
        if device.kind == "cpu":
            with pytest.raises(ValueError, match="ids must be in"):
                case.call(tensors, whole | {"ids": ids}, rng, impl)
            continue
        y = case.call(tensors, whole | {"ids": ids}, rng, impl)
        gradients = torch.autograd.grad(y, [tensors["word"], tensors["position"]], torch.ones_like(y))
        device.synchronize()
        assert y[3].isnan().any() and torch.equal(y[4:], good[4:]) and torch.equal(y[:3], good[:3])
        assert gradients[0].isfinite().all()
