"""The optimizer over the rows of a LayerBank that a stage trains, and the always-on parameters.

L layers, P elements of a bank row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stackbert_kernels import ops
from stackbert_kernels.config import OptimConfig, Stage
from stackbert_kernels.model.bank import LayerBank
from stackbert_kernels.model.bert import Bert


@dataclass(frozen=True)
class Moments:
    """Adam's state of one always-on parameter."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # float32 scalar


class Optimizer:
    """AdamW, LAMB or LANS, as config.optimizer says, by ops.adamw_, lamb_ or lans_.

        exp_avg, exp_avg_sq  [L, P] float32  moments of the bank's rows
        steps                [L] float32     steps that each row has taken

    Matrices and embeddings decay, biases and norms do not (the recipe of BERT); in LAMB and LANS those are left out of the trust ratio, too,
    which each other parameter of each layer has for itself (the matrix of queries, keys and values counts as one). Only the window and the always-on parameters with
    requires_grad are touched: a frozen row keeps its weights, moments and count bit for bit, and nothing is allocated for an
    always-on parameter that never learned. A step whose loss or gradient norm is not finite changes nothing, decided on the device
    without a wait. Made for a model on its final device; call `set_window` after each `model.use`.
    """

    def __init__(self, model: Bert, config: OptimConfig):
        self.model, self.config = model, config
        bank = model.bank
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(bank.weights), torch.zeros_like(bank.weights)
        self.steps = torch.zeros(len(bank.weights), device=bank.weights.device)
        self.always_on: dict[str, Moments] = {}
        self.skipped = torch.zeros(2, device=bank.weights.device)  # steps skipped: in all, in a row until now
        self.norm: Tensor | None = None
        self._max_norm = 0.0
        self._readers: Tensor | None = None  # [bank_rows, 1] layers that read each row, where it learns from their mean
        self._parts = _parts(bank, model.config.qkv_widths)
        self._follow_model()

    def set_window(self, stage: Stage) -> None:
        """Trains what `model.use` of this stage marked; with stage.optimizer_state "reset", from zero moments.

        The first call of a stage that is entered, and before load_state_dict when a run resumes inside it.
        """
        if self.model.bank.window != (stage.train_from, stage.bank_rows):
            raise ValueError(f"Optimizer.set_window: model.use must set the window [{stage.train_from}, {stage.bank_rows}) first, "
                             f"got {list(self.model.bank.window)}")  # fmt: skip
        if stage.optimizer_state == "reset":
            self.reset()
        readers = [float(stage.attention_rows.count(row)) for row in range(stage.bank_rows)]
        self._readers = (
            torch.tensor(readers, device=self.steps.device)[:, None] if stage.shared_gradient == "mean" else None
        )
        self._follow_model()

    def reset(self) -> None:
        """Zero moments and step counts of all parameters."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.steps):
            tensor.zero_()
        self.always_on.clear()
        self._follow_model()

    def _follow_model(self) -> None:
        """Moments for exactly the always-on parameters that learn or have learned; a private decoder that is gone loses its own."""
        parameters = self.model.always_on_parameters()
        self.always_on = {name: moments for name, moments in self.always_on.items() if name in parameters}
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self.always_on:
                self.always_on[name] = _no_moments(parameter)
        self._learning = [(name, p) for name, p in parameters.items() if p.requires_grad]
        bank = self.model.bank
        self._window = bank.window
        rows = slice(*bank.window)
        self._rows = [t[rows] for t in (bank.weights, bank.grads, self.exp_avg, self.exp_avg_sq, self.steps)]
        self.norm = None

    def zero_grad(self) -> None:
        self.model.zero_grad()
        self.norm = None

    def gradients(self) -> list[Tensor]:
        """Exactly what this stage trains: the dense rows of the window, and the always-on gradients that exist."""
        if self.model.bank.window != self._window:
            raise ValueError(f"Optimizer: set_window must follow model.use; the window is {list(self.model.bank.window)}, "
                             f"the optimizer's {list(self._window)}")  # fmt: skip
        _, grads, *_ = self._rows
        return [grads, *(p.grad for _, p in self._learning if p.grad is not None)]

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Global norm of the gradients, a scalar on their device; the next `step` scales them to at most max_norm (0: as they are).

        The scaling is a factor inside the kernel, so it costs no pass over the gradients, which keep their values. LANS, which divides each
        gradient by its own norm, scales nothing. Where shared rows learn from the mean over their layers (Stage.shared_gradient), they get
        it here.
        """
        if self._readers is not None and self.norm is None:
            self._rows[1].div_(self._readers)
        self.norm, self._max_norm = ops.global_norm(self.gradients(), impl=self.model.impl), max_norm
        return self.norm

    @torch.no_grad()
    def step(self, lr: float, *, loss: Tensor | None = None) -> Tensor:
        """One update at rate `lr`, clipped as `clip` said. Returns 1.0 if it was skipped (norm or loss not finite), else 0.0, as a
        scalar on the device; `skipped` counts them."""
        if self.norm is None:
            self.clip(0.0)
        regions = [(*self._rows, self.model.bank.decay_size, self._parts)]
        for name, parameter in self._learning:
            if parameter.grad is None:  # a head that this batch had no labels for
                continue
            moments, size = self.always_on[name], parameter.numel()
            decay = size if parameter.dim() >= 2 else 0
            regions.append(
                (parameter, parameter.grad, moments.exp_avg, moments.exp_avg_sq, moments.step, decay, [size])
            )
        *tensors, parts = zip(*regions, strict=True)
        options = {
            "lr": lr, "beta1": self.config.beta1, "beta2": self.config.beta2, "eps": self.config.eps,
            "weight_decay": self.config.weight_decay, "norm": self.norm,
            # 0 if it is finite, else NaN
            "found_inf": None if loss is None else loss.detach() - loss.detach(),
            "skipped": self.skipped, "impl": self.model.impl,
        }  # fmt: skip
        if self.config.optimizer == "adamw":
            ops.adamw_(*tensors, max_norm=self._max_norm, **options)
        elif self.config.optimizer == "lamb":
            ops.lamb_(*tensors, parts, max_norm=self._max_norm, **options)
        else:
            ops.lans_(*tensors, parts, **options)
        self.norm = None
        return self.skipped[1].clamp(max=1.0)

    # --- state, by parameter name ---

    def state_dict(self) -> dict[str, Tensor]:
        """{"<parameter>.exp_avg", "<parameter>.exp_avg_sq", "<always-on parameter or bank.layers.N>.step", "skipped"}: views, no copies.

        Rows that no layer reads have no state.
        """
        return self._named_state(self.always_on)

    def _named_state(self, always_on: dict[str, Moments]) -> dict[str, Tensor]:
        state = {"skipped": self.skipped}
        for i in range(self.model.bank_rows):
            state |= self._layer_state(i)
        for name, moments in always_on.items():
            state |= {
                f"{name}.exp_avg": moments.exp_avg,
                f"{name}.exp_avg_sq": moments.exp_avg_sq,
                f"{name}.step": moments.step,
            }
        return state

    def _layer_state(self, i: int) -> dict[str, Tensor]:
        state = {f"bank.layers.{i}.step": self.steps[i]}
        for slot in self.model.bank.layout:
            state[f"bank.layers.{i}.{slot.name}.exp_avg"] = slot.view(self.exp_avg[i])
            state[f"bank.layers.{i}.{slot.name}.exp_avg_sq"] = slot.view(self.exp_avg_sq[i])
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict` for a model of the same depth, after `set_window`; ValueError, and nothing loaded, if names or
        shapes differ."""
        # A parameter that is frozen now has moments if it learned in an earlier stage: as the state says.
        always_on = dict(self.always_on)
        for name, parameter in self.model.always_on_parameters().items():
            if not parameter.requires_grad and f"{name}.exp_avg" not in state:
                always_on.pop(name, None)
            elif name not in always_on and f"{name}.exp_avg" in state:
                always_on[name] = _no_moments(parameter)
        own = self._named_state(always_on)
        for what, names in (("lacks", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys())):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(f"Optimizer.load_state_dict: the state {what} {', '.join(sorted(names)[:3])}{more}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"Optimizer.load_state_dict: {name} must be {list(tensor.shape)}, got {list(state[name].shape)}"
                )
        for bank in (self.exp_avg, self.exp_avg_sq, self.steps):
            bank[self.model.bank_rows :].zero_()
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.always_on = always_on


def _no_moments(parameter: Tensor) -> Moments:
    return Moments(torch.zeros_like(parameter), torch.zeros_like(parameter), torch.zeros((), device=parameter.device))


def _parts(bank: LayerBank, qkv_widths: Sequence[int]) -> list[int]:
    """Elements of a row that LAMB and LANS take as one parameter each: BERT's query, key and value are three, as in the papers.

    Padding behind a slot, which has neither weights nor gradients, belongs to the part before it.
    """
    starts = []
    for slot in bank.layout:
        rows = [0, qkv_widths[0], sum(qkv_widths[:2])] if slot.name.startswith("qkv_") else [0]
        starts += [slot.offset + row * (slot.size // slot.shape[0]) for row in rows]
    return [end - start for start, end in pairwise([*starts, bank.weights.shape[1]])]
