"""Dropout masks in plain PyTorch: a pure function of (seed, step, site, coordinates), bit for bit what the kernels draw.

csrc/common/philox.h states the same; the layout of counters and bytes is explained there. Philox4x32-7: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC'11. Words are kept in int64 tensors, in [0, 2^32).
"""

from __future__ import annotations

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
MASK = 0xFFFFFFFF


def new_rng(seed: int, step: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """The int64 [2] tensor (seed, step) that dropout masks depend on. Keep it on the device; advance it with `rng[1] += 1`."""
    for name, value in (("seed", seed), ("step", step)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"new_rng: {name} must be an int, got {type(value).__name__}")
        if not 0 <= value < 2**63:
            raise ValueError(f"new_rng: {name} must be in [0, 2^63), got {value}")
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def dropout_arguments(op: str, p: float, rng: Tensor | None, site: int, device: torch.device) -> tuple[int, Tensor]:
    """Checks an op's dropout arguments; returns the threshold round(256 p), 0 for no dropout, and the rng, drawn from torch's
    generator where none was given."""
    if not 0.0 <= p < 511 / 512:
        raise ValueError(f"{op}: dropout_p must be in [0, 0.998), got {p}")
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site must be in [0, 2^32), got {site}")
    if rng is None:
        threshold = round(256 * p)
        if threshold == 0:
            return 0, torch.empty(2, dtype=torch.int64, device=device)
        return threshold, torch.randint(0, 2**62, (2,), dtype=torch.int64).to(device)
    if rng.dtype != torch.int64 or rng.shape != (2,) or rng.device != device or not rng.is_contiguous():
        raise ValueError(
            f"{op}: rng must be a dense int64 [2] tensor on {device}, got {rng.dtype} {list(rng.shape)} on {rng.device}"
        )
    return round(256 * p), rng


def scale(threshold: int) -> float:
    """1 / the realised keep rate."""
    return 256.0 / (256 - threshold)


def philox(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Four random words for each counter (broadcast together)."""
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1  # 64-bit products; their wrap into the sign bit is undone by the masks
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return [c0, c1, c2, c3]


def subkey(rng: Tensor, site: int) -> tuple[Tensor, Tensor]:
    seed, step = rng.unbind()
    zero = torch.zeros_like(seed)
    words = philox(seed & MASK, (seed >> 32) & MASK, step & MASK, (step >> 32) & MASK, zero + site, zero)
    return words[0], words[1]


def _bytes_of(words: list[Tensor], number: Tensor) -> Tensor:
    """Byte `number` (0..15, little-endian across the four words) of each call."""
    word = torch.where(
        number < 8, torch.where(number < 4, words[0], words[1]), torch.where(number < 12, words[2], words[3])
    )
    return (word >> (8 * (number % 4))) & 0xFF


def row_bytes(rng: Tensor, site: int, rows: int, columns: int) -> Tensor:
    """int64 [rows, columns], in 0..255."""
    k0, k1 = subkey(rng, site)
    token = torch.arange(rows, device=rng.device)[:, None, None]
    block = torch.arange((columns + 15) // 16, device=rng.device)[None, :, None]
    words = philox(k0, k1, block, token & MASK, token >> 32, torch.zeros_like(token))
    number = torch.arange(16, device=rng.device)
    return _bytes_of(words, number).flatten(1)[:, :columns]


def attention_bytes(rng: Tensor, site: int, sequence: int, heads: int, queries: int, keys: int) -> Tensor:
    """int64 [heads, queries, keys] of one sequence, in 0..255."""
    k0, k1 = subkey(rng, site)
    head = torch.arange(heads, device=rng.device)[:, None, None]
    query = torch.arange(queries, device=rng.device)[None, :, None]
    key = torch.arange(keys, device=rng.device)[None, None, :]
    words = philox(k0, k1, key // 64 * 4 + key % 8 // 2, query, head, torch.full_like(head, sequence))
    return _bytes_of(words, key % 64 // 8 * 2 + key % 2)


def row_factors(rng: Tensor, site: int, threshold: int, like: Tensor) -> Tensor:
    """What dropout multiplies the [rows, columns] tensor `like` with: 0 or 1 / keep rate, in its dtype or float32 if that is wider."""
    kept = row_bytes(rng, site, like.shape[0], like.shape[1]) >= threshold
    return kept.to(torch.promote_types(like.dtype, torch.float32)) * scale(threshold)
