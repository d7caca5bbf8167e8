"""specs/core.md: relaxed layers become whole ones that compute the same, in float64; what then learns; moments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth.small_models import ROUNDING, assert_near, gradients, logits, small
from model.samples import TINY, batch, tiny

from stackbert_kernels.config import ModelConfig, OptimConfig, Stage
from stackbert_kernels.growth.apply import grow
from stackbert_kernels.growth.refine import refine
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.train.optim import Optimizer

C, H, D, r, RANK = 16, 2, 8, 3, 4
RELAXED = {"rank": RANK, "score_dim": r}
WHOLE = {"rank": 0, "score_dim": 0}
REFINING = Stage(steps=1, depth=3, grow="refine")
LAYERS = range(3)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refined(model: Bert, seed: int = 0, **left) -> Bert:
    """With both whole, or what `left` says."""
    shape, optim = replace(model.config, **(WHOLE | left)), OptimConfig()
    return refine(model, Optimizer(model, optim).state_dict(), REFINING, shape, seed=seed, optim=optim)[0]


def thirds(qkv: torch.Tensor, width: int = D) -> tuple[torch.Tensor, ...]:
    """Queries and keys [H, width, ...], values [H, D, ...]."""
    return tuple(part.unflatten(0, (H, -1)) for part in qkv.split([H * width, H * width, C]))


def new_channels(tensors: dict[str, torch.Tensor], slot: str = "qkv_weight") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer: the channels that queries and keys had not before."""
    return [tuple(x[:, r:] for x in thirds(tensors[f"bank.layers.{i}.{slot}"])[:2]) for i in LAYERS]


# The function


@pytest.mark.parametrize(
    ("relaxed", "norm", "objective"),
    [
        (RELAXED, "post", "mlm+nsp"),
        (RELAXED, "pre", "mlm"),
        ({"rank": RANK}, "post", "mlm"),
        ({"score_dim": r}, "post", "mlm"),
        ({"score_dim": D - 1, "embedding": 8}, "post", "mlm"),
    ],
)
def test_the_logits_stay(relaxed, norm, objective):
    model = small(**relaxed, norm=norm, objective=objective)
    whole = refined(model)
    assert whole.config == replace(model.config, **WHOLE)
    assert_near(logits(whole), logits(model))
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for p in model.parameters())


def test_in_float32_they_stay_to_1e_5():
    """The check as it is written, by the implementation that a run takes, at a width where sums round."""
    model = tiny(hidden=128, heads=4, rank=32, score_dim=16, init_std=0.05).eval()
    assert (logits(refined(model)) - logits(model)).abs().max() <= 1e-5


def test_one_may_become_whole_before_the_other():
    model = small(**RELAXED)
    half = refined(model, score_dim=r)
    assert half.config.rank == 0 and half.config.score_dim == r
    both = refined(half)
    for other in (half, both, refined(refined(model, rank=RANK))):
        assert_near(logits(other), logits(model))
    assert all(torch.equal(a, b) for a, b in zip(both.parameters(), refined(model).parameters(), strict=True))


def test_operators_by_hand():
    model = small(**RELAXED)
    old, new = model.bank.layers[1], refined(model).bank.layers[1]
    assert_near(new.inner_weight, old.inner_expand @ old.inner_reduce)
    assert_near(new.outer_weight, old.outer_expand @ old.outer_reduce)
    for slot in ("qkv_weight", "qkv_bias"):
        (q, k, v), (wide_q, wide_k, same_v) = thirds(getattr(old, slot), r), thirds(getattr(new, slot))
        assert_near(wide_q[:, :r], q * (D / r) ** 0.5)
        assert torch.equal(wide_k[:, :r], k) and torch.equal(same_v, v)
        assert not wide_q[:, r:].any()
        assert wide_k[:, r:].all() if slot == "qkv_weight" else not wide_k[:, r:].any()


def test_new_keys_are_a_function_of_seed_and_row_and_as_large_as_a_new_layers():
    model = small(**RELAXED, hidden=64, init_std=0.1)

    def keys(of: Bert, seed: int) -> list[torch.Tensor]:
        return [layer.qkv_weight.detach()[64:128].view(H, -1, 64)[:, r:] for layer in refined(of, seed).bank.layers]

    first, other = keys(model, 0), keys(model, 1)
    assert len({k.numpy().tobytes() for k in first + other}) == 6
    assert torch.equal(keys(small(**RELAXED | {"rank": 9}, hidden=64, init_std=0.1, layers=2), 0)[1], first[1])
    assert 0.09 < first[0].std() < 0.11  # 3,712 numbers: their deviation is known to 1.2%


def test_products_begin_as_large_as_a_whole_matrix():
    """r terms of two factors: their deviation is the root of r times both. 48 x 192 products of rank 12, known to some percent."""
    model = Bert(ModelConfig(**(TINY | {"hidden": 48, "rank": 12, "scaled_init": True})))
    layer = model.bank.layers[0]
    assert 0.9 < (layer.inner_expand @ layer.inner_reduce).std() / 0.2 < 1.1
    assert 0.9 < (layer.outer_expand @ layer.outer_reduce).std() / (0.2 / (2 * 4) ** 0.5) < 1.1


def test_rows_that_layers_share_or_that_none_reads_yet_become_whole_too():
    model = small(**RELAXED)
    model.use(2, rows=(0, 0))
    whole = refined(model)
    assert whole.depth == 2 and whole.rows == (0, 0) and len(whole.bank) == 3
    assert_near(logits(whole), logits(model))
    row = model.bank.layers[2]
    assert_near(whole.bank.layers[2].inner_weight, row.inner_expand @ row.inner_reduce)


def test_relaxed_layers_grow_in_depth():
    """Copies of all slots; identity layers end in zero factors and keep the function of a pre-norm encoder."""
    for operator in ("stack", "identity"):
        model = small(**RELAXED, layers=4, norm="pre")
        model.use(2)
        before = logits(model)
        grow(model, None, Stage(steps=1, depth=4, grow=operator), seed=0)
        model.use(4)
        assert (logits(model) - before).abs().max() <= 1e-12 or operator == "stack"
        if operator == "stack":
            assert torch.equal(model.bank.weights[2:], model.bank.weights[:2])


# What learns


def test_gradients_follow_the_chain_rule():
    """Of A and B in W = B A: B^T dW and dW A^T. Of queries, divided by what their weights are multiplied by; of all else, the same."""
    model = small(**RELAXED, objective="mlm+nsp")
    before, after = gradients(model), gradients(refined(model))
    scale = (D / r) ** 0.5
    for name, gradient in before.items():
        prefix, _, slot = name.rpartition(".")
        if slot.endswith(("_reduce", "_expand")):
            part = slot.split("_")[0]
            dW, factors = after[f"{prefix}.{part}_weight"], dict(model.named_parameters())
            expand, reduce = factors[f"{prefix}.{part}_expand"], factors[f"{prefix}.{part}_reduce"]
            assert_near(gradient, expand.T @ dW if slot.endswith("_reduce") else dW @ reduce.T)
        elif slot.startswith("qkv_"):
            (q, k, v), (wide_q, wide_k, wide_v) = thirds(gradient, r), thirds(after[name])
            assert_near(wide_q[:, :r], q / scale)
            assert_near(wide_k[:, :r], k)
            assert_near(wide_v, v)
        else:
            assert_near(after[name], gradient)


def stepped(model: Bert, steps: int) -> list[dict[str, torch.Tensor]]:
    """The gradients of each of so many steps of plain descent."""
    seen = []
    for _ in range(steps):
        seen.append(gradients(model))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.1 * seen[-1][name]
    return seen


def test_every_matrix_learns_once_layers_are_whole():
    """New query channels at the first step, new key channels from the second on; the bias of keys never, which softmax does not see."""
    model = small(**RELAXED)
    whole = refined(model)
    names = {name for name, _ in whole.named_parameters()}
    assert names == {name for name, _ in small().named_parameters()}
    assert not any(part in name for name in names for part in ("reduce", "expand"))
    first, second = stepped(whole, 2)
    for name, gradient in first.items():
        if gradient.dim() == 2 and name not in ("word", "position"):  # of these, rows that the batch reads
            assert (gradient != 0).any(1).all() or "qkv" in name, name
    for (q, k), (q_later, k_later) in zip(new_channels(first), new_channels(second), strict=True):
        assert q.all() and not k.any()
        assert q_later.all() and k_later.all()
    for found in (first, second):
        for i in LAYERS:
            q, k, _ = thirds(found[f"bank.layers.{i}.qkv_bias"])
            assert q.abs().max() > 1e-6 > ROUNDING > k.abs().max()


def test_were_both_new_channels_zero_neither_would_ever_learn():
    model = refined(small(**RELAXED))
    with torch.no_grad():
        for layer in model.bank.layers:
            thirds(layer.qkv_weight)[1][:, r:] = 0
    for found in stepped(model, 3):
        for q, k in new_channels(found):
            assert not q.any() and not k.any()


def test_the_rank_grows_by_itself():
    model = small(**RELAXED, init_std=0.5)
    whole = refined(model)
    weight = whole.bank.layers[0].inner_weight
    assert torch.linalg.matrix_rank(weight) == RANK
    stepped(whole, 1)
    assert torch.linalg.matrix_rank(weight, rtol=1e-6) > RANK


# Moments


OPTIM = OptimConfig(lr=1e-3, weight_decay=0.0)


def trained(steps: int, **changes) -> tuple[Bert, Optimizer]:
    """A relaxed model after `steps` whose gradients are all one."""
    model = tiny(**(RELAXED | {"hidden": C, "layers": 3} | changes))
    optimizer = Optimizer(model, OPTIM)
    optimizer.set_window(Stage(steps=1, depth=3))
    for _ in range(steps):
        step_of_ones(model, optimizer)
    return model, optimizer


def step_of_ones(model: Bert, optimizer: Optimizer) -> None:
    for row in model.bank.grads:
        for slot in model.bank.layout:
            slot.view(row).fill_(1)
    for parameter in model.always_on_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.norm = None
    optimizer.step(OPTIM.lr)


def refined_with_moments(model: Bert, optimizer: Optimizer, state: str) -> tuple[Bert, Optimizer]:
    stage = replace(REFINING, optimizer_state=state)
    shape = replace(model.config, **WHOLE)
    whole, moments = refine(model, optimizer.state_dict(), stage, shape, seed=0, optim=OPTIM)
    new = Optimizer(whole, OPTIM)
    new.load_state_dict(moments)
    new.set_window(stage)
    return whole, new


def test_moments_that_go_on_are_the_same_means_and_new_ones_are_zero():
    model, optimizer = trained(300)
    state, generator = optimizer.state_dict(), torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    before = {name: tensor.clone() for name, tensor in state.items()}
    _, new = refined_with_moments(model, optimizer, "copy")
    after = new.state_dict()

    def mean(state: dict, name: str) -> torch.Tensor:
        """Without the bias towards the zeros that it began with."""
        beta = OPTIM.beta2 if name.endswith("_sq") else OPTIM.beta1
        prefix = name.rpartition(".")[0]
        layer = ".".join(prefix.split(".")[:3]) if prefix.startswith("bank.") else prefix
        return state[name].double() / (1 - beta ** float(state[f"{layer}.step"]))

    for i in LAYERS:
        layer = f"bank.layers.{i}."
        assert after[f"{layer}step"] == 10  # what beta1 = 0.9 remembers
        for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            assert not after[f"{layer}inner_weight.{kind}"].any() and not after[f"{layer}outer_weight.{kind}"].any()
            for slot in ("out_weight", "out_bias", "inner_bias", "norm2_weight"):
                torch.testing.assert_close(mean(after, f"{layer}{slot}.{kind}"), mean(before, f"{layer}{slot}.{kind}"))
            for slot in ("qkv_weight", "qkv_bias"):
                q, k, v = thirds(mean(before, f"{layer}{slot}.{kind}"), r)
                wide_q, wide_k, wide_v = thirds(mean(after, f"{layer}{slot}.{kind}"))
                torch.testing.assert_close(wide_q[:, :r], q * (r / D) ** (power / 2))
                torch.testing.assert_close(wide_k[:, :r], k)
                torch.testing.assert_close(wide_v, v)
                assert not wide_q[:, r:].any() and not wide_k[:, r:].any()
    for name in ("word", "mlm.transform.weight"):
        assert all(torch.equal(after[f"{name}.{part}"], before[f"{name}.{part}"]) for part in ("exp_avg", "step"))


@pytest.mark.parametrize("state", ["zero", "reset"])
def test_moments_that_begin_without(state):
    model, optimizer = trained(3)
    _, new = refined_with_moments(model, optimizer, state)
    assert not new.exp_avg.any() and not new.exp_avg_sq.any() and not new.steps.any()
    assert new.state_dict()["word.step"] == (3 if state == "zero" else 0)


@pytest.mark.parametrize("before", [2, 300])
def test_no_matrix_moves_further_at_first_than_it_should(before):
    """Gradients of one move a parameter by the rate. What begins with zero moments at the count n of the others moves by
    (1 - b1^t) / (1 - b1^(n + t)) / sqrt((1 - b2^t) / (1 - b2^(n + t))) of it after t steps: at most 1.13 for n = 10 (3 to 6 for n = 300)."""
    model, optimizer = trained(before)
    whole, new = refined_with_moments(model, optimizer, "copy")
    for t in range(1, 61):
        old = {slot.name: slot.view(whole.bank.weights[0]).clone() for slot in whole.bank.layout}
        step_of_ones(whole, new)
        moved = {name: (x - getattr(whole.bank.layers[0], name)) / OPTIM.lr for name, x in old.items()}
        assert 0.2 < moved["inner_weight"].max() < 1.14, t
        torch.testing.assert_close(moved["out_weight"], torch.ones_like(moved["out_weight"]), rtol=0, atol=1e-2)
    assert float(new.steps[0]) == min(before, 10) + 60


def test_a_loss_goes_on_where_it_was():
    model, optimizer = trained(2)
    whole, _ = refined_with_moments(model, optimizer, "copy")
    losses = [float(m.eval()(batch()).loss.detach()) for m in (model, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
