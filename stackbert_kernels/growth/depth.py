"""Growth operators as data: for each row of the grown encoder, the old row that it copies, or a mark that it starts fresh.

An operator is a function (old depth, new depth) -> list of length new depth. Because a source is never above its row, rows can be
written in place from last to first (ops.duplicate_layers_).
"""

from __future__ import annotations

from collections.abc import Sequence

from stackbert_kernels.config import ConfigError, check_growth

RANDOM = -1
"""The row is initialised as at the start of a run."""
IDENTITY = -2
"""As RANDOM, but attention and feed-forward end in zero matrices: a pre-norm layer then returns its input."""


def copy_top(old: int, new: int) -> list[int]:
    """[0, 1, 2], 5 -> [0, 1, 2, 1, 2]: the layers next to the output once more (Yang et al. 2020)."""
    return [*range(old), *range(2 * old - new, old)]


def stack(old: int, new: int) -> list[int]:
    """[0, 1, 2], 6 -> [0, 1, 2, 0, 1, 2] (Gong et al. 2019)."""
    return list(range(old)) * (new // old)


def interleave(old: int, new: int) -> list[int]:
    """[0, 1, 2], 6 -> [0, 0, 1, 1, 2, 2]."""
    times = new // old
    return [i // times for i in range(new)]


def random(old: int, new: int) -> list[int]:
    """[0, 1, 2], 5 -> [0, 1, 2, RANDOM, RANDOM]."""
    return [*range(old), *[RANDOM] * (new - old)]


def identity(old: int, new: int) -> list[int]:
    """[0, 1, 2], 5 -> [0, 1, 2, IDENTITY, IDENTITY]."""
    return [*range(old), *[IDENTITY] * (new - old)]


OPERATORS = {"copy_top": copy_top, "stack": stack, "interleave": interleave, "random": random, "identity": identity}


def layer_map(operator: str, old: int, new: int) -> list[int]:
    """The map of `operator` from `old` to `new` layers, checked."""
    check_growth(operator, old, new)
    rows = OPERATORS[operator](old, new)
    check_map(rows, old, new)
    return rows


def check_map(rows: Sequence[int], old: int, new: int) -> None:
    """Whether `rows` can be applied in place to `old` trained layers; ConfigError if not."""
    if len(rows) != new:
        raise ConfigError(f"layer map: must have {new} entries, one a layer, got {len(rows)}")
    for i, source in enumerate(rows):
        if source not in (RANDOM, IDENTITY) and not 0 <= source <= min(i, old - 1):
            raise ConfigError(f"layer map: row {i} must copy one of rows 0-{min(i, old - 1)} or be fresh, got {source}")
