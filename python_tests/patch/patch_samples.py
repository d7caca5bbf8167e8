"""Small models of transformers' BERT family, batches for them, and what a call of them gives."""

from __future__ import annotations

import copy
import random

import torch
import transformers
from torch import Tensor

BERT = ("Model", "ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification",
        "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")  # fmt: skip
OTHERS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification",
          "ForQuestionAnswering")  # fmt: skip
CLASSES = (
    *(f"Bert{head}" for head in BERT),
    *(f"Roberta{head}" for head in OTHERS),
    *(f"XLMRoberta{head}" for head in OTHERS),
    *(f"Camembert{head}" for head in OTHERS),
    *(f"Electra{head}" for head in (*OTHERS, "ForPreTraining")),
)
PADDING = ("none", "full", "right", "left", "holes")
VOCABULARY, LONGEST, PAD = 61, 11, 0


def family_of(name: str) -> str:
    return next(f for f in ("XLMRoberta", "Roberta", "Bert", "Camembert", "Electra") if name.startswith(f))


def model(name: str, *, p: float = 0.0, seed: int = 0, **changes) -> torch.nn.Module:
    """A random small shape: odd numbers of layers, heads of 16 to 128; weights large enough for attention to matter."""
    draw = random.Random(f"{name} {seed}")
    heads = draw.choice((1, 2, 3))
    settings = {
        "hidden_size": heads * draw.choice((16, 24, 32, 64, 128)), "num_attention_heads": heads, "vocab_size": VOCABULARY,
        "num_hidden_layers": draw.choice((1, 3)), "intermediate_size": draw.choice((33, 64)), "pad_token_id": PAD,
        "max_position_embeddings": LONGEST + 4, "hidden_act": draw.choice(("gelu", "gelu_new", "gelu_pytorch_tanh")),
        "hidden_dropout_prob": p, "attention_probs_dropout_prob": p, "initializer_range": 0.1, "num_labels": 2 if name.endswith("Answering") else 3,
        "type_vocab_size": 2, "layer_norm_eps": draw.choice((1e-12, 1e-5)),
    }  # fmt: skip
    if name.startswith("Electra"):
        settings["summary_last_dropout"] = p
        settings["embedding_size"] = draw.choice((settings["hidden_size"], 20))
    config = getattr(transformers, f"{family_of(name)}Config")(**settings | changes)
    torch.manual_seed(seed)
    made = getattr(transformers, name)(config)
    for parameter in made.parameters():  # norms and biases count too
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return made


def mask(padding: str, rows: int = 4, columns: int = LONGEST, seed: int = 0) -> Tensor | None:
    """int64 [rows, columns]; the first row is full, the second has one token."""
    if padding == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = columns, 1
    made = (torch.arange(columns) < lengths[:, None]).long()
    if padding == "full":
        return torch.ones_like(made)
    if padding == "left":
        return made.flip(1)
    if padding == "holes":
        order = torch.argsort(torch.rand(rows, columns, generator=generator), dim=1)
        return made.gather(1, order)
    return made


def batch(name: str, padding: str, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a call, labels included."""
    generator = torch.Generator().manual_seed(seed + 1)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    choice = name.endswith("ForMultipleChoice")
    keep = mask(padding)
    ids = integers(VOCABULARY, 4, LONGEST, low=5)
    if keep is not None:
        ids = ids.where(keep == 1, PAD)
    given = {"input_ids": ids}
    if keep is not None:
        given["attention_mask"] = keep
    if padding in ("full", "right"):  # else the model makes them
        given["token_type_ids"] = integers(2, *ids.shape)
    if choice:
        given = {key: value.view(2, 2, LONGEST) for key, value in given.items()}
    inside = torch.ones_like(ids) if keep is None else keep
    if name.endswith(("ForMaskedLM", "BertForPreTraining")):
        chosen = (torch.rand(ids.shape, generator=generator) < 0.3).index_fill(1, torch.tensor([3]), True)
        given["labels"] = ids.where(chosen & (inside == 1), -100)
    if name == "BertForPreTraining":
        given["next_sentence_label"] = integers(2, 4)
    if name.endswith("ForTokenClassification"):
        given["labels"] = integers(3, 4, LONGEST).where(inside == 1, -100)
    if name == "ElectraForPreTraining":
        given["labels"] = integers(2, 4, LONGEST)
    if name.endswith(("ForSequenceClassification", "ForNextSentencePrediction")):
        given["labels"] = integers(2, 4)
    if choice:
        given["labels"] = integers(2, 2)
    if name.endswith("ForQuestionAnswering"):
        given |= {"start_positions": integers(LONGEST, 4), "end_positions": integers(LONGEST, 4)}
    return given


def results(made: torch.nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the output, and the gradient of every parameter: of the loss, or of what a base model returns at tokens."""
    made.zero_grad()
    output = made(**given, output_hidden_states=True)
    tensors = {f"hidden_states.{i}": h for i, h in enumerate(output.hidden_states)}
    tensors |= {k: v for k, v in output.items() if torch.is_tensor(v)}
    tensors |= {k: getattr(output, k) for k in ("logits", "prediction_logits") if getattr(output, k, None) is not None}
    loss = output.get("loss")
    if loss is None:
        x = output.last_hidden_state
        keep = given.get("attention_mask", torch.ones(x.shape[:2]))[..., None]
        direction = torch.sin(torch.arange(x.shape[-1], dtype=x.dtype))
        loss = (x * direction * keep).sum()
        if output.get("pooler_output") is not None:
            loss = loss + (output.pooler_output * direction).sum()
    loss.backward()
    gradients = {f"d {k}": p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in tensors.items()} | gradients


def twin(made: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(made)
