"""Changes of a model's shape as data: for each axis of its parameters, the old indices that each new index is made of.

Wider, narrower, deeper and shallower are one function of such maps (`mapped`), for weights and for the optimizer's moments alike.
An index that reads another as output takes its value (the mean, where it reads several). One that reads it as input gets its share:
what is read by C new indices is divided by C, and what reads several adds them up. So a linear map between two axes, of which the one is
copied and the other divided, computes what it did.

Gradients change the other way round: copied where the weights are divided, divided where they are copied (the chain rule). Adam's
first moments, means of gradients, are mapped as gradients; of second moments, the roots are, which is the same for copied and divided
entries and never negative for sums. Where the function is kept, these are the moments that the new model would have had.

C hidden, H heads, D head dim, I inner, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stackbert_kernels.config import ConfigError, ModelConfig
from stackbert_kernels.model.bert import Bert

OUT, IN = "out", "in"
TIED = ("norm", "embeddings")
"""What keeps the logits where the decoder is the word embedding, whose columns are then both an output and an input: the norm before the
decoder gives each copy its share, or all embeddings do, which the norm after their sum undoes (but for its eps)."""

LAYER = {  # slot of a bank row -> (axis, role) of each dimension
    "qkv_weight": (("qkv", OUT), ("residual", IN)),
    "qkv_bias": (("qkv", OUT),),
    "out_weight": (("residual", OUT), ("heads", IN)),
    "out_bias": (("residual", OUT),),
    "inner_weight": (("inner", OUT), ("residual", IN)),
    "inner_bias": (("inner", OUT),),
    "outer_weight": (("residual", OUT), ("inner", IN)),
    "outer_bias": (("residual", OUT),),
    "norm1_weight": (("residual", OUT),),
    "norm1_bias": (("residual", OUT),),
    "norm2_weight": (("residual", OUT),),
    "norm2_bias": (("residual", OUT),),
}
ALWAYS_ON = {
    "word": (None, ("residual", OUT)),
    "position": (None, ("residual", OUT)),
    "token_type": (None, ("residual", OUT)),
    "embedding_norm.weight": (("residual", OUT),),
    "embedding_norm.bias": (("residual", OUT),),
    "final_norm.weight": (("residual", OUT),),
    "final_norm.bias": (("residual", OUT),),
    "mlm.transform.weight": (("residual", OUT), ("residual", IN)),
    "mlm.transform.bias": (("residual", OUT),),
    "mlm.norm.weight": (("residual", OUT),),
    "mlm.norm.bias": (("residual", OUT),),
    "mlm.bias": (None,),
    "pair.pooler.weight": (("residual", OUT), ("residual", IN)),
    "pair.pooler.bias": (("residual", OUT),),
    "pair.classifier.weight": (None, ("residual", IN)),
    "pair.classifier.bias": (None,),
}
SHARED = {"norm": ("mlm.norm.weight", "mlm.norm.bias"), "embeddings": ("word", "position", "token_type")}
"""By each way of TIED, the parameters whose columns are inputs, not outputs."""


@dataclass(frozen=True)
class AxisMap:
    """`sources[i]`: the old indices, of `old` many, that new index i is made of; equally many for each."""

    sources: tuple[tuple[int, ...], ...]
    old: int

    def __post_init__(self):
        if len({len(read) for read in self.sources}) != 1 or not self.sources[0]:
            raise ConfigError("axis map: each new index must be made of equally many old ones, and of at least one")
        wrong = next((i for read in self.sources for i in read if not 0 <= i < self.old), None)
        if wrong is not None:
            raise ConfigError(f"axis map: old indices must be in [0, {self.old}), got {wrong}")
        missing = next((i for i, count in enumerate(self.counts) if count == 0), None)
        if missing is not None:
            raise ConfigError(f"axis map: every old index must be read, or what it knows is lost; {missing} is not")

    @classmethod
    def of(cls, rows: Sequence[int], old: int) -> AxisMap:
        """Each new index is a copy of one old one."""
        return cls(tuple((row,) for row in rows), old)

    @property
    def new(self) -> int:
        return len(self.sources)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many new indices read each old one."""
        counts = [0] * self.old
        for i in itertools.chain.from_iterable(self.sources):
            counts[i] += 1
        return tuple(counts)

    @cached_property
    def even(self) -> bool:
        """Whether every old index is read equally often: then means and variances over the axis stay what they were."""
        return len(set(self.counts)) == 1

    @cached_property
    def identity(self) -> bool:
        return self.sources == tuple((i,) for i in range(self.old))

    @cached_property
    def fresh(self) -> tuple[int, ...]:
        """The new indices that are not the first to read their source."""
        seen, later = set(), []
        for i, read in enumerate(self.sources):
            later += [i] if read in seen else []
            seen.add(read)
        return tuple(later)

    def blocks(self, size: int) -> AxisMap:
        """The same map of blocks of `size` indices each."""
        sources = tuple(tuple(i * size + offset for i in read) for read in self.sources for offset in range(size))
        return AxisMap(sources, self.old * size)

    def times(self, n: int) -> AxisMap:
        """The same map of each of `n` parts, one behind the other."""
        sources = tuple(tuple(part * self.old + i for i in read) for part in range(n) for read in self.sources)
        return AxisMap(sources, self.old * n)

    def inverse(self) -> AxisMap:
        """Back: every old index reads the new ones that read it."""
        if not self.even:
            raise ConfigError(f"axis map: only an even one has an inverse, got counts {sorted(set(self.counts))}")
        readers: list[list[int]] = [[] for _ in range(self.old)]
        for i, read in enumerate(self.sources):
            for j in read:
                readers[j].append(i)
        return AxisMap(tuple(map(tuple, readers)), self.new)

    def apply(self, x: Tensor, dim: int, role: str) -> Tensor:
        """x with the new axis in place of dimension `dim`; always a new tensor."""
        if x.shape[dim] != self.old:
            raise ValueError(f"AxisMap.apply: dimension {dim} must have {self.old} entries, got {list(x.shape)}")
        read = torch.tensor(self.sources, device=x.device)  # [new, several]
        if role == IN and max(self.counts) > 1:
            shape = [1] * x.dim()
            shape[dim] = self.old
            x = x / torch.tensor(self.counts, dtype=x.dtype, device=x.device).view(shape)
        total = x.index_select(dim, read[:, 0])
        for column in range(1, read.shape[1]):  # one after the other: the same sum on every device
            total += x.index_select(dim, read[:, column])
        return total / read.shape[1] if role == OUT and read.shape[1] > 1 else total


@dataclass(frozen=True)
class ShapeMap:
    """What becomes of each axis of a model: one map of the residual stream for the whole network, of heads, of the feed-forward layer's
    inner neurons, and of layers. The head dim does not change."""

    residual: AxisMap
    heads: AxisMap
    inner: AxisMap
    layers: AxisMap
    head_dim: int
    tied: str = "norm"

    def __post_init__(self):
        if self.tied not in TIED:
            raise ConfigError(f"shape map: tied must be one of {', '.join(TIED)}, got {self.tied!r}")
        if self.tied == "embeddings" and not self.residual.even:
            raise ConfigError("shape map: tied 'embeddings' needs a residual map that reads each index equally often")

    @cached_property
    def axes(self) -> dict[str, AxisMap]:
        heads = self.heads.blocks(self.head_dim)
        return {"residual": self.residual, "heads": heads, "qkv": heads.times(3), "inner": self.inner}

    def inverse(self) -> ShapeMap:
        maps = (axis.inverse() for axis in (self.residual, self.heads, self.inner, self.layers))
        return ShapeMap(*maps, head_dim=self.head_dim, tied=self.tied)

    def width_alone(self) -> ShapeMap:
        """The same, with as many layers as there were."""
        layers = AxisMap.of(range(self.layers.old), self.layers.old)
        return ShapeMap(self.residual, self.heads, self.inner, layers, self.head_dim, self.tied)

    def target(self, model: ModelConfig) -> dict[str, int]:
        """The fields of `model` that change; ConfigError if the maps are not of its shape."""
        for name, axis in (("hidden", self.residual), ("heads", self.heads), ("inner", self.inner)):
            if axis.old != getattr(model, name):
                raise ConfigError(f"shape map: {name} must be {axis.old}, got {getattr(model, name)}")
        if model.head_dim != self.head_dim or self.residual.new != self.heads.new * self.head_dim:
            raise ConfigError(
                f"shape map: the head dim must stay {self.head_dim}, got hidden {model.hidden} -> {self.residual.new}, "
                f"heads {model.heads} -> {self.heads.new}"
            )
        return {
            "hidden": self.residual.new,
            "heads": self.heads.new,
            "inner": self.inner.new,
            "layers": self.layers.new,
        }


def dimensions(name: str, tied: str) -> tuple[tuple[str, str] | None, ...]:
    """(axis, role) of each dimension of a parameter of Bert; None for one that does not change."""
    found = LAYER.get(name.rpartition(".")[2]) if name.startswith("bank.layers.") else ALWAYS_ON.get(name)
    if found is None:
        raise ConfigError(f"shape map: no rule says what becomes of {name}")
    if name in SHARED[tied]:
        return tuple(None if dim is None else (dim[0], IN) for dim in found)
    return found


@torch.no_grad()
def mapped(tensors: Mapping[str, Tensor], maps: ShapeMap, *, gradients: bool = False) -> dict[str, Tensor]:
    """The parameters of the new model, by name, of those of the old one (Bert.named_parameters; or some of them, layers all or none).

    gradients: the tensors are gradients, or means of them, of parameters with these names. Nothing is aliased.
    """
    result = {}
    for name, tensor in tensors.items():
        new = tensor
        for dim, change in enumerate(dimensions(name, maps.tied)):
            if change is not None and not maps.axes[change[0]].identity:
                role = change[1] if not gradients else IN if change[1] == OUT else OUT
                new = maps.axes[change[0]].apply(new, dim, role)
        result[name] = new.clone() if new is tensor else new
    return in_layers(result, maps.layers)


def in_layers(tensors: dict[str, Tensor], layers: AxisMap) -> dict[str, Tensor]:
    """Layer i of the result is the mean of the layers that `layers` says; what is in no layer stays."""
    if layers.identity:
        return tensors
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("bank.layers.")}
    slots = list(dict.fromkeys(name.split(".", 3)[3] for name in tensors if name.startswith("bank.layers.")))
    for i, read in enumerate(layers.sources):
        for slot in slots:
            total = tensors[f"bank.layers.{read[0]}.{slot}"].clone()
            for j in read[1:]:
                total += tensors[f"bank.layers.{j}.{slot}"]
            result[f"bank.layers.{i}.{slot}"] = total / len(read) if len(read) > 1 else total
    return result


@torch.no_grad()
def mapped_state(
    state: Mapping[str, Tensor], maps: ShapeMap, change: Callable[..., dict[str, Tensor]] = mapped
) -> dict[str, Tensor]:
    """The new model's optimizer state of the old one's (train/optim.py's state_dict); `change` is `mapped`, or a function like it.

    A layer has taken as many steps as the first one that it is made of.
    """
    moments = {suffix: {} for suffix in (".exp_avg", ".exp_avg_sq")}
    result = {}
    for name, tensor in state.items():
        suffix = next((suffix for suffix in moments if name.endswith(suffix)), None)
        if suffix is not None:
            moments[suffix][name.removesuffix(suffix)] = tensor
        elif not name.startswith("bank.layers."):
            result[name] = tensor.clone()
    for i, read in enumerate(maps.layers.sources):
        result[f"bank.layers.{i}.step"] = state[f"bank.layers.{read[0]}.step"].clone()
    first = change(moments[".exp_avg"], maps, gradients=True)
    roots = change({name: tensor.sqrt() for name, tensor in moments[".exp_avg_sq"].items()}, maps, gradients=True)
    result |= {f"{name}.exp_avg": tensor for name, tensor in first.items()}
    return result | {f"{name}.exp_avg_sq": root.square() for name, root in roots.items()}


def reshaped(model: Bert, maps: ShapeMap, change: Callable[..., dict[str, Tensor]] = mapped) -> Bert:
    """A new model of the shape that `maps` makes of the layers in use; all of it learns, until Bert.use says otherwise."""
    used = replace(model.config, layers=model.depth)
    if maps.layers.old != model.depth:
        raise ConfigError(f"shape map: it is of {maps.layers.old} layers, the model has {model.depth}")
    if model.mlm.decoder is not None:
        raise ConfigError("shape map: an untied decoder has no rule; leave the stage that unties it first")
    if model.projection is not None:
        raise ConfigError("shape map: a projection to a teacher has no rule; leave the stage that has a teacher first")
    new = Bert(replace(used, **maps.target(used)), device=model.word.device, impl=model.impl)
    layers = tuple(f"bank.layers.{i}." for i in range(model.depth))
    tensors = {n: p for n, p in model.named_parameters() if not n.startswith("bank.") or n.startswith(layers)}
    new.to(model.word.dtype)
    load(new, change(tensors, maps))
    new.transformers_fields = dict(model.transformers_fields)
    return new.train(model.training)


@torch.no_grad()
def load(model: Bert, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors`, all of the model's parameters by name, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
