"""A patched nn.TransformerEncoder beside the same one in float64 and the unpatched one in float32: outputs and every gradient."""

from __future__ import annotations

import copy
import io
import itertools
import re
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate_as_torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import stackbert_kernels as sbk
from stackbert_kernels.patch.swap import Swapped

B, S, C, INNER = 3, 6, 12, 16

# True = no token. "tokens first" is what PyTorch makes nested tensors of.
PADDING = {
    "none": None,
    "tokens first": torch.arange(S) >= torch.tensor([[S], [4], [1]]),
    "tokens last": torch.arange(S) < torch.tensor([[0], [3], [S - 1]]),
    "holes": torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0], [0] * S], dtype=torch.bool),
}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "tanh": nn.GELU(approximate="tanh"), "silu": F.silu}


@pytest.fixture(autouse=True)
def _quiet():
    """PyTorch warns where an encoder cannot make nested tensors, and that these are a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor|The PyTorch API of nested tensors")
        yield


def encoder_of(
    *, layers: int = 2, heads: int = 2, p: float = 0.0, activation="gelu", final_norm: bool = True, **options
) -> nn.TransformerEncoder:
    options = {"batch_first": True, "layer_norm_eps": 1e-3, **options}
    layer = nn.TransformerEncoderLayer(C, heads, INNER, p, activation, **options)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(C) if final_norm else None)
    for name, parameter in encoder.named_parameters():  # no norm whose weight is 1, no two layers alike
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return encoder


def batch_of(batch_first: bool = True) -> Tensor:
    return torch.randn(B, S, C) if batch_first else torch.randn(S, B, C)


def kept(padding: Tensor | None, batch_first: bool) -> Tensor | None:
    """Where tokens are in the output."""
    return None if padding is None else ~padding if batch_first else ~padding.T


def run(model: nn.Module, x: Tensor, padding: Tensor | None, keep: Tensor | None, **arguments) -> dict[str, Tensor]:
    """The output at `keep` (None: everywhere), and the gradients of x and of every parameter from there."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x, src_key_padding_mask=padding, **arguments)
    y = y if keep is None else y[keep]
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "dx": x.grad, **gradients}


def assert_same(model: nn.Module, x: Tensor, padding, keep, *, arguments: dict | None = None, **options):
    """Relative to its largest element, the error of no tensor is over 4x that of PyTorch's worst one: both sum in float32, in another
    order, and how much a rounding in the first layer grows differs from tensor to tensor. Planted errors are thousands of times that."""
    arguments = arguments or {}
    exact = run(copy.deepcopy(model).double(), x.double(), padding, keep, **_double(arguments))
    baseline = run(model, x, padding, keep, **arguments)
    with sbk.patched(model, **options):
        actual = run(model, x, padding, keep, **arguments)
    assert actual.keys() == exact.keys()

    def errors(results: dict[str, Tensor]) -> dict[str, float]:
        ulp = torch.finfo(torch.float32).eps
        return {k: float((results[k] - exact[k]).abs().max() / (exact[k].abs().max() * ulp + 1e-30)) for k in exact}

    allowed = 4 * max(1.0, *errors(baseline).values())
    for name, error in errors(actual).items():
        assert error <= allowed, f"{name}: error {error:.1f} ulp of its largest element, allowed {allowed:.1f}"


def _double(arguments: dict) -> dict:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ---- the same numbers


LAYERS = list(itertools.product([True, False], [True, False], ["gelu", "relu"], [True, False]))
IDS = ["-".join(n for n, on in zip(("batch_first", "norm_first", a, "bias"), (b, n, True, w), strict=True) if on) for b, n, a, w in LAYERS]  # fmt: skip


@pytest.mark.parametrize(("batch_first", "norm_first", "activation", "bias"), LAYERS, ids=IDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_output_and_gradients(batch_first, norm_first, activation, bias, training):
    """Without `unpad` everywhere, with it at tokens. In training with p = 0, in evaluation with p = .1."""
    heads = 3 if batch_first == norm_first else 2
    model = encoder_of(
        heads=heads, p=0.0 if training else 0.1, activation=activation, batch_first=batch_first,
        norm_first=norm_first, bias=bias, final_norm=norm_first,
    ).train(training)  # fmt: skip
    x = batch_of(batch_first)
    for padding in PADDING.values():
        assert_same(model, x, padding, None)
        assert_same(model, x, padding, kept(padding, batch_first), unpad=True)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_other_activations(activation):
    model = encoder_of(activation=ACTIVATIONS[activation])
    assert_same(model, batch_of(), None, None)


@pytest.mark.parametrize("parts", list(itertools.product([True, False], repeat=3)), ids=str)
def test_each_part_alone_and_together(parts):
    options = dict(zip(("attention", "add_norm", "gelu"), parts, strict=True))
    if not any(parts):
        options["unpad"] = True
    for norm_first in (True, False):
        model, padding = encoder_of(norm_first=norm_first), PADDING["holes"]
        assert_same(model, batch_of(), padding, None if any(parts) else ~padding, **options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pattern", PADDING)
def test_a_layer_alone(batch_first, pattern):
    padding = PADDING[pattern]
    layer = encoder_of(batch_first=batch_first).layers[0]
    assert_same(layer, batch_of(batch_first), padding, None)
    assert_same(layer, batch_of(batch_first), padding, kept(padding, batch_first), unpad=True)


@pytest.mark.parametrize("unpad", [True, False])
def test_one_sequence_without_a_batch(unpad):
    for batch_first in (True, False):
        model = encoder_of(batch_first=batch_first)
        assert_same(model, torch.randn(S, C), None, None, unpad=unpad)
        assert_same(model, torch.randn(S, C), torch.arange(S) >= 4, torch.arange(S) < 4, unpad=unpad)


def test_a_sequence_of_padding_alone():
    model, padding = encoder_of(), PADDING["holes"].clone()
    padding[1] = True
    assert_same(model, batch_of(), padding, ~padding, unpad=True)
    x = batch_of()
    with sbk.patched(model, unpad=True):
        assert run(model, x, torch.ones(B, S, dtype=torch.bool), None)["output"].eq(0).all()


@pytest.mark.parametrize("pattern", ["tokens first", "tokens last", "holes"])
def test_unpadded_is_zero_at_padding_and_reads_nothing_there(pattern):
    model, padding, x = encoder_of(), PADDING[pattern], batch_of()
    sbk.patch(model, unpad=True)
    y = model(x, src_key_padding_mask=padding)
    other = model(x.masked_fill(padding[..., None], torch.nan), src_key_padding_mask=padding)
    assert torch.equal(other, y) and y[padding].eq(0).all() and y[~padding].ne(0).all()


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("mask_check", [True, False])
def test_evaluation_where_pytorch_makes_nested_tensors(unpad, mask_check):
    """Its result has zeros at padding, behind the last norm that norm's bias. Sixteen layers' roundings: 1e-5."""
    for pattern in ("tokens first", "tokens last") if mask_check else ("tokens first",):
        model, padding, x = encoder_of().eval(), PADDING[pattern], batch_of()
        model.mask_check = mask_check
        with torch.no_grad():
            wanted = model(x, src_key_padding_mask=padding)
            nested = pattern == "tokens first"
            assert torch.equal(wanted[padding], model.norm.bias.expand(int(padding.sum()), C)) == nested
            sbk.patch(model, unpad=unpad)
            got = model(x, src_key_padding_mask=padding)
        at = ~padding if unpad else ...
        torch.testing.assert_close(got[at], wanted[at], rtol=1e-5, atol=1e-5)
        assert not unpad or got[padding].eq(0).all()


def test_nested_tensors_of_the_caller():
    model = encoder_of().eval()
    x = torch.nested.nested_tensor([torch.randn(4, C), torch.randn(2, C)])
    with torch.no_grad():
        wanted = model(x).to_padded_tensor(0.0)
        sbk.patch(model)
        assert torch.equal(model(x).to_padded_tensor(0.0), wanted)


# ---- what the op does not do goes PyTorch's way, for that call


def causal() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(S)


CALLS = {
    "a mask": lambda: {"mask": torch.randn(S, S)},
    "a bool mask": lambda: {"mask": torch.eye(S, dtype=torch.bool)},
    "a mask for each head": lambda: {"mask": torch.randn(2 * B, S, S)},
    "causal": lambda: {"mask": causal(), "is_causal": True},
    "a causal mask": lambda: {"mask": causal()},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("unpad", [True, False])
def test_other_masks(call, unpad):
    model, x = encoder_of(), batch_of()
    assert_same(model, x, None, None, arguments=CALLS[call](), unpad=unpad)
    arguments = CALLS[call]()
    if arguments["mask"].dtype != torch.bool:
        assert_same(model.layers[0], x, None, None, arguments={"src_mask": arguments["mask"]}, unpad=unpad)


def test_both_masks():
    """Each query of a token sees itself at least."""
    padding = PADDING["tokens first"]
    assert_same(encoder_of(), batch_of(), padding, None, arguments={"mask": torch.triu(torch.ones(S, S), 1).bool()})


@pytest.mark.parametrize("unpad", [True, False])
def test_float_padding_masks(unpad):
    """0 and -inf are padding; other values are added to the scores."""
    model, x, padding = encoder_of(), batch_of(), PADDING["holes"]
    as_float = torch.zeros(B, S).masked_fill(padding, -torch.inf)
    wanted = model(x, src_key_padding_mask=padding)
    added = torch.randn(B, S)
    wanted_added = model(x, src_key_padding_mask=added)
    sbk.patch(model, unpad=unpad)
    got, got_added = model(x, src_key_padding_mask=as_float), model(x, src_key_padding_mask=added)
    at = ~padding if unpad else ...
    torch.testing.assert_close(got[at], wanted[at], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_added, wanted_added, rtol=1e-5, atol=1e-5)
    assert not unpad or got[padding].eq(0).all()


def test_arguments_that_pytorch_refuses():
    model, x = encoder_of(), batch_of()
    calls = ({"src_key_padding_mask": torch.zeros(S, B).bool()}, {"is_causal": True})
    for arguments in calls:
        with pytest.raises((AssertionError, RuntimeError)) as theirs:
            model(x, **arguments)
        with sbk.patched(model, unpad=True), pytest.raises(type(theirs.value)) as ours:
            model(x, **arguments)
        assert str(ours.value) == str(theirs.value)


class Scaled(nn.Module):
    """What a LoRA layer is to the linear layer that it wraps."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.dense, self.scale = dense, nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) * self.scale


@pytest.mark.parametrize("name", ["linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_submodules_wrapped_after_patching_are_called(name, norm_first):
    model, x = encoder_of(norm_first=norm_first), batch_of()
    plain = copy.deepcopy(model)
    sbk.patch(model, unpad=True)
    for encoder in (model, plain):
        for layer in encoder.layers:
            setattr(layer, name, Scaled(getattr(layer, name)))
    for key, wanted in run(plain, x, None, None).items():
        torch.testing.assert_close(run(model, x, None, None)[key], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["layers.0", "layers.1.self_attn", "layers.0.linear1", "layers.1.norm2", "layers.0.dropout1"]
)
@pytest.mark.parametrize("pattern", ["none", "tokens last"])
def test_hooks_see_what_they_saw(name, pattern):
    """A hook registered after patching: same shapes, same values, and what it returns counts."""
    model, x, padding = encoder_of(), batch_of(), PADDING[pattern]
    seen: list[list[Tensor]] = []
    for patched in (False, True):
        seen.append([])

        def hook(module, inputs, output, into=seen[-1]):
            first = output[0] if isinstance(output, tuple) else output
            into.append(first.detach())
            return (first * 2, *output[1:]) if isinstance(output, tuple) else first * 2

        if patched:
            sbk.patch(model)
        handle = model.get_submodule(name).register_forward_hook(hook)
        seen[-1].append(model(x, src_key_padding_mask=padding).detach())
        handle.remove()
    assert len(seen[0]) == len(seen[1]) == 2
    for wanted, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_replaced_attention_is_called():
    model, x = encoder_of(), batch_of()
    sbk.patch(model, unpad=True)
    model.layers[1].self_attn = nn.MultiheadAttention(C, 2, add_zero_attn=True, batch_first=True)
    plain = copy.deepcopy(model)
    sbk.unpatch(plain)
    padding = PADDING["holes"]
    got, wanted = model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)


# ---- training


def losses(model: nn.Module, steps: int = 200) -> Tensor:
    """Denoising: the output is to be the clean input, at tokens."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(steps):
        x = torch.randn(B, S, C, generator=generator)
        lengths = torch.randint(1, S + 1, (B, 1), generator=generator)
        padding = torch.arange(S) >= lengths
        y = model(x + torch.randn(B, S, C, generator=generator), src_key_padding_mask=padding)
        loss = F.mse_loss(y[~padding], x[~padding])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return torch.stack(history)


@pytest.mark.parametrize("unpad", [True, False])
def test_two_hundred_steps_without_dropout(unpad):
    model = encoder_of(final_norm=False)
    twin = copy.deepcopy(model)
    sbk.patch(twin, unpad=unpad)
    wanted, got = losses(model), losses(twin)
    assert wanted[-20:].mean() < 0.9 * wanted[:20].mean()  # something was learned
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_has_the_same_mean_and_variance(norm_first):
    """2,000 draws in one batch of equal sequences. Five standard errors of the means, and of the variances with a kurtosis of 5; p = .1
    is realised as 26 / 256, which moves a variance by 2%."""
    draws = 2000
    model = encoder_of(layers=1, p=0.1, norm_first=norm_first, final_norm=False)
    x = torch.randn(1, 3, C).expand(draws, -1, -1).contiguous()
    wanted = model(x).detach()
    sbk.patch(model)
    got = model(x).detach()
    assert ((got.mean(0) - wanted.mean(0)).abs() <= 5 * (2 * wanted.var(0) / draws).sqrt()).all()
    ratio = got.var(0) / wanted.var(0)
    assert ((ratio - 1).abs() <= 5 * (2 * 4 / draws) ** 0.5 + 0.02).all(), ratio


def test_dropout_is_reproducible_and_unlike_in_each_call_and_layer():
    model, x = encoder_of(p=0.3, final_norm=False), batch_of()
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    sbk.patch(model)
    sites = [module._stackbert.site for module in model.layers]
    assert len({site + place for site in sites for place in range(4)}) == 8
    torch.manual_seed(4)
    first, second = model(x), model(x)
    torch.manual_seed(4)
    assert torch.equal(model(x), first) and not torch.equal(first, second)
    torch.manual_seed(4)
    assert not torch.equal(model.layers[0](x), model.layers[1](x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("norm_first", [True, False])
def test_no_two_places_share_a_mask(norm_first, monkeypatch):
    """A mask is a function of (seed, step, site): no two calls of a forward pass have all three the same, in any layer."""
    seen, dropout = [], sbk.ops.dropout

    def spy(op, *args, **options):
        if args[1] if op is dropout else options.get("dropout_p"):
            seen.append((*options["rng"].tolist(), options["site"]))
        return op(*args, **options)

    for name in ("attention_qkv_varlen", "dropout_add_layer_norm", "dropout_add", "dropout"):
        monkeypatch.setattr(sbk.ops, name, partial(spy, getattr(sbk.ops, name)))
    model = encoder_of(p=0.3, norm_first=norm_first)
    sbk.patch(model)
    model(batch_of())
    assert len(seen) == 8 and len(set(seen)) == 8 and len({site for *_, site in seen}) == 8


@pytest.mark.parametrize("place", ["self_attn", "dropout1", "dropout", "dropout2"])
def test_every_dropout_drops(place):
    """Each alone, switched on in evaluation as for Monte Carlo dropout."""
    model, x = encoder_of(p=0.5).eval(), batch_of()
    sbk.patch(model)
    still = model(x)
    getattr(model.layers[0], place).train()
    assert not torch.equal(model(x), still) and not torch.equal(model(x), model(x))


def test_checkpointed_layers_draw_the_same_masks_again():
    """Gradients with and without recomputation are those of one and the same masks."""
    model, x = encoder_of(p=0.3), batch_of()
    sbk.patch(model)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(2)
        layer = model.layers[0]
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for wanted, got in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


# ---- dtypes, compile


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("how", ["bfloat16 model", "autocast", "autocast of bfloat16 input"])
def test_lower_precision(how, norm_first):
    """The dtype of the output is PyTorch's; its error in bfloat16 at most twice PyTorch's own."""
    model, x = encoder_of(norm_first=norm_first), batch_of()
    exact = copy.deepcopy(model).double()(x.double()).detach()
    x = x if how == "autocast" else x.bfloat16()
    model = model.bfloat16() if how == "bfloat16 model" else model
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
        baseline = model(x).detach()
        sbk.patch(model)
        got = model(x)
    assert got.dtype == baseline.dtype
    assert_as_accurate_as_torch(how, got.detach(), exact, baseline)
    got.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_bfloat16_model_under_autocast_with_float32_input(norm_first):
    """PyTorch takes it on a GPU alone, where its layer norm then is float32. The parameters' rounding is in both; bfloat16 has 8 bits."""
    model, x = encoder_of(norm_first=norm_first).bfloat16(), batch_of()
    exact = copy.deepcopy(model).double()(x.double()).detach()
    sbk.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2**-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("unpad", "batch_first"), [(True, False), (False, True)])
def test_compiles_to_one_graph(unpad, batch_first):
    """Compiled code cannot look at the mask: the same numbers all the same, zero at padding with `unpad`."""
    model, x, padding = encoder_of(batch_first=batch_first), batch_of(batch_first), PADDING["holes"]
    sbk.patch(model, unpad=unpad)
    wanted = run(model, x, padding, None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, value in run(compiled, x, padding, None).items():
        torch.testing.assert_close(value, wanted[key.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)


def test_one_more_graph_serves_every_length_and_batch():
    """Training, unpadded: the second graph knows sizes as symbols only."""
    model = encoder_of(layers=1)
    sbk.patch(model, unpad=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, length in ((3, 6), (4, 7), (5, 9), (2, 11), (7, 5)):
        x = torch.randn(batch, length, C)
        padding = torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))
        wanted = run(model, x, padding, None)
        for key, value in run(compiled, x, padding, None).items():
            torch.testing.assert_close(value, wanted[key.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_compiled_training_draws_dropout():
    model, x = encoder_of(p=0.3).layers[0], batch_of()
    sbk.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second) and first.requires_grad


# ---- put in and taken out


def test_state_dicts_copies_and_files():
    model, x = encoder_of(), batch_of()
    state = copy.deepcopy(model.state_dict())
    fresh = encoder_of()
    sbk.patch(model)
    assert list(model.state_dict()) == list(state)
    fresh.load_state_dict(model.state_dict())
    sbk.patch(fresh)
    model.load_state_dict(fresh.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        sbk.unpatch(other)
        assert not any(isinstance(module, Swapped) for module in other.modules())
    assert any(isinstance(module, Swapped) for module in model.modules())


def test_unpatching_leaves_nothing():
    model, x = encoder_of(), batch_of()
    before = (classes(model), [set(m.__dict__) for m in model.modules()], repr(model), model(x))
    state = copy.deepcopy(model.state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    sbk.patch(model, unpad=True)
    assert isinstance(model, nn.TransformerEncoder) and isinstance(model.layers[0], nn.TransformerEncoderLayer)
    run(model, x, PADDING["holes"], None)
    sbk.unpatch(model)
    assert (classes(model), [set(m.__dict__) for m in model.modules()], repr(model)) == before[:3]
    assert torch.equal(model(x), before[3]) and addresses == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_inside_a_larger_model():
    """nn.Transformer: its encoder is patched, its decoder is not."""
    model = nn.Transformer(C, 2, 2, 1, INNER, 0.0, batch_first=True)
    source, target = batch_of(), batch_of()
    wanted = model(source, target)
    report = sbk.patch(model)
    assert {row.module for row in report.patched} == {"encoder", "encoder.layers.0", "encoder.layers.1"}
    torch.testing.assert_close(model(source, target), wanted, rtol=1e-5, atol=1e-5)


# ---- the report


def test_report():
    report = sbk.patch(encoder_of(activation="relu"))
    runs = {(row.module, row.part): row.runs for row in report.rows}
    assert runs["", "attention"] == "its layers on rows, arranged once" and runs["", "add_norm"].startswith(
        "layer_norm ("
    )
    assert runs["layers.1", "attention"].startswith("attention (")
    assert runs["layers.1", "add_norm"].startswith("dropout_add_layer_norm (")
    pre = {row.runs for row in sbk.patch(encoder_of(norm_first=True)).patched if row.part == "add_norm" and row.module}
    assert [re.sub(r" \(\w+\)", "", what) for what in pre] == ["dropout_add, layer_norm"]
    why = {(row.module, row.part): row.why_not for row in report.skipped}
    assert why["layers.0", "gelu"] == "the activation is relu"
    assert "layers.{0-1}" in str(report) and "unpad=True" in str(report)


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return src


class OwnInit(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(C, 2, INNER, 0.0, batch_first=True)


def test_subclasses():
    """One with its own forward stays; one without it is as its parent."""
    with pytest.raises(
        ValueError, match=r"nothing can be replaced in OwnForward: attention: OwnForward has its own forward"
    ):
        sbk.patch(OwnForward(C, 2))
    layer, x = OwnInit(), batch_of()
    wanted = layer(x)
    sbk.patch(layer)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert type(layer).__name__ == "OwnInit" and isinstance(layer, OwnInit)


@pytest.mark.parametrize(
    ("change", "part", "why"),
    [
        (lambda layer: setattr(layer, "norm1", nn.RMSNorm(C)), "add_norm", "norm1 is a RMSNorm"),
        (lambda layer: setattr(layer, "dropout", nn.Dropout(1.0)), "add_norm", r"dropout is Dropout\(p=1.0"),
        (lambda layer: setattr(layer, "linear1", Scaled(layer.linear1)), "gelu", "linear1 .* is wrapped"),
        (lambda layer: setattr(layer.self_attn, "add_zero_attn", True), "attention", "add_zero_attn"),
        (lambda layer: layer.self_attn.register_forward_hook(print), "attention", "self_attn .* has hooks"),
        (lambda layer: setattr(layer.self_attn, "dropout", 1.0), "attention", "self_attn has dropout 1.0"),
        (lambda layer: layer.double(), "gelu", "only its reference would run: native takes float32"),
    ],
)  # fmt: skip
def test_what_stays_and_why(change, part, why):
    model = encoder_of()
    change(model.layers[0])
    report = sbk.patch(model)
    (row,) = [row for row in report.skipped if (row.module, row.part) == ("layers.0", part)]
    assert re.search(why, row.why_not)
    encoder = {row.part: row.why_not for row in report.skipped if row.module == ""}
    assert ("attention" in encoder) == (part == "attention" or why.startswith("only"))


def test_bad_use():
    model = encoder_of()
    with pytest.raises(ValueError, match="no module of this TransformerEncoder is patched"):
        sbk.unpatch(model)
    sbk.patch(model)
    with pytest.raises(ValueError, match="patched already"):
        sbk.patch(model)
    sbk.unpatch(model)
    sbk.patch(model.layers[0])
    with pytest.raises(ValueError, match="patched in parts"):
        sbk.patch(model)
    sbk.unpatch(model)
    before = classes(model)
    with pytest.raises(ValueError, match="compiled already"):
        sbk.patch(torch.compile(model))
    with pytest.raises(ValueError, match="on meta"):
        sbk.patch(encoder_of().to("meta"))
    with pytest.raises(ValueError, match=r"found nothing to replace in Linear.*torch.nn.TransformerEncoder"):
        sbk.patch(nn.Linear(2, 2))
    assert classes(model) == before
