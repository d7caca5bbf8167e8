"""Which classes of transformers (5.0 or newer) get which methods. transformers is not imported for it: a model of its has done that.

A module is known by the name and home of its class, or of one that it inherits `forward` from unchanged.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from stackbert_kernels.patch import blocks, encoder
from stackbert_kernels.patch.plain import plain, plain_norm
from stackbert_kernels.patch.runs import runs
from stackbert_kernels.patch.swap import Parts, Replacement, Skipped, Swapped

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "camembert": "Camembert", "electra": "Electra"}  # fmt: skip
COUNTS_TOKENS = ("roberta", "xlm_roberta", "camembert")  # their positions are those of tokens, not of columns
HOME = "transformers.models.{0}.modeling_{0}"
LOOKED_FOR = f"transformers' {', '.join(FAMILIES.values())} (…Model, …For…, …SelfAttention, …SelfOutput, …Output, …Intermediate, …Embeddings)"
READ_EVERY_COLUMN = ("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "LMHeadModel", "ForCausalLM")

AS_BEFORE_ATTENTION = "output_attentions=True, a mask that is not [B, S], a cache or cross attention is asked for"


def plan(model: nn.Module, parts: Parts) -> list[Replacement | Skipped]:
    found = list(_known(model))
    if not found:
        return []
    _check_version()
    entries: list[Replacement | Skipped] = []
    for name, module, family, role in found:
        if isinstance(module, Swapped):
            continue
        if role in PLANS:
            entries += PLANS[role](name, module, family, parts)
    entries = [e for e in entries if not isinstance(e, Replacement) or e.runs]
    return entries + _encoders(model, found, parts, entries)


def _check_version() -> None:
    version = sys.modules["transformers"].__version__
    if int(version.partition(".")[0]) < 5:
        raise ImportError(f"patch: wanted transformers 5.0 or newer, got {version}")


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, str]]:
    """(name, module, family, role): BertSelfOutput has the role SelfOutput."""
    for name, module in model.named_modules():
        cls = module.original if isinstance(module, Swapped) else type(module)
        for base in cls.__mro__:
            family = base.__module__.rpartition("modeling_")[2]
            if family in FAMILIES and base.__module__ == HOME.format(family):
                if base.__name__.startswith(FAMILIES[family]) and cls.forward is base.forward:
                    yield name, module, family, base.__name__.removeprefix(FAMILIES[family])
                break


def _one(name: str, part: str, module: nn.Module, kind: type, op: str, shape, like: Tensor, note="", options=None):
    what, why = runs(op, shape, like=like)
    if what is None:
        return [Skipped(name, part, why)]
    return [Replacement(name, module, kind, {part: what}, note, options)]


# A plan for each role: (name, module, family, parts) -> entries.


def _attention(name, module, family, parts):
    if not (parts.attention or parts.unpad):
        return []
    part = "attention" if parts.attention else "unpad"
    if module.is_decoder or module.is_causal:
        return [Skipped(name, part, "causal: a decoder (config.is_decoder)")]
    if not isinstance(module.dropout, nn.Dropout):
        return [Skipped(name, part, f"its dropout is a {type(module.dropout).__name__}")]
    shape = (1, 1, module.num_attention_heads, module.attention_head_size)
    note = AS_BEFORE_ATTENTION + ("" if parts.unpad else "; the batch has padding (unpad=True packs it away)")
    return _one(name, part, module, blocks.SelfAttention, "attention", shape, _weight(module.query), note)


def _cross_attention(name, module, family, parts):
    return [Skipped(name, "attention", "cross attention")] if parts.attention else []


def _add_norm(name, module, family, parts):
    if not parts.add_norm:
        return []
    norm = module.LayerNorm
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return [Skipped(name, "add_norm", f"its norm is {norm}")]
    like = norm.weight
    return _one(name, "add_norm", module, blocks.AddNorm, "dropout_add_layer_norm", (1, len(like)), like)


def _intermediate(name, module, family, parts):
    if not parts.gelu:
        return []
    activation = module.intermediate_act_fn
    if blocks.approximation(activation) is None:
        return [Skipped(name, "gelu", f"its activation is {_called(activation)}")]
    like = _weight(module.dense)
    return _one(name, "gelu", module, blocks.Intermediate, "bias_gelu", (1, len(like)), like)


def _embeddings(name, module, family, parts):
    if not parts.embeddings:
        return []
    tables = (module.word_embeddings, module.position_embeddings, module.token_type_embeddings)
    if not all(isinstance(t, nn.Embedding) and blocks.plain_embedding(t) for t in tables):
        return [Skipped(name, "embeddings", "a table is wrapped, sparse, renormalised or scaled by frequency")]
    if not plain_norm(module.LayerNorm):
        return [Skipped(name, "embeddings", f"its norm is {module.LayerNorm}")]
    like = tables[0].weight
    return _one(
        name, "embeddings", module, blocks.Embeddings, "embedding_layer_norm", like.shape, like,
        "inputs_embeds are given", family in COUNTS_TOKENS,
    )  # fmt: skip


def _transform(kind: type, names: tuple[str, str, str]):
    def transform(name, module, family, parts):
        dense, norm = getattr(module, names[0]), getattr(module, names[2])
        made, skipped = {}, []
        wanted = {
            "gelu": (parts.gelu, "bias_gelu", _weight(dense)),
            "add_norm": (parts.add_norm, "layer_norm", norm.weight),
        }
        for part, (asked, op, like) in wanted.items():
            if not asked:
                continue
            if part == "gelu" and blocks.approximation(getattr(module, names[1], nn.functional.gelu)) is None:
                skipped.append(Skipped(name, part, f"its activation is {_called(getattr(module, names[1]))}"))
                continue
            what, why = runs(op, (1, len(like)), like=like)
            if what is None:
                skipped.append(Skipped(name, part, why))
            else:
                made[part] = what
        return [Replacement(name, module, kind, made, options=names), *skipped]

    return transform


def _masked_lm(base: str | None, head: str):
    """base None: the family's own attribute, as model.roberta"""

    def masked_lm(name, module, family, parts):
        if not parts.mlm_loss:
            return []
        from stackbert_kernels.patch import masked_lm as heads

        options = heads.Options(_arguments(module), module.base_model_prefix, getattr(heads, head))
        _, decoder = options.head(module)
        if not plain(decoder, nn.Linear) or decoder.bias is None:
            return [Skipped(name, "mlm_loss", f"its decoder is {_called(decoder)}")]
        note = "in evaluation or without labels; logits of a training call are made when read"
        like = decoder.weight
        return _one(name, "mlm_loss", module, heads.MaskedLM, "masked_lm_loss", (1, like.shape[1]), like, note, options)

    return masked_lm


PLANS = {
    "SelfAttention": _attention,
    "CrossAttention": _cross_attention,
    "SelfOutput": _add_norm,
    "Output": _add_norm,
    "Intermediate": _intermediate,
    "Embeddings": _embeddings,
    "PredictionHeadTransform": _transform(blocks.Transform, ("dense", "transform_act_fn", "LayerNorm")),
    "GeneratorPredictions": _transform(blocks.Transform, ("dense", "activation", "LayerNorm")),
    "LMHead": _transform(blocks.Head, ("dense", "activation", "layer_norm")),
}
HEADS = {"bert": "bert_head", "electra": "electra_head"}


def _weight(module: nn.Module) -> Tensor:
    """Of a linear layer, or of the one that a wrapper such as LoRA's holds."""
    return next(p for p in module.parameters() if p.dim() == 2)


def _called(thing: object) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


# The encoder and the heads, which look at what the blocks became.


def _encoders(model: nn.Module, found: list, parts: Parts, entries: list) -> list[Replacement | Skipped]:
    made: list[Replacement | Skipped] = []
    fused = {e.name for e in entries if isinstance(e, Replacement) and e.kind is blocks.SelfAttention}
    heads = [(name, role) for name, _, _, role in found if "For" in role or role == "LMHeadModel"]
    for name, module, family, role in found:
        if isinstance(module, Swapped):
            continue
        if role in ("ForMaskedLM", "ForPreTraining") and not (family == "electra" and role == "ForPreTraining"):
            made += _masked_lm(None, HEADS.get(family, "roberta_head"))(name, module, family, parts)
        if role != "Model" or not (parts.attention or parts.unpad):
            continue
        layers = [
            f"{name}{'.' if name else ''}encoder.layer.{i}.attention.self" for i in range(len(module.encoder.layer))
        ]
        if not layers or not set(layers) <= fused:
            if parts.unpad:
                made.append(Skipped(name, "unpad", "it needs the fused attention in every layer"))
            continue
        above = [role for head, role in heads if name.startswith(head)]
        unpad = parts.unpad
        if unpad and "ForQuestionAnswering" in above:
            unpad = False
            made.append(Skipped(name, "unpad", "start and end are a softmax over all positions, padding included"))
        reads_first = getattr(module, "pooler", None) is not None or not set(above) <= set(READ_EVERY_COLUMN)
        options = encoder.Options(_arguments(module), unpad, family in COUNTS_TOKENS, reads_first)
        what = {"unpad": "tokens packed once"} if unpad else {"attention": "one look at the mask for all layers"}
        note = "; ".join(["as for attention", *(["the first column has padding and a head reads it"] if unpad and reads_first else []), *(["inputs_embeds are given"] if unpad else [])])  # fmt: skip
        made.append(Replacement(name, module, encoder.Encoder, what, note, options))
    return made
