"""sbk.nn: each module beside the torch module whose state dict it loads: output and every gradient, against float64."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stackbert_kernels as sbk
from stackbert_kernels.nn.rows import arrange

B, S, C = 3, 7, 24


def padding_of(pattern: str) -> Tensor | None:
    """[B, S] bool, True = no token."""
    column = torch.arange(S)
    if pattern == "none":
        return None
    return {
        "right": column >= torch.tensor([[S], [4], [1]]),
        "left": column < torch.tensor([[0], [3], [S - 1]]),
        "holes": torch.tensor([[0, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0, 1], [0] * S], dtype=torch.bool),
        "a row without a token": column >= torch.tensor([[0], [S], [2]]),
    }[pattern]


PATTERNS = ("none", "right", "left", "holes", "a row without a token")


def random_parameters(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def results(module: nn.Module, x: Tensor, run, keep: Tensor | None) -> dict[str, Tensor]:
    """The output at tokens, and the gradients of x and of every parameter from there."""
    x = x.detach().clone().requires_grad_()
    y = run(module, x)
    if keep is not None:
        y = y[keep]
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": y.detach(), "dx": x.grad, **gradients}


def assert_equal_to(theirs: nn.Module, ours: nn.Module, x: Tensor, run_theirs, run_ours, keep: Tensor | None = None):
    """3x as in the op tests of gradients: the kernels sum in another order than the matrix products of PyTorch."""
    ours.load_state_dict(theirs.state_dict())
    exact = results(copy.deepcopy(theirs).double(), x.double(), run_theirs, keep)
    baseline = results(theirs, x, run_theirs, keep)
    actual = results(ours, x, run_ours, keep)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_as_accurate_as_torch(name, value, exact[name], baseline[name], slack=3.0)


# ---- equal to torch


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-12}], ids=str)
@pytest.mark.parametrize("shape", [(C,), (4, 6)], ids=str)
def test_layer_norm(options, shape):
    theirs = random_parameters(nn.LayerNorm(shape, **options))
    x = torch.randn(B, S, *shape) * 3 + 1
    assert_equal_to(theirs, sbk.nn.LayerNorm(shape, **options), x, lambda m, x: m(x), lambda m, x: m(x))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_dropout_add_layer_norm(options, with_bias):
    """p = 0 in training, p = .1 in evaluation: neither drops anything."""
    theirs = random_parameters(nn.LayerNorm(C, **options))
    x, residual, x_bias = torch.randn(B, S, C), torch.randn(B, S, C), torch.randn(C) if with_bias else None

    def norm(module, x):
        return module(residual.to(x.dtype) + (x if x_bias is None else x + x_bias.to(x.dtype)))

    for ours in (sbk.nn.DropoutAddLayerNorm(C, 0.0, **options), sbk.nn.DropoutAddLayerNorm(C, 0.1, **options).eval()):
        theirs.zero_grad()
        assert_equal_to(theirs, ours, x, norm, lambda module, x: module(x, residual, x_bias))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(approximate):
    theirs = random_parameters(nn.Linear(C, 2 * C))
    ours = sbk.nn.BiasGELU(C, 2 * C, approximate=approximate)
    x = torch.randn(B, S, C)
    assert_equal_to(theirs, ours, x, lambda m, x: F.gelu(m(x), approximate=approximate), lambda m, x: m(x))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention(pattern, batch_first, bias):
    options = {"bias": bias, "batch_first": batch_first}
    theirs = random_parameters(nn.MultiheadAttention(C, 3, **options))
    padding = padding_of(pattern)
    x = torch.randn(B, S, C) if batch_first else torch.randn(S, B, C)
    keep = None if padding is None else ~padding if batch_first else ~padding.T

    def run(module, x):
        return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    ours = sbk.nn.MultiHeadAttention(C, 3, dropout=0.1, **options).eval()
    assert_equal_to(theirs, ours, x, run, run, keep)
    assert torch.isfinite(run(ours, x)).all()


def test_multi_head_attention_on_one_sequence():
    theirs, x = random_parameters(nn.MultiheadAttention(C, 2)), torch.randn(S, C)
    padding = torch.arange(S) >= 5

    def run(module, x):
        return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    assert_equal_to(theirs, sbk.nn.MultiHeadAttention(C, 2), x, run, run, ~padding)


def test_float_masks_of_zero_and_infinity_are_padding():
    ours, padding = sbk.nn.MultiHeadAttention(C, 2, batch_first=True), padding_of("holes")
    x = torch.randn(B, S, C)
    as_float = torch.zeros(B, S).masked_fill(padding, -torch.inf)
    assert torch.equal(ours(x, x, x, as_float)[0], ours(x, x, x, padding)[0])
    with pytest.raises(
        ValueError, match=r"bool, True for padding, or float of 0 and -inf, got torch.float32 with other"
    ):
        ours(x, x, x, as_float - 1)


def test_what_stands_at_padding_reaches_no_token():
    ours, padding = sbk.nn.MultiHeadAttention(C, 2, batch_first=True), padding_of("holes")
    x = torch.randn(B, S, C)
    other = torch.where(padding[..., None], torch.nan, x)
    assert torch.equal(ours(other, other, other, padding)[0][~padding], ours(x, x, x, padding)[0][~padding])


def test_it_stands_in_an_encoder_layer_of_torch():
    """PyTorch hands its layers' attention a float mask."""
    layer = nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True)
    padding, x = padding_of("left"), torch.randn(B, S, C)
    wanted = layer(x, src_key_padding_mask=padding)
    attention = sbk.nn.MultiHeadAttention(C, 2, batch_first=True)
    attention.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = attention
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding)[~padding], wanted[~padding], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_enter_and_leave(pattern, batch_first, packed):
    padding = padding_of(pattern)
    x = torch.randn(B, S, C) if batch_first else torch.randn(S, B, C)
    rows = arrange(x, padding, batch_first=batch_first, packed=packed)
    inside = rows.enter(x)
    ends = rows.cu_seqlens.tolist()
    assert (
        ends[0] == 0 and ends[-1] == len(inside) and max(b - a for a, b in itertools.pairwise(ends)) <= rows.max_seqlen
    )
    sequences = x if batch_first else x.transpose(0, 1)
    every = torch.zeros(B, S, dtype=torch.bool) if padding is None else padding
    for b in range(B):  # the tokens of each sequence are one sequence of rows, in order
        i = b if packed or padding is None else 2 * b
        assert torch.equal(inside[ends[i] : ends[i + 1]], sequences[b][~every[b]])
    wanted = sequences.masked_fill(every[..., None], 0.0) if packed else sequences
    left = rows.leave(inside)
    assert torch.equal(left, wanted if batch_first else wanted.transpose(0, 1)) and left.is_contiguous()


# ---- state dicts, copies, dtypes


PAIRS = {
    "LayerNorm": (lambda: nn.LayerNorm(C), lambda: sbk.nn.LayerNorm(C)),
    "DropoutAddLayerNorm": (lambda: nn.LayerNorm(C), lambda: sbk.nn.DropoutAddLayerNorm(C)),
    "BiasGELU": (lambda: nn.Linear(C, 2 * C), lambda: sbk.nn.BiasGELU(C, 2 * C)),
    "MultiHeadAttention": (lambda: nn.MultiheadAttention(C, 2), lambda: sbk.nn.MultiHeadAttention(C, 2)),
}


def call(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x)[0]
    return module(x, torch.ones_like(x)) if isinstance(module, sbk.nn.DropoutAddLayerNorm) else module(x)


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_both_ways(name):
    make_theirs, make_ours = PAIRS[name]
    theirs, ours = random_parameters(make_theirs()), make_ours()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = make_theirs()
    back.load_state_dict(ours.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


@pytest.mark.parametrize("name", PAIRS)
def test_it_starts_as_the_torch_module_does(name):
    parameters = []
    for make in PAIRS[name]:
        torch.manual_seed(1)
        parameters.append(list(make().parameters()))
    for a, b in zip(*parameters, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_copies_and_files(name):
    ours, x = PAIRS[name][1]().eval(), torch.randn(S, B, C)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(call(other, x), call(ours, x)) and repr(other) == repr(ours)
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_dtypes(name, dtype):
    module = PAIRS[name][1]().to(dtype)
    y = call(module, torch.randn(S, B, C, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype and all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("name", PAIRS)
def test_autocast(name):
    """float32 parameters under bfloat16: what torch does, or the input's dtype where the module says so."""
    module = PAIRS[name][1]().eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(module, torch.randn(S, B, C))
    assert y.dtype == (torch.bfloat16 if name in ("BiasGELU", "MultiHeadAttention") else torch.float32)


@pytest.mark.parametrize("name", PAIRS)
def test_compiles_to_one_graph(name):
    """aot_eager: graph capture, fakes and the joint graph, without a compiler behind it."""
    module = random_parameters(PAIRS[name][1]()).eval()
    x, padding = torch.randn(S, B, C), padding_of("left")

    def run(module, x):
        return module(x, x, x, padding)[0] if name == "MultiHeadAttention" else call(module, x)

    wanted = results(module, x, run, None)
    module.zero_grad()
    actual = results(module, x, torch.compile(run, fullgraph=True, backend="aot_eager"), None)
    for key, value in wanted.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_recomputed_in_the_backward_pass(name):
    """Under gradient checkpointing the dropout masks are drawn again: the same gradients, bit for bit."""
    module, x = random_parameters(PAIRS[name][1]()), torch.randn(S, B, C)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(2)
        y = checkpoint(call, module, x, use_reentrant=False) if recompute else call(module, x)
        gradients.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    assert all(torch.equal(got, wanted) for wanted, got in zip(*gradients, strict=True))


def test_compiled_training_draws_dropout():
    module = sbk.nn.DropoutAddLayerNorm(C, 0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, S, C)
    assert not torch.equal(compiled(x, x), compiled(x, x))


# ---- dropout


def attention_with_dropout(p: float = 0.1) -> nn.Module:
    return random_parameters(sbk.nn.MultiHeadAttention(8, 2, dropout=p, batch_first=True))


@pytest.mark.parametrize("name", ["DropoutAddLayerNorm", "MultiHeadAttention"])
def test_mean_and_variance_over_draws(name):
    """Beside as many draws of torch. Five standard errors of a mean, and of a variance (whose own is sqrt(2 / n) of it, some 10% for
    tails heavier than a normal distribution's); p = .1 is realised as 26 / 256, which moves a variance by 2%."""
    draws = 2000
    if name == "MultiHeadAttention":
        ours = attention_with_dropout()
        theirs = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        x = torch.randn(1, 4, 8).expand(draws, -1, -1)  # every sequence of a batch has masks of its own
        actual, wanted = ours(x, x, x)[0], None
        theirs.load_state_dict(ours.state_dict())
        wanted = theirs(x, x, x, need_weights=False)[0]
    else:
        ours = random_parameters(sbk.nn.DropoutAddLayerNorm(8, 0.1))
        x, residual = torch.randn(1, 4, 8).expand(draws, -1, -1), torch.randn(4, 8).expand(draws, -1, -1)
        actual = ours(x, residual)
        wanted = F.layer_norm(residual + F.dropout(x, 0.1), (8,), ours.weight, ours.bias, ours.eps)
    error = (2 * wanted.var(0) / draws).sqrt()
    assert ((actual.mean(0) - wanted.mean(0)).abs() <= 5 * error).all()
    ratio = actual.var(0) / wanted.var(0)
    assert ((ratio - 1).abs() <= 5 * (4 / draws) ** 0.5 + 0.1).all(), ratio


@pytest.mark.parametrize("name", ["DropoutAddLayerNorm", "MultiHeadAttention"])
def test_dropout_is_drawn_from_torchs_generator(name):
    module = random_parameters(PAIRS[name][1]())
    module.p = module.dropout = 0.3
    x = torch.randn(S, B, C)
    torch.manual_seed(5)
    first, second = call(module, x), call(module, x)
    torch.manual_seed(5)
    assert torch.equal(call(module, x), first) and not torch.equal(first, second)
    assert torch.equal(call(module.eval(), x), call(module, x))


@pytest.mark.parametrize("name", ["DropoutAddLayerNorm", "MultiHeadAttention"])
def test_with_an_rng_the_site_decides(name):
    rng, x = sbk.ops.new_rng(1, 2), torch.randn(S, B, C)

    def draw(site: int) -> Tensor:
        if name == "DropoutAddLayerNorm":
            return sbk.nn.DropoutAddLayerNorm(C, 0.3, site=site)(x, x, rng=rng)
        torch.manual_seed(3)
        return sbk.nn.MultiHeadAttention(C, 2, 0.3, site=site)(x, x, x, rng=rng)[0]

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


# ---- what a person reads


def test_representations():
    assert repr(sbk.nn.LayerNorm(C)) == f"LayerNorm(({C},), eps=1e-05, elementwise_affine=True, bias=True)"
    assert repr(sbk.nn.DropoutAddLayerNorm(C, 0.2)).endswith(", p=0.2)")
    assert repr(sbk.nn.BiasGELU(2, 3, impl="native")) == (
        "BiasGELU(in_features=2, out_features=3, bias=True, approximate='none', impl='native')"
    )
    assert "embed_dim=24, num_heads=2, dropout=0.1, bias=True, batch_first=False" in repr(
        sbk.nn.MultiHeadAttention(C, 2, 0.1)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_bias_kv": True}, "add_bias_kv must be False, got True; nn.MultiheadAttention has it"),
        ({"add_zero_attn": True}, "add_zero_attn must be False, got True"),
        ({"kdim": 3}, "kdim must be 24, got 3"),
        ({"vdim": 5}, "vdim must be 24, got 5"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 24 and 5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 0.998\), got 1.0"),
    ],
    ids=str,
)
def test_attention_that_is_not_made(options, message):
    with pytest.raises(ValueError, match="^MultiHeadAttention: " + message):
        sbk.nn.MultiHeadAttention(**{"embed_dim": C, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need_weights": True}, "need_weights must be False, got True; nn.MultiheadAttention has it"),
        ({"attn_mask": torch.zeros(S, S)}, r"attn_mask must be None, got a tensor \[7, 7\]"),
        ({"is_causal": True}, "is_causal must be False, got True"),
        ({"key": torch.zeros(B, S, C)}, "key and value must be query itself"),
        ({"value": torch.zeros(B, S, C)}, "key and value must be query itself"),
        (
            {"key_padding_mask": torch.zeros(S, B).bool()},
            r"key_padding_mask must be \[3, 7\] on cpu, got \[7, 3\] on cpu",
        ),
        ({"key_padding_mask": torch.zeros(B, S).long()}, "or float of 0 and -inf, got torch.int64"),
    ],
    ids=lambda value: str(*value) if isinstance(value, dict) else "",
)
def test_attention_that_is_not_computed(options, message):
    x = torch.randn(B, S, C)
    with pytest.raises(ValueError, match="^MultiHeadAttention: .*" + message):
        sbk.nn.MultiHeadAttention(C, 2, batch_first=True)(**{"query": x, "key": x, "value": x, **options})


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"query must be \[S, 24\] or \[S, B, 24\], got \[2, 3, 25\]"):
        x = torch.randn(2, 3, 25)
        sbk.nn.MultiHeadAttention(C, 2)(x, x, x)
    with pytest.raises(ValueError, match=r"LayerNorm: x must be \[..., 4, 6\], got \[3, 24\]"):
        sbk.nn.LayerNorm((4, 6))(torch.randn(3, 24))
    with pytest.raises(ValueError, match=r"DropoutAddLayerNorm: residual must have x's shape \[3, 24\], got \[24\]"):
        sbk.nn.DropoutAddLayerNorm(C)(torch.randn(3, 24), torch.randn(24))
    with pytest.raises(ValueError, match=r"DropoutAddLayerNorm: dropout must be in \[0, 0.998\), got -0.1"):
        sbk.nn.DropoutAddLayerNorm(C, -0.1)
    with pytest.raises(ValueError, match="BiasGELU: bias must be True"):
        sbk.nn.BiasGELU(C, C, bias=False)
    with pytest.raises(ValueError, match="BiasGELU: approximate must be one of none, tanh, got 'erf'"):
        sbk.nn.BiasGELU(C, C, approximate="erf")
    with pytest.raises(ValueError, match=r"layer_norm: impl='fast' cannot run here"):
        sbk.nn.LayerNorm(C, impl="fast")(torch.randn(3, C))
