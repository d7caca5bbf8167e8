"""Layer stacking for people who train with transformers' Trainer: stop at a checkpoint, grow it, go on with a new Trainer.

A model does not grow inside a living Trainer: its optimizer would not know the new parameters, and DistributedDataParallel would
train them on each rank alone without saying so. So StackingCallback only ends the stage, with everything saved; growth is from one
checkpoint to another (growth/checkpoint.py); and each stage has a Trainer that was built for its depth. grow_and_resume does all
three in a loop.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerState

from stackbert_kernels.config import GROWTH_OPERATORS, OPTIMIZER_STATES, ConfigError, check_growth
from stackbert_kernels.growth.checkpoint import STATE, grow_checkpoint, read_source

if TYPE_CHECKING:
    from transformers import Trainer


class StackingCallback(TrainerCallback):
    """Ends training at each step at which the encoder is to grow, with a checkpoint to grow from.

        growth           {step: layers}: after this many steps the model gets this many layers; both ascend
        operator         how layers get their weights (growth/depth.py)
        optimizer_state  copy, zero or reset: what becomes of the moments (grow_checkpoint)
        seed             for operators that draw

    max_steps is that of the whole training, so that the learning rate follows one schedule through all stages. A Trainer whose
    model has not the depth that the schedule wants, or whose settings would lose the checkpoint, is a ConfigError (a ValueError)
    as it begins to train.
    """

    def __init__(
        self,
        growth: Mapping[int, int],
        operator: str = "stack",
        *,
        optimizer_state: str = "copy",
        seed: int = 0,
    ):
        if not growth or not all(type(n) is int and n > 0 for pair in growth.items() for n in pair):
            raise ConfigError(f"StackingCallback: growth must map steps to layers, {{2000: 6}}, got {dict(growth)}")
        if operator not in GROWTH_OPERATORS:
            raise ConfigError(
                f"StackingCallback: operator must be one of {', '.join(GROWTH_OPERATORS)}, got {operator!r}"
            )
        if optimizer_state not in OPTIMIZER_STATES:
            raise ConfigError(
                f"StackingCallback: optimizer_state must be one of {', '.join(OPTIMIZER_STATES)}, got {optimizer_state!r}"
            )
        self.growth = dict(sorted(growth.items()))
        self.operator, self.optimizer_state, self.seed = operator, optimizer_state, seed
        depths = list(self.growth.values())
        for old, new in pairwise(depths):
            check_growth(operator, old, new, where="StackingCallback: ")

    def wanted_depth(self, step: int) -> int | None:
        """The layers that a model has that goes on from `step`; None before the first growth."""
        return next((layers for at, layers in reversed(self.growth.items()) if at <= step), None)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._check_settings(args, state)
        depth, wanted = model.config.num_hidden_layers, self.wanted_depth(state.global_step)
        if wanted is None:
            check_growth(self.operator, depth, next(iter(self.growth.values())), where="StackingCallback: ")
        elif depth != wanted:
            raise ConfigError(
                f"StackingCallback: at step {state.global_step} the model must have {wanted} layers, got {depth}; "
                f"grow its checkpoint (stackbert grow IN OUT --layers {wanted} --operator {self.operator}) or use grow_and_resume"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.growth:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def _check_settings(self, args, state) -> None:
        last = max(self.growth)
        if state.max_steps <= last:
            raise ConfigError(
                f"StackingCallback: max_steps is of the whole training and must be > {last}, the last growth, got {state.max_steps}"
            )
        for name, bad, why in (
            ("save_only_model", args.save_only_model, "the optimizer's state grows with the model"),
            ("save_strategy", args.save_strategy == "best", "the step of a growth must be saved"),
            ("deepspeed", args.deepspeed, "its state is sharded"),
            ("fsdp", args.fsdp, "its state is sharded"),
        ):
            if bad:
                value = getattr(args, name)
                raise ConfigError(f"StackingCallback: {name} must not be {getattr(value, 'value', value)}: {why}")
        if args.save_total_limit == 1 and args.load_best_model_at_end:
            raise ConfigError(
                "StackingCallback: save_total_limit must be > 1 with load_best_model_at_end, or the last step is lost"
            )

    def grown(self, checkpoint: Path) -> Path:
        """`checkpoint`, or what it became if a growth is due at its step: grown-N beside it, made anew each time."""
        step = _step(checkpoint)
        source = read_source(checkpoint)
        layers = self.growth.get(step)
        if layers is None or source.depth == layers:
            return checkpoint
        out = checkpoint.parent / f"grown-{step}"
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            self._grow(checkpoint, out, layers)
        else:
            from accelerate import PartialState

            ranks = PartialState()
            ranks.wait_for_everyone()  # each rank has saved its random state
            with ranks.main_process_first():
                if ranks.is_main_process:
                    self._grow(checkpoint, out, layers)
        return out

    def _grow(self, checkpoint: Path, out: Path, layers: int) -> None:
        options = {"optimizer_state": self.optimizer_state, "seed": self.seed, "overwrite": True}
        grow_checkpoint(checkpoint, out, layers, self.operator, **options)


def grow_and_resume(
    make_trainer: Callable[[str | None], Trainer], stacking: StackingCallback, output_dir: Path | str
) -> Trainer:
    """Trains through every growth of `stacking`; returns the last Trainer. Called again after a stop, it goes on from the last checkpoint.

    make_trainer  checkpoint -> a new Trainer: its model from_pretrained(checkpoint), or the shallow one to begin with for None.
                  Only the model differs from call to call
    output_dir    that of the Trainer's arguments; checkpoint-N are Trainer's own, grown-N what the one of a growth became
    """
    output = Path(output_dir)
    checkpoint = last_checkpoint(output)
    while True:
        if checkpoint is not None:
            checkpoint = stacking.grown(checkpoint)
        trainer = make_trainer(None if checkpoint is None else str(checkpoint))
        if Path(trainer.args.output_dir).resolve() != output.resolve():
            raise ConfigError(
                f"grow_and_resume: the Trainer's output_dir must be {output}, got {trainer.args.output_dir}"
            )
        if stacking not in trainer.callback_handler.callbacks:
            trainer.add_callback(stacking)
        if checkpoint is not None and 0 < trainer.args.max_steps <= _step(checkpoint):
            trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
            return trainer  # resumed at its end in mid-epoch, Trainer would do one step more
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step = trainer.state.global_step
        if stacking.growth.get(step, 0) <= trainer.model.config.num_hidden_layers:
            return trainer
        checkpoint = output / f"checkpoint-{step}"


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint-N that Trainer finished writing: trainer_state.json comes last. Newer ones are named in a warning."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit():
            steps[int(number)] = path
    for step, path in sorted(steps.items(), reverse=True):
        if _step(path) == step:
            return path
        warnings.warn(f"{path} was not written to its end and is not used", stacklevel=2)
    return None


def _step(checkpoint: Path) -> int | None:
    try:
        return json.loads((checkpoint / STATE).read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return None
