"""Growth between runs of transformers' Trainer: stages end where they should, moments arrive, a stop anywhere changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stackbert_kernels as sbk
from stackbert_kernels.config import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from stackbert_kernels.growth import grow_checkpoint  # noqa: E402
from stackbert_kernels.hf import StackingCallback, grow_and_resume  # noqa: E402
from stackbert_kernels.hf.stacking import last_checkpoint  # noqa: E402

SCHEDULE = {3: 2, 5: 6}
LAYER = "bert.encoder.layer."


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stop(TrainerCallback):
    """Ends the process, so to speak, at the end of a step: before it is saved, or after."""

    def __init__(self, step: int, event: str):
        self.step, self.event = step, event

    def on_step_end(self, args, state, control, **kwargs):
        self._stop("on_step_end", state)

    def on_save(self, args, state, control, **kwargs):
        self._stop("on_save", state)

    def _stop(self, event, state):
        if (event, state.global_step) == (self.event, self.step):
            raise KeyboardInterrupt


class Moments(TrainerCallback):
    """What the optimizer holds as each Trainer begins, by name."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
        self.seen.append({name: {k: v.clone() for k, v in entry.items()} for name, entry in held.items()})


def trainers(out: Path, *callbacks: TrainerCallback, dropout: float = 0.0, **arguments):
    """make_trainer: one layer to begin with, eight steps, a checkpoint every two."""
    ids = torch.randint(5, 41, (24, 7), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def make_trainer(checkpoint):
        settings = BertConfig(
            vocab_size=41,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=20,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        torch.manual_seed(0)
        model = BertForMaskedLM.from_pretrained(checkpoint) if checkpoint else BertForMaskedLM(settings)
        defaults = {
            "max_steps": 8,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        args = TrainingArguments(str(out), **(defaults | arguments))
        return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))

    return make_trainer


def run(out: Path, *callbacks: TrainerCallback, stacking=None, **settings) -> Trainer:
    return grow_and_resume(trainers(out, *callbacks, **settings), stacking or StackingCallback(SCHEDULE), out)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(where, its last weights, moments at the start of each stage) of a run that nothing interrupts, with dropout."""
    torch.set_num_threads(1)
    out, moments = tmp_path_factory.mktemp("straight"), Moments()
    trainer = run(out, moments, dropout=0.1)
    return out, trainer, moments.seen


def test_the_stages_of_a_run(straight):
    out, trainer, _ = straight
    assert trainer.state.global_step == 8 and trainer.model.config.num_hidden_layers == 6
    depths = {path.name: json.loads((path / "config.json").read_text())["num_hidden_layers"] for path in out.iterdir()}
    assert depths == {
        "checkpoint-2": 1,
        "checkpoint-3": 1,
        "grown-3": 2,
        "checkpoint-4": 2,
        "checkpoint-5": 2,
        "grown-5": 6,
        "checkpoint-6": 6,
        "checkpoint-8": 6,
    }
    logged = {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line}
    assert logged == pytest.approx({step: 1e-2 * (1 - (step - 1) / 8) for step in range(1, 9)})
    epochs = [line["epoch"] for line in trainer.state.log_history if "learning_rate" in line]
    assert epochs == pytest.approx([step / 6 for step in range(1, 9)])


@pytest.mark.parametrize("step, stage, rows", [(3, 1, [0, 0]), (5, 2, [0, 1, 0, 1, 0, 1])])
def test_weights_and_moments_of_a_stage_are_those_of_the_one_before(straight, step, stage, rows):
    """By a map that is written out here; what the living optimizer of the deeper model holds, not only what a file does."""
    out, _, seen = straight
    old, new = (
        load_file(out / f"checkpoint-{step}" / "model.safetensors"),
        load_file(out / f"grown-{step}" / "model.safetensors"),
    )

    def source(name):
        layer, _, rest = name.removeprefix(LAYER).partition(".")
        return f"{LAYER}{rows[int(layer)]}.{rest}" if name.startswith(LAYER) else name

    assert len(new) == len(old) + 16 * (len(rows) - len([n for n in old if n.endswith("query.weight")]))
    for name, tensor in new.items():
        assert torch.equal(tensor, old[source(name)]), name

    shallow = BertForMaskedLM.from_pretrained(out / f"checkpoint-{step}")
    names = [n for n, _ in shallow.named_parameters()]
    plain = [n for n in names if "bias" in n or "LayerNorm" in n]
    state = torch.load(out / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
    before = {n: state[i] for i, n in enumerate([n for n in names if n not in plain] + plain)}
    assert len(seen[stage]) == len(names) + 16 * (len(rows) - max(rows) - 1)
    for name, held in seen[stage].items():
        assert held["step"] == step
        for moment, tensor in before[source(name)].items():
            assert torch.equal(held[moment], tensor), (name, moment)


@pytest.mark.parametrize(
    "stop",
    [
        Stop(1, "on_step_end"),
        Stop(3, "on_step_end"),
        Stop(3, "on_save"),
        Stop(4, "on_step_end"),
        Stop(5, "on_save"),
        Stop(7, "on_step_end"),
    ],
    ids=lambda stop: f"{stop.step}-{stop.event}",
)
def test_a_stopped_run_ends_bitwise_as_one_that_was_not(straight, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop, dropout=0.1)
    trainer = run(tmp_path, dropout=0.1)
    expected = straight[1].model.state_dict()
    assert trainer.state.global_step == 8
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_finished_run_stays_finished(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    trainer = run(tmp_path / "out", dropout=0.1)
    assert trainer.state.global_step == 8 and trainer.model.config.num_hidden_layers == 6
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, straight[1].model.state_dict()[name]), name


def test_resuming_twice_from_a_grown_checkpoint_is_the_same_twice(straight, tmp_path):
    weights = []
    for name in ("a", "b"):
        trainer = trainers(tmp_path / name, dropout=0.1)(str(straight[0] / "grown-5"))
        trainer.train(resume_from_checkpoint=str(straight[0] / "grown-5"))
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]) and torch.equal(tensor, straight[1].model.state_dict()[name]), name


def test_fresh_layers_start_without_moments(tmp_path):
    moments = Moments()
    trainer = run(tmp_path, moments, stacking=StackingCallback({3: 2}, "random", seed=4), max_steps=4)
    assert trainer.model.config.num_hidden_layers == 2
    grow_checkpoint(tmp_path / "checkpoint-3", tmp_path / "by-hand", 2, "random", seed=4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("grown-3", "by-hand")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    without = {name for name, held in moments.seen[1].items() if not held}
    assert without == {name for name in moments.seen[1] if name.startswith(f"{LAYER}1.")}
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1, 4}


def test_options_of_the_callback_reach_the_growth(tmp_path):
    """And a stage that ends between two lines of the log loses no loss."""
    moments = Moments()
    stacking = StackingCallback({3: 2}, optimizer_state="reset")
    trainer = run(tmp_path, moments, stacking=stacking, max_steps=4, logging_steps=4)
    assert not any(moments.seen[1].values())
    losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    assert list(losses) == [3, 4] and all(loss > 1 for loss in losses.values())


def test_the_best_of_a_shallower_model_is_forgotten(tmp_path):
    """Trainer would load its weights into the deeper model, and leave the new layers as they are."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True} | evaluation
    trainer = run(tmp_path, stacking=StackingCallback({4: 2}), **best)  # the loss falls: step 2 is the "best" of all
    assert trainer.state.best_global_step == 6 and trainer.model.config.num_hidden_layers == 2
    best = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    for name, tensor in best.items():
        if (
            "LayerNorm" not in name
        ):  # transformers 5.0 saves these under old names, which its own Trainer does not load again
            assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_patched_models_grow_as_others_do(tmp_path):
    """Each stage's model is patched where it is made: checkpoints know nothing of it."""
    make = trainers(tmp_path / "patched")

    def patched(checkpoint):
        trainer = make(checkpoint)
        sbk.patch(trainer.model, unpad=True)
        return trainer

    a = grow_and_resume(patched, StackingCallback(SCHEDULE), tmp_path / "patched")
    b = run(tmp_path / "plain")
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (a, b)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-4)  # fp32 rounding, over eight steps
    configs = [json.loads((tmp_path / name / "grown-5" / "config.json").read_text()) for name in ("patched", "plain")]
    assert configs[0] == configs[1]
    names = [set(load_file(tmp_path / name / "grown-5" / "model.safetensors")) for name in ("patched", "plain")]
    assert names[0] == names[1]


def test_only_a_checkpoint_that_is_due_grows(straight):
    stacking = StackingCallback(SCHEDULE)
    for name in ("checkpoint-2", "checkpoint-4", "grown-3", "grown-5"):
        assert stacking.grown(straight[0] / name) == straight[0] / name


def test_a_checkpoint_that_was_cut_short_is_passed_over(straight, tmp_path):
    for step in (2, 3):
        shutil.copytree(straight[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-x").mkdir()
    os.truncate(tmp_path / "checkpoint-3" / "trainer_state.json", 40)
    with pytest.warns(UserWarning, match="checkpoint-3 was not written to its end"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "absent") is None


# --- bad use: one line ---

CONSTRUCTED = {
    "growth must map steps to layers, {2000: 6}, got {}": ({},),
    "growth must map steps to layers, {2000: 6}, got {0: 3}": ({0: 3},),
    "growth must map steps to layers, {2000: 6}, got {0.5: 3}": ({0.5: 3},),
    "operator must be one of copy_top, stack, interleave, random, identity, got 'fold'": ({3: 2}, "fold"),
    "stack needs a multiple of the old depth, got 2 -> 3": ({3: 2, 5: 3},),
    "stack needs 0 < old depth < new depth, got 4 -> 2": ({3: 4, 5: 2},),
}


@pytest.mark.parametrize("message", CONSTRUCTED)
def test_an_impossible_schedule_is_refused(message):
    with pytest.raises(ConfigError, match=re.escape(f"StackingCallback: {message}")):
        StackingCallback(*CONSTRUCTED[message])


def test_an_unknown_optimizer_state_is_refused():
    with pytest.raises(ConfigError, match="optimizer_state must be one of copy, zero, reset, got 'keep'"):
        StackingCallback({3: 2}, optimizer_state="keep")


SETTINGS = {
    "max_steps is of the whole training and must be > 5, the last growth, got 5": {"max_steps": 5},
    "save_only_model must not be True: the optimizer's state grows with the model": {"save_only_model": True},
    "save_strategy must not be best: the step of a growth must be saved": {
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_on_start": False,
    },
    "save_total_limit must be > 1 with load_best_model_at_end": {
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_lose_a_checkpoint_are_refused_before_the_first_step(tmp_path, message):
    trainer = trainers(tmp_path, StackingCallback(SCHEDULE), **SETTINGS[message])
    with pytest.raises(ConfigError) as error:
        trainer(None).train()
    assert str(error.value).startswith(f"StackingCallback: {message}") and "\n" not in str(error.value)


def test_a_model_of_the_wrong_depth_is_refused(straight, tmp_path):
    """Trainer itself would load a shallower checkpoint into any model and only warn."""
    grown, before = str(straight[0] / "grown-3"), str(straight[0] / "checkpoint-3")
    with pytest.raises(
        ConfigError,
        match=re.escape("at step 3 the model must have 2 layers, got 1; grow its checkpoint (stackbert grow "),
    ):
        trainers(tmp_path, StackingCallback(SCHEDULE))(before).train(resume_from_checkpoint=before)
    with pytest.raises(ConfigError, match="StackingCallback: stack needs a multiple of the old depth, got 2 -> 3"):
        trainers(tmp_path, StackingCallback({5: 3}))(grown).train(resume_from_checkpoint=grown)
    with pytest.raises(ConfigError, match="StackingCallback: stack needs 0 < old depth < new depth, got 2 -> 2"):
        trainers(tmp_path, StackingCallback({5: 2}))(grown).train()


def test_another_output_dir_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the Trainer's output_dir must be "):
        grow_and_resume(trainers(tmp_path / "a"), StackingCallback(SCHEDULE), tmp_path / "b")


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "growth.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    left = {"checkpoint-20", "grown-20", "checkpoint-40", "grown-40", "checkpoint-80"}
    assert left <= set(os.listdir(tmp_path / "out"))
    assert capsys.readouterr().out.splitlines()[-1] == "12 layers"
