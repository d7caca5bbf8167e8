"""The optimizer over the bank: torch's AdamW on the window, LAMB and LANS by parameter, nothing at all elsewhere."""

from __future__ import annotations

import pytest
import torch
from model.samples import batch, tiny

from stackbert_kernels import ops
from stackbert_kernels.config import OptimConfig, Stage
from stackbert_kernels.train.optim import Optimizer

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1)
STAGE_1 = Stage(steps=1, depth=2)
STAGE_2 = Stage(steps=1, depth=4, train_from=2, grow="copy_top", embeddings="freeze")
JOINT = Stage(steps=1, depth=4)


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are tiny: waking a second thread costs more than it does, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def enter(model, optimizer, stage: Stage) -> None:
    model.use(stage.depth, stage.train_from, stage.embeddings, stage.frozen_dropout)
    optimizer.set_window(stage)


def make(stage: Stage = JOINT, config: OptimConfig = CONFIG, **changes):
    model = tiny(**changes)
    model.use(stage.depth, stage.train_from, stage.embeddings)
    optimizer = Optimizer(model, config)
    optimizer.set_window(stage)
    return model, optimizer


def backward(model, step: int, scale: float = 1.0, pair: bool = False) -> torch.Tensor:
    loss = model(batch(seed=step, pair=pair), rng=ops.new_rng(5, step)).loss * scale
    loss.backward()
    return loss


def train(model, optimizer, steps, lr: float = 1e-2, pair: bool = False) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, pair=pair)
        optimizer.clip(1.0)
        optimizer.step(lr, loss=loss)


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"weights {name}": p for name, p in model.named_parameters()} | optimizer.state_dict()
    tensors |= {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq, "steps": optimizer.steps}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- against torch ---


@pytest.mark.parametrize("stage", [JOINT, STAGE_1, STAGE_2], ids=["all", "lower", "upper"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6], ids=["unclipped", "clipped", "below the clip"])
def test_matches_torch(stage, max_norm):
    """torch.optim.AdamW(fused=True) on separate tensors. Where a row is cut changes which elements the kernel's vector loop takes and
    which its scalar tail, and clipping divides here and multiplies there: rounding of single operations, hence 4 ulp a step."""
    ours, optimizer = make(stage, objective="mlm+nsp")
    twin = tiny(objective="mlm+nsp")
    twin.use(stage.depth, stage.train_from, stage.embeddings)
    learning = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": CONFIG.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, fused=True)
    for step in range(4):
        lr = 1e-3 * (step + 1)
        backward(ours, step, pair=True)
        # The twin gets our gradients: its own would differ by what its weights differ.
        for (name, p), (twin_name, q) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
            assert name == twin_name and p.requires_grad == q.requires_grad
            q.grad = p.grad.clone() if p.requires_grad else None
        norm = optimizer.clip(max_norm)
        if max_norm:
            expected = torch.nn.utils.clip_grad_norm_(learning, max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
        assert optimizer.step(lr) == 0.0
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        optimizer.zero_grad()
        for (name, p), (_, q) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
            ulps = 4 * (step + 1) * torch.finfo(torch.float32).eps
            torch.testing.assert_close(p, q, rtol=ulps, atol=ulps * lr, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["lamb", "lans"])
@pytest.mark.parametrize(
    ("stage", "changes"),
    [(JOINT, {}), (STAGE_2, {}), (JOINT, {"rank": 8, "score_dim": 4})],
    ids=["all", "upper", "relaxed"],
)
def test_lamb_and_lans_take_each_parameter_of_each_layer_for_itself(name, stage, changes):
    """Bit for bit: each parameter that learns, as a tensor of its own; query, key and value are three of them."""
    model, optimizer = make(stage, OptimConfig(optimizer=name, weight_decay=0.1), objective="mlm+nsp", **changes)

    def separate(n: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(tensor.split(model.config.qkv_widths)) if ".qkv_" in n else [tensor]

    alone = {
        n: [
            [t.detach().clone() for t in (q, torch.zeros_like(q), torch.zeros_like(q), torch.zeros(()))]
            for q in separate(n, p)
        ]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for step in range(3):
        optimizer.zero_grad()
        loss = backward(model, step, pair=True)
        norm = optimizer.clip(1.0)
        for n, p in model.named_parameters():
            if p.requires_grad:
                clip = {"max_norm": 1.0} if name == "lamb" else {}
                call = ops.lamb_ if name == "lamb" else ops.lans_
                for (w, m, v, t), grad in zip(alone[n], separate(n, p.grad), strict=True):
                    adapted = w.numel() if p.dim() >= 2 else 0
                    call([w], [grad], [m], [v], [t], [adapted], lr=1e-2, weight_decay=0.1, norm=norm, **clip)
        assert optimizer.step(1e-2, loss=loss) == 0.0
    for n, p in model.named_parameters():
        assert torch.equal(p, torch.cat([part[0] for part in alone[n]]) if n in alone else frozen[n]), n


@pytest.mark.parametrize("name", ["lamb", "lans"])
def test_lamb_and_lans_keep_what_is_frozen_and_come_back_bit_for_bit(name):
    config = OptimConfig(optimizer=name)
    model, optimizer = make(STAGE_1, config)
    train(model, optimizer, range(2))
    enter(model, optimizer, STAGE_2)
    before = everything(model, optimizer)
    state = {n: tensor.clone() for n, tensor in optimizer.state_dict().items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, range(2, 4))
    moved = changed(before, everything(model, optimizer))
    assert {f"weights {n}" for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in moved if n.startswith("weights")
    }
    assert torch.equal(optimizer.exp_avg[:2], before["exp_avg"][:2]) and optimizer.steps.tolist() == [2, 2, 2, 2]

    again, again_optimizer = make(STAGE_2, config, seed=1)
    again.load_state_dict(weights)
    again_optimizer.load_state_dict(state)
    train(again, again_optimizer, range(2, 4))
    assert not changed(everything(model, optimizer), everything(again, again_optimizer))

    backward(model, 4)
    model.bank.layers[2].inner_bias.grad[3] = float("nan")
    before = everything(model, optimizer)
    assert optimizer.step(1e-2) == 1.0
    assert changed(before, everything(model, optimizer)) == {"skipped"}


def test_biases_and_norms_do_not_decay():
    model, optimizer = make(config=OptimConfig(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.bank.grads.zero_()
    for parameter in model.always_on_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        factor = 0.95 if p.dim() >= 2 else 1.0
        torch.testing.assert_close(p, before[name] * factor, msg=lambda m, name=name: f"{name}: {m}")
    assert all(slot.shape[1:] for slot in model.bank.layout if slot.offset < model.bank.decay_size)


# --- the window ---


def test_frozen_parameters_are_bitwise_unchanged():
    model, optimizer = make(STAGE_1)
    train(model, optimizer, range(3))
    model.depth = 4
    enter(model, optimizer, STAGE_2)
    before = everything(model, optimizer)
    train(model, optimizer, range(3, 6))
    moved = changed(before, everything(model, optimizer))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert {"word", "position", "token_type", "embedding_norm.weight", "bank.layers.1.qkv_weight"} <= set(frozen)
    for name in frozen:
        assert not {f"weights {name}", f"{name}.exp_avg", f"{name}.exp_avg_sq", f"{name}.step"} & moved
    assert {f"weights {name}" for name, p in model.named_parameters() if p.requires_grad} <= moved
    assert optimizer.steps.tolist() == [3, 3, 3, 3]
    assert optimizer.always_on["word"].step == 3 and optimizer.always_on["mlm.bias"].step == 6


def test_each_row_counts_its_own_steps():
    model, optimizer = make(STAGE_1)
    train(model, optimizer, range(2))
    enter(model, optimizer, STAGE_2)
    train(model, optimizer, range(3))
    enter(model, optimizer, JOINT)
    train(model, optimizer, range(1))
    assert optimizer.steps.tolist() == [3, 3, 4, 4]


def test_no_state_for_what_never_learned():
    _, optimizer = make(STAGE_2)
    assert set(optimizer.always_on) == {
        "mlm.transform.weight",
        "mlm.transform.bias",
        "mlm.norm.weight",
        "mlm.norm.bias",
        "mlm.bias",
    }


def test_private_decoder_has_moments_only_while_it_exists():
    model, optimizer = make(STAGE_1)
    train(model, optimizer, range(1))
    enter(model, optimizer, Stage(steps=1, depth=4, train_from=2, grow="copy_top", embeddings="untie"))
    train(model, optimizer, range(2))
    assert optimizer.always_on["mlm.decoder"].step == 2 and optimizer.always_on["word"].step == 1
    enter(model, optimizer, JOINT)
    train(model, optimizer, range(1))
    assert "mlm.decoder" not in optimizer.always_on and optimizer.always_on["word"].step == 2


@pytest.mark.parametrize("policy", ["copy", "zero", "reset"])
def test_a_new_window_resets_the_moments_only_if_asked(policy):
    model, optimizer = make(STAGE_1)
    train(model, optimizer, range(2))
    enter(model, optimizer, Stage(steps=1, depth=4, optimizer_state=policy))
    kept = policy != "reset"
    assert optimizer.exp_avg[:2].any() == kept and optimizer.always_on["word"].exp_avg.any() == kept
    assert optimizer.steps[0] == (2 if kept else 0)


def test_set_window_wants_the_model_first():
    model, optimizer = make(STAGE_1)
    with pytest.raises(ValueError, match=r"model.use must set the window \[2, 4\) first, got \[0, 2\]"):
        optimizer.set_window(STAGE_2)
    model.use(4)
    backward(model, 0)
    with pytest.raises(
        ValueError, match=r"set_window must follow model.use; the window is \[0, 4\], the optimizer's \[0, 2\]"
    ):
        optimizer.step(1e-2)


# --- clipping and skipping ---


def test_norm_is_of_exactly_the_trainable_gradients():
    model, optimizer = make(STAGE_2)
    backward(model, 0)
    model.bank.grads[:2] = 1e9  # frozen rows: whatever stands there is not theirs
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    norm = optimizer.clip(1.0)
    assert abs(norm.double() - exact) <= 1e-6 * exact
    assert torch.equal(norm, optimizer.clip(1.0))


@pytest.mark.parametrize("what", ["row gradient", "always-on gradient", "infinite gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(what):
    model, optimizer = make()
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    for bad in (2, 3):
        optimizer.zero_grad()
        loss = backward(model, bad)
        if what == "row gradient":
            model.bank.layers[1].inner_bias.grad[3] = float("nan")
        elif what == "always-on gradient":
            model.mlm.bias.grad[3] = float("nan")
        elif what == "infinite gradient":
            model.bank.layers[1].inner_bias.grad[3] = float("inf")
        else:
            loss = loss * float("inf")
        optimizer.clip(1.0)
        assert optimizer.step(1e-2, loss=loss) == 1.0
    assert optimizer.skipped.tolist() == [2, 2]
    assert changed(before, everything(model, optimizer)) == {"skipped"}
    train(model, optimizer, [4])
    assert optimizer.skipped.tolist() == [2, 0]

    twin, twin_optimizer = make()
    train(twin, twin_optimizer, [0, 1, 4])
    assert changed(everything(model, optimizer), everything(twin, twin_optimizer)) == {"skipped"}


def test_the_first_step_can_be_skipped():
    """Step count 0 makes Adam's bias correction divide by zero: nothing of it may reach the weights."""
    model, optimizer = make()
    before = everything(model, optimizer)
    backward(model, 0, scale=float("nan"))
    assert optimizer.step(1e-2) == 1.0
    assert changed(before, everything(model, optimizer)) == {"skipped"}


def test_clipping_of_one_step_does_not_reach_the_next():
    model, optimizer = make()
    twin, twin_optimizer = make()
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        backward(m, 0)
        o.clip(1e-3 if m is model else 0.0)
        o.zero_grad()
        backward(m, 1)
        o.step(1e-2)
    assert not changed(everything(model, optimizer), everything(twin, twin_optimizer))


# --- state ---


@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2, JOINT], ids=["lower", "upper", "all"])
def test_state_brings_a_run_back_bit_for_bit(stage):
    model, optimizer = make(STAGE_1)
    train(model, optimizer, range(2))
    enter(model, optimizer, stage)
    train(model, optimizer, range(2, 4))
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(4, 7))

    again, again_optimizer = make(stage, seed=1)
    again_optimizer.exp_avg.fill_(7.0)
    again_optimizer.steps.fill_(7.0)
    again.load_state_dict(weights)
    again_optimizer.load_state_dict(state)
    train(again, again_optimizer, range(4, 7))
    assert not changed(everything(model, optimizer), everything(again, again_optimizer))


def test_state_is_named_by_parameter_and_shares_storage():
    model, optimizer = make(STAGE_1)
    state = optimizer.state_dict()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removesuffix(".exp_avg") for name in state if name.endswith(".exp_avg")} == names
    assert {"bank.layers.1.step", "word.step", "skipped"} <= set(state) and "bank.layers.2.step" not in state
    assert (
        state["bank.layers.1.out_weight.exp_avg"].data_ptr()
        == model.bank.layout[1].view(optimizer.exp_avg[1]).data_ptr()
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("word.exp_avg_sq"), "the state lacks word.exp_avg_sq"),
        (lambda state: state.pop("mlm.bias.exp_avg"), "the state lacks mlm.bias.exp_avg"),
        (lambda state: state.pop("bank.layers.0.step"), "the state lacks bank.layers.0.step"),
        (lambda state: state.update({"other.exp_avg": torch.zeros(1)}), "the state has unknown other.exp_avg"),
        (
            lambda state: state.update({"bank.layers.2.step": torch.zeros(())}),
            "the state has unknown bank.layers.2.step",
        ),
        (
            lambda state: state.update({"word.exp_avg": torch.zeros(3, 4)}),
            r"word.exp_avg must be \[97, 32\], got \[3, 4\]",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(edit, message):
    model, optimizer = make(STAGE_1)
    train(model, optimizer, range(1))
    state = {name: tensor + 1 for name, tensor in optimizer.state_dict().items()}
    edit(state)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not changed(before, everything(model, optimizer))
