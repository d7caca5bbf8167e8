"""LayerBank: the parameters of all encoder layers in one tensor, one row a layer.

Growth is then one in-place copy of rows, the optimizer's moments have the same shape, and the gradients of a window of layers are
one dense block: autograd adds into the rows of `grads` because each parameter's .grad is a view of its row.

L layers, P elements of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements: a slot starts on a cache line, and where GPU matrix products can use their widest loads


@dataclass(frozen=True)
class Slot:
    """Where a parameter stands in a row."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def view(self, row: Tensor) -> Tensor:
        return row[self.offset : self.offset + self.size].view(self.shape)


class Layer(nn.Module):
    """The parameters of one layer by name: leaf tensors that are views of the layer's row."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        # load_state_dict(assign=True) would put foreign tensors in place of the views.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "assign_to_params_buffers": False}, *rest)


class LayerBank(nn.Module):
    """Parameters and gradients of `layers` equal layers (contract 3.5).

        matrices    {name: shape}  parameters with weight decay; they come first in the row
        vectors     {name: shape}  biases and norms; elements [decay_size, P) of a row
        weights     [L, P] float32
        grads       [L, P]         zero outside the window
        layers[i].<name>           nn.Parameter, a view of weights[i]

    Slots start at multiples of 16 elements; the elements between them belong to no parameter and stay zero.
    Layers inside the window have requires_grad and .grad = a view of grads[i]; the others have neither.
    Moving, casting, load_state_dict, copy.deepcopy and pickling keep all this.
    """

    def __init__(
        self,
        layers: int,
        matrices: Mapping[str, tuple[int, ...]],
        vectors: Mapping[str, tuple[int, ...]],
        *,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        layout, offset = [], 0
        for name, shape in (*matrices.items(), *vectors.items()):
            layout.append(Slot(name, tuple(shape), offset))
            offset += -(-layout[-1].size // ALIGNMENT) * ALIGNMENT
        self.layout = tuple(layout)
        self.decay_size = layout[len(matrices)].offset if vectors else offset
        self.window = (0, layers)
        self.weights = torch.zeros(layers, offset, device=device)
        self.grads = torch.zeros_like(self.weights)
        self._make_layers()

    def __len__(self) -> int:
        return len(self.weights)

    def set_window(self, first: int, last: int) -> None:
        """Layers [first, last) learn. Gradients start at zero."""
        if not 0 <= first <= last <= len(self):
            raise ValueError(f"LayerBank: the window must lie in [0, {len(self)}], got [{first}, {last})")
        self.window = (first, last)
        self.grads.zero_()
        self._attach()

    def freeze(self) -> None:
        """No layer learns any more, and the memory of the gradients is given back."""
        self.window, self.grads = (0, 0), self.grads.new_empty(0, self.grads.shape[1])
        self._attach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the window's rows, whatever set_to_none says: the gradients' storage is the bank's."""
        first, last = self.window
        self.grads[first:last].zero_()
        self.reattach()

    def reattach(self) -> None:
        """Undoes an optimizer's zero_grad(set_to_none=True): a missing .grad becomes the view of its zeroed row again."""
        for i in range(*self.window):
            if next(self.layers[i].parameters()).grad is None:
                self.grads[i].zero_()
                self._attach_layer(i, learns=True)

    def initialise(self, layer: int, seed: int, std: float) -> None:
        """Normal(0, std) matrices; vectors zero, but norm weights (`*norm*_weight`) one. A function of (seed, layer) alone."""
        generator = generator_for(seed, f"layer {layer}")
        row = torch.zeros(self.weights.shape[1])
        for slot in self.layout:
            if slot.offset < self.decay_size:
                slot.view(row).normal_(0, std, generator=generator)
            elif "norm" in slot.name and slot.name.endswith("_weight"):
                slot.view(row).fill_(1)
        self.weights[layer].copy_(row)

    def _make_layers(self) -> None:
        self.layers = nn.ModuleList(Layer() for _ in range(len(self)))
        for row, layer in zip(self.weights, self.layers, strict=True):
            for slot in self.layout:
                layer.register_parameter(slot.name, nn.Parameter(slot.view(row)))
        self.layers.train(self.training)
        self._attach()

    def _attach(self) -> None:
        first, last = self.window
        for i in range(len(self)):
            self._attach_layer(i, learns=first <= i < last)

    def _attach_layer(self, i: int, learns: bool) -> None:
        for slot in self.layout:
            parameter = getattr(self.layers[i], slot.name)
            parameter.requires_grad_(learns)
            parameter.grad = slot.view(self.grads[i]) if learns else None

    def _apply(self, fn, recurse=True):
        self.weights, self.grads = fn(self.weights), fn(self.grads)
        for row, layer in zip(self.weights, self.layers, strict=True):
            for slot in self.layout:
                parameter = getattr(layer, slot.name)
                parameter.grad = None  # of the old device or dtype
                parameter.data = slot.view(row)
        self._attach()
        return self

    def __getstate__(self):
        state = self.__dict__.copy()
        state["_modules"] = {
            name: module for name, module in self._modules.items() if name != "layers"
        }  # made again as views
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._make_layers()


def generator_for(seed: int, what: str) -> torch.Generator:
    """A CPU generator for one purpose of a run. Hashed because manual_seed keeps only 32 bits of what it is given."""
    digest = hashlib.blake2b(f"{seed} {what}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
