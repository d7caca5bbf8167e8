"""The masked-LM heads once patched: in training with labels, decoder and loss are computed for the labelled tokens alone.

Logits of a training call are made when somebody reads `outputs.logits`; without labels, or in evaluation, everything is the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

from stackbert_kernels import ops
from stackbert_kernels.patch.blocks import Transform
from stackbert_kernels.patch.plain import plain, taken
from stackbert_kernels.patch.swap import Swapped

IGNORE = -100


class _LateLogits:
    """An output whose logits are not among its items, and are computed when the attribute is first read."""

    _late: Callable[[], Tensor] | None = None

    def _read(self) -> Tensor | None:
        if "_logits" not in self.__dict__ and self._late is not None:
            self.__dict__["_logits"] = self._late()
        return self.__dict__.get("_logits")

    def _write(self, value: Tensor | None) -> None:
        if value is not None:
            self.__dict__["_logits"] = value


class LateMaskedLMOutput(_LateLogits, MaskedLMOutput):
    logits = property(_LateLogits._read, _LateLogits._write)


class LatePreTrainingOutput(_LateLogits, BertForPreTrainingOutput):
    prediction_logits = property(_LateLogits._read, _LateLogits._write)


class Options(NamedTuple):
    arguments: tuple[str, ...]  # of the original's forward
    base: str  # attribute of the encoder
    head: Callable[[nn.Module], tuple[Callable[[Tensor], Tensor], nn.Module]]


def bert_head(model: nn.Module):
    return model.cls.predictions.transform, model.cls.predictions.decoder


def roberta_head(model: nn.Module):
    head = model.lm_head
    if isinstance(head, Transform):
        return head.features, head.decoder
    return lambda x: head.layer_norm(F.gelu(head.dense(x))), head.decoder


def electra_head(model: nn.Module):
    return model.generator_predictions, model.generator_lm_head


class MaskedLM(Swapped):
    """BertForMaskedLM and its kin, and BertForPreTraining with both kinds of labels."""

    def forward(self, *args, **kwargs):
        options: Options = self._stackbert.options
        kwargs.update(zip(options.arguments, args, strict=False))
        labels, pair_labels = kwargs.get("labels"), kwargs.get("next_sentence_label")
        pairs = "next_sentence_label" in options.arguments
        features, decoder = options.head(self)
        fits = plain(decoder, nn.Linear) and decoder.bias is not None
        if labels is None or not self.training or (pairs and pair_labels is None) or not fits:
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "next_sentence_label")}
        outputs = getattr(self, options.base)(**kwargs, return_dict=True)
        x = outputs.last_hidden_state
        loss = _loss(features, decoder, x, labels.to(x.device))

        def logits() -> Tensor:
            return decoder(features(x))

        if pairs:
            pair_logits = self.cls.seq_relationship(outputs.pooler_output)
            loss = loss + F.cross_entropy(pair_logits.view(-1, 2), pair_labels.view(-1))
            made = LatePreTrainingOutput(loss=loss, seq_relationship_logits=pair_logits)
        else:
            made = LateMaskedLMOutput(loss=loss)
        made.hidden_states, made.attentions = outputs.hidden_states, outputs.attentions
        made.__dict__["_late"] = logits
        return made if return_dict else made.to_tuple()


def _loss(features: Callable[[Tensor], Tensor], decoder: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """x [B, S, C], labels [B, S]. On a GPU, and in compiled code, nobody waits to count the labelled tokens: the op leaves the others out."""
    x, labels = x.flatten(0, 1), labels.flatten()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = (labels != IGNORE).nonzero().flatten()
        if len(rows) == 0:  # the mean of nothing, as in the original
            return F.cross_entropy(decoder(features(x)), labels)
        x, labels = x.index_select(0, rows), labels.index_select(0, rows)
    y, kind = features(x), x.device.type
    if torch.is_autocast_enabled(kind):
        y = y.to(torch.get_autocast_dtype(kind))
    return ops.masked_lm_loss(y, taken(decoder.weight, y), taken(decoder.bias, y), labels, ignore_index=IGNORE)
