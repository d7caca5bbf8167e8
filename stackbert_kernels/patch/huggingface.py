"""Which classes of transformers (5.0 or newer) get which methods. transformers is not imported for it: a model of its has done that.

A module is known by the name and home of its class, or of the one that it inherits `forward` from: BertSelfOutput is the SelfOutput of
the family bert. What each role needs in order to be replaced stands in its function here; what it then runs, in blocks, encoder and masked_lm.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels.patch import blocks, encoder
from stackbert_kernels.patch.plain import plain, plain_norm
from stackbert_kernels.patch.runs import runs
from stackbert_kernels.patch.swap import Parts, Replacement, Skipped, Swapped

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}
HOME = "transformers.models.{0}.modeling_{0}"
LOOKED_FOR = (
    f"transformers' {', '.join(FAMILIES.values())} (...Model, ...For..., ...SelfAttention, ...SelfOutput, ...Output, ...Intermediate, "
    "...Embeddings)"
)
COUNT_TOKENS = ("roberta", "xlm_roberta", "camembert")  # their positions are those of tokens, not of columns
READ_TOKENS = ("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "LMHeadModel", "ForCausalLM")
"""Heads that read every column, and none of them for the whole sequence as others read the first."""


class Block(NamedTuple):
    """A module of a known class."""

    name: str
    module: nn.Module
    family: str
    role: str

    def skipped(self, part: str, reason: str) -> list[Replacement | Skipped]:
        return [Skipped(self.name, part, reason)]


Entries = list[Replacement | Skipped]


def plan(model: nn.Module, parts: Parts) -> Entries:
    known = list(_known(model))
    if not known:
        return []
    _check_version()
    entries: Entries = []
    for block in known:
        asked = [part for part in PARTS_OF.get(block.role, ()) if getattr(parts, part)]
        if not asked or isinstance(block.module, Swapped):
            continue
        if "forward" in block.module.__dict__:  # its class has no say
            entries += block.skipped(asked[0], "its own forward was replaced (accelerate's hooks do that)")
        else:
            entries += PLANS[block.role](block, parts)
    encoders = [entry for block in known for entry in _encoder(block, known, parts, entries)]
    told = {id(a) for e in encoders if isinstance(e, Replacement) for a in encoder.attentions(e.module)}
    return [_if_told(entry, told) for entry in entries] + encoders


def _if_told(entry: Replacement | Skipped, told: set[int]) -> Replacement | Skipped:
    """Attention needs an encoder above that says which tokens there are."""
    if isinstance(entry, Skipped) or entry.kind is not blocks.SelfAttention or id(entry.module) in told:
        return entry
    return Skipped(
        entry.name, *entry.runs, "no ...Model as transformers has it stands above, with all its layers fused"
    )


def _check_version() -> None:
    version = sys.modules["transformers"].__version__
    if int(version.partition(".")[0]) < 5:
        raise ImportError(f"patch: wanted transformers 5.0 or newer, got {version}")


def _known(model: nn.Module) -> Iterator[Block]:
    for name, module in model.named_modules():
        cls = module.original if isinstance(module, Swapped) else type(module)
        for base in cls.__mro__:
            family = base.__module__.rpartition("modeling_")[2]
            if family not in FAMILIES or base.__module__ != HOME.format(family):
                continue
            if base.__name__.startswith(FAMILIES[family]) and cls.forward is base.forward:
                yield Block(name, module, family, base.__name__.removeprefix(FAMILIES[family]))
            break


def _replaced(
    block: Block,
    part: str,
    kind: type[Swapped],
    op: str,
    shape: tuple[int, ...],
    like: Tensor,
    note: str = "",
    options=None,
) -> Entries:
    what, why = runs(op, shape, like=like)
    if what is None:
        return block.skipped(part, why)
    return [Replacement(block.name, block.module, kind, {part: what}, note, options)]


def _weight(module: nn.Module) -> Tensor:
    """Of a linear layer, or the first of what wraps one, as LoRA does."""
    return next((p for p in module.parameters() if p.dim() == 2), next(module.parameters()))


def _called(thing: object) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


# The roles.


def _attention(block: Block, parts: Parts) -> Entries:
    part, module = "attention" if parts.attention else "unpad", block.module
    if module.is_decoder or module.is_causal:
        return block.skipped(part, "causal: a decoder (config.is_decoder)")
    if not isinstance(module.dropout, nn.Dropout):
        return block.skipped(part, f"its dropout is a {type(module.dropout).__name__}")
    note = "output_attentions=True, a mask that is not [B, S], a cache or cross attention is asked for"
    if not parts.unpad:
        note += "; the batch has padding (unpad=True packs it away)"
    shape = (1, 1, module.num_attention_heads, module.attention_head_size)
    return _replaced(block, part, blocks.SelfAttention, "attention", shape, _weight(module.query), note)


def _cross_attention(block: Block, parts: Parts) -> Entries:
    return block.skipped("attention", "cross attention")


def _add_norm(block: Block, parts: Parts) -> Entries:
    norm = block.module.LayerNorm
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return block.skipped("add_norm", f"its norm is {norm}")
    return _replaced(block, "add_norm", blocks.AddNorm, "dropout_add_layer_norm", (1, len(norm.weight)), norm.weight)


def _intermediate(block: Block, parts: Parts) -> Entries:
    activation, like = block.module.intermediate_act_fn, _weight(block.module.dense)
    if blocks.approximation(activation) is None:
        return block.skipped("gelu", f"its activation is {_called(activation)}")
    return _replaced(block, "gelu", blocks.Intermediate, "bias_gelu", (1, len(like)), like)


def _embeddings(block: Block, parts: Parts) -> Entries:
    module = block.module
    tables = (module.word_embeddings, module.position_embeddings, module.token_type_embeddings)
    if not all(isinstance(table, nn.Embedding) and blocks.plain_embedding(table) for table in tables):
        return block.skipped("embeddings", "a table is wrapped, hooked, sparse, renormalised or scaled by frequency")
    if not plain_norm(module.LayerNorm):
        return block.skipped("embeddings", f"its norm is {module.LayerNorm}")
    like, counts = tables[0].weight, block.family in COUNT_TOKENS
    note = "inputs_embeds are given"
    return _replaced(
        block, "embeddings", blocks.Embeddings, "embedding_layer_norm", (1, like.shape[1]), like, note, counts
    )


def _transform(kind: type[Swapped], dense: str, activation: str, norm: str) -> Callable[[Block, Parts], Entries]:
    def planned(block: Block, parts: Parts) -> Entries:
        act = getattr(block.module, activation, F.gelu)  # RoBERTa calls the function
        weight, norm_weight = _weight(getattr(block.module, dense)), getattr(block.module, norm).weight
        found: dict[str, tuple[str | None, str]] = {}
        if parts.gelu:
            fits = blocks.approximation(act) is not None
            found["gelu"] = runs("bias_gelu", (1, len(weight)), like=weight) if fits else (None, f"its activation is {_called(act)}")  # fmt: skip
        if parts.add_norm:
            found["add_norm"] = runs("layer_norm", (1, len(norm_weight)), like=norm_weight)
        made = {part: what for part, (what, _) in found.items() if what}
        entries: Entries = [Skipped(block.name, part, why) for part, (what, why) in found.items() if not what]
        if made:
            entries.append(Replacement(block.name, block.module, kind, made, options=(dense, activation, norm)))
        return entries

    return planned


def _masked_lm(block: Block, parts: Parts) -> Entries:
    from stackbert_kernels.patch import masked_lm

    if (block.family, block.role) == ("electra", "ForPreTraining"):  # that one finds replaced tokens
        return []
    head = {"bert": masked_lm.bert_head, "electra": masked_lm.electra_head}.get(block.family, masked_lm.roberta_head)
    decoder = head(block.module)[1]
    if not plain(decoder, nn.Linear) or decoder.bias is None:
        return block.skipped("mlm_loss", f"its decoder is a {_called(decoder)}")
    options = masked_lm.Options(_arguments(block.module), block.module.base_model_prefix, head)
    note = "there are no labels or it evaluates; in training logits are made when read"
    like = decoder.weight
    return _replaced(block, "mlm_loss", masked_lm.MaskedLM, "masked_lm_loss", (1, like.shape[1]), like, note, options)


PLANS: dict[str, Callable[[Block, Parts], Entries]] = {
    "SelfAttention": _attention,
    "CrossAttention": _cross_attention,
    "SelfOutput": _add_norm,
    "Output": _add_norm,
    "Intermediate": _intermediate,
    "Embeddings": _embeddings,
    "PredictionHeadTransform": _transform(blocks.Transform, "dense", "transform_act_fn", "LayerNorm"),
    "GeneratorPredictions": _transform(blocks.Transform, "dense", "activation", "LayerNorm"),
    "LMHead": _transform(blocks.Head, "dense", "activation", "layer_norm"),
    "ForMaskedLM": _masked_lm,
    "ForPreTraining": _masked_lm,
}
PARTS_OF = {
    "SelfAttention": ("attention", "unpad"),
    "CrossAttention": ("attention",),
    "SelfOutput": ("add_norm",),
    "Output": ("add_norm",),
    "Intermediate": ("gelu",),
    "Embeddings": ("embeddings",),
    "PredictionHeadTransform": ("gelu", "add_norm"),
    "GeneratorPredictions": ("gelu", "add_norm"),
    "LMHead": ("gelu", "add_norm"),
    "ForMaskedLM": ("mlm_loss",),
    "ForPreTraining": ("mlm_loss",),
}


def _encoder(block: Block, known: list[Block], parts: Parts, entries: Entries) -> Entries:
    """A ...Model whose attention was replaced in every layer: it tells them which tokens there are, and packs them."""
    if block.role != "Model" or isinstance(block.module, Swapped) or not (parts.attention or parts.unpad):
        return []
    fused = {id(e.module) for e in entries if isinstance(e, Replacement) and e.kind is blocks.SelfAttention}
    layers = block.module.encoder.layer
    if (
        "forward" in block.module.__dict__
        or not layers
        or not all(id(layer.attention.self) in fused for layer in layers)
    ):
        return block.skipped("unpad", "it needs the fused attention in every layer") if parts.unpad else []
    heads = [b.role for b in known if (b is not block and not b.name) or block.name.startswith(f"{b.name}.")]
    unpad, made = parts.unpad, []
    if unpad and "ForQuestionAnswering" in heads:
        unpad = False
        made = block.skipped("unpad", "start and end are a softmax over all positions, padding included")
    reads_first = getattr(block.module, "pooler", None) is not None or not set(heads) <= set(READ_TOKENS)
    options = encoder.Options(_arguments(block.module), unpad, block.family in COUNT_TOKENS, reads_first)
    notes = ["as for attention", *(["inputs_embeds are given"] if unpad else [])]
    notes += ["a head reads the first column, and there is padding in it"] if unpad and reads_first else []
    what = {"unpad": "tokens packed once"} if unpad else {"attention": "one look at the mask for all layers"}
    return [*made, Replacement(block.name, block.module, encoder.Encoder, what, "; ".join(notes), options)]
