"""Row duplication in plain PyTorch."""

from torch import Tensor


def duplicate_layers_(bank: Tensor, layer_map: list[int]) -> None:
    """Last to first: when row i is written its source, at or below i, still holds what it held at the start."""
    for i in reversed(range(len(layer_map))):
        if layer_map[i] != i:
            bank[i].copy_(bank[layer_map[i]])
