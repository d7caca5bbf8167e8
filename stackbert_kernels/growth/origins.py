"""Where each tensor of a grown checkpoint comes from: found by names alone, before anything is read or written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from stackbert_kernels.config import ConfigError
from stackbert_kernels.growth.depth import IDENTITY, RANDOM

LISTS = ("layer", "layers")  # what a list of layers is called, where several lists have as many entries
LAST_OF_BRANCH = (
    "attention.output.dense",
    "crossattention.output.dense",
    "output.dense",
    "attention.out_lin",
    "ffn.lin2",
)  # what a layer adds to the residual stream is zero when these are

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """One tensor of the grown checkpoint."""

    name: str
    source: str | None
    """The tensor of the shallower checkpoint that it is a copy of; for a fresh one, None."""
    how: str
    """kept, copied (from another layer), numbered (an integer that counts layers), drawn, ones or zeros; of an optimizer: kept,
    copied, or none (its state starts empty)."""


@dataclass(frozen=True)
class GrowthReport:
    """What grow_checkpoint did. `str` is a table for people, `to_dict` the same as plain JSON values."""

    source: str
    out: str
    operator: str
    from_layers: int
    layers: int
    map: list[int]
    """The old layer that each layer copies; -1 and -2 are fresh (growth/depth.py)."""
    prefix: str
    """Where the layers are: prefix.0, prefix.1, ..."""
    tensors: list[Origin]
    config: dict[str, object]
    """The settings of config.json that changed, with their new values."""
    optimizer_state: str | None
    """How the optimizer's state was mapped: copy, zero or reset; None where the checkpoint has none."""
    optimizer: list[Origin] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    """Files taken over as they are."""
    left_out: list[str] = field(default_factory=list)
    """Files and folders of the source that the grown checkpoint does not have."""

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        rows = [("tensor", "from", "how")]
        rows += [(t.name, t.source if t.how == "copied" else "", t.how) for t in self.tensors]
        if self.optimizer:
            rows += [("", "", ""), ("optimizer state of", "from", "how")]
            rows += [(t.name, t.source if t.how == "copied" else "", t.how) for t in self.optimizer]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        layers = " ".join({RANDOM: "random", IDENTITY: "identity"}.get(row, str(row)) for row in self.map)
        counts = defaultdict(int)
        for tensor in self.tensors:
            counts[tensor.how] += 1
        lines = [
            "",
            f"{self.out}: {self.layers} layers, grown by {self.operator} from the {self.from_layers} of {self.source}",
        ]
        lines += [f"layers     {layers}"]
        lines += [f"tensors    {', '.join(f'{n} {how}' for how, n in counts.items())}"]
        lines += [f"config     {', '.join(f'{name} = {value}' for name, value in self.config.items())}"]
        lines += [f"optimizer  {self.optimizer_state or 'the checkpoint has no optimizer.pt'}"]
        lines += [f"copied     {', '.join(self.copied) or 'no other files'}"]
        lines += [f"left out   {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join(table + lines)


@dataclass(frozen=True)
class Layers:
    """The tensors `prefix`.i.`rest` of a checkpoint with `depth` layers, and what becomes of them."""

    prefix: str
    rests: tuple[str, ...]
    depth: int
    rows: Sequence[int]

    def of(self, name: str) -> tuple[int, str] | None:
        """(layer, rest) of a tensor's name; None for one that is in no layer."""
        start = f"{self.prefix}."
        layer, _, rest = name.removeprefix(start).partition(".")
        return (int(layer), rest) if name.startswith(start) and layer.isdigit() and rest else None

    def name(self, layer: int, rest: str) -> str:
        return f"{self.prefix}.{layer}.{rest}"

    def source(self, name: str) -> str | None:
        """The tensor that the grown checkpoint's `name` is a copy of; None for one that starts fresh."""
        place = self.of(name)
        if place is None:
            return name
        row = self.rows[place[0]]
        return None if row < 0 else self.name(row, place[1])

    def like(self, name: str) -> str:
        """A tensor of the old checkpoint with the same part in its layer, for fresh ones too."""
        place = self.of(name)
        return name if place is None else self.name(max(self.rows[place[0]], 0), place[1])


def find_layers(shapes: Shapes, depth: int, rows: Sequence[int], *, where: str) -> Layers:
    """The one list of `depth` layers among these names, whatever the model's class; ConfigError if there is none, or more than one."""
    found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in shapes.items():
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            if parts[i].isdigit():
                found[".".join(parts[:i])][int(parts[i])][".".join(parts[i + 1 :])] = shape
    lists = [prefix for prefix, layers in found.items() if sorted(layers) == list(range(depth))]
    named = [prefix for prefix in lists if prefix.split(".")[-1] in LISTS]
    lists = named or lists
    if len(lists) != 1:
        seen = ", ".join(f"{prefix} ({len(layers)})" for prefix, layers in sorted(found.items())) or "none"
        raise ConfigError(
            f"grow: {where} must have one list of layers with the config's {depth} entries, "
            f"got {', '.join(lists) or 'no such list'}; numbered names: {seen}"
        )
    layers = found[lists[0]]
    for i in range(1, depth):
        if layers[i] != layers[0]:
            differs = sorted(set(layers[i].items()) ^ set(layers[0].items()))[0][0]
            raise ConfigError(
                f"grow: the layers of {where} must have the same tensors, but {lists[0]}.0 and {lists[0]}.{i} differ in {differs}"
            )
    return Layers(lists[0], tuple(layers[0]), depth, rows)


def origins(shapes: Shapes, layers: Layers, numbered: set[str], floating: set[str]) -> list[Origin]:
    """What each tensor of the grown checkpoint is made of: those outside the layers first, then layer by layer.

    `numbered`: the parts of a layer (rests) that hold its number. `floating`: those that can be drawn; other fresh ones are copies
    of layer 0.
    """
    result = [Origin(name, name, "kept") for name in sorted(shapes) if layers.of(name) is None]
    zeroed = [rest for rest in layers.rests if rest.rpartition(".")[0] in LAST_OF_BRANCH]
    if IDENTITY in layers.rows and len({rest.rpartition(".")[0] for rest in zeroed}) < 2:
        raise ConfigError(
            f"grow: identity knows a layer's last matrices as {', '.join(LAST_OF_BRANCH)}, got {', '.join(layers.rests)}"
        )
    for i, row in enumerate(layers.rows):
        for rest in layers.rests:
            name, source = layers.name(i, rest), layers.name(max(row, 0), rest)
            if rest in numbered:
                result.append(Origin(name, source, "kept" if i == row else "numbered"))
            elif i == row:
                result.append(Origin(name, source, "kept"))
            elif row >= 0 or rest not in floating:
                result.append(Origin(name, source, "copied"))
            elif row == IDENTITY and rest in zeroed:
                result.append(Origin(name, None, "zeros"))
            else:
                result.append(Origin(name, None, _fresh(rest, shapes[source])))
    return result


def _fresh(rest: str, shape: tuple[int, ...]) -> str:
    """How a new tensor starts: matrices are drawn, scales of norms are one, biases zero."""
    kind = rest.rpartition(".")[2]
    if len(shape) >= 2:
        return "drawn"
    if kind in ("weight", "gamma"):
        return "ones"
    if kind in ("bias", "beta"):
        return "zeros"
    raise ConfigError(f"grow: no rule says how a new {rest} of shape {list(shape)} starts; use an operator that copies")
