"""torch.nn.TransformerEncoder and its layers on the fused ops, in training too, where PyTorch has no fused path.

A layer runs on rows [R, C]: the places of the batch, in the order that attention on packed tokens wants. The encoder arranges them once
for all its layers. With padding the rows are the tokens alone where that was asked for (`unpad`) or where PyTorch itself makes a nested
tensor of them, in evaluation; elsewhere attention stays PyTorch's, for its output at padding depends on the tokens. What else
sends a part down PyTorch's path is looked at in each call: another mask, a hook, a wrapped linear layer.

R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels import ops
from stackbert_kernels.nn.attention import MultiHeadAttention, as_padding, attend
from stackbert_kernels.nn.norm import affine
from stackbert_kernels.nn.rows import Rows, arrange
from stackbert_kernels.patch.plain import dropout_p, hooked, linear, new_rng, plain, realised, taken
from stackbert_kernels.patch.runs import runs
from stackbert_kernels.patch.swap import Parts, Replacement, Skipped, Swapped

LOOKED_FOR = "torch.nn.TransformerEncoder and TransformerEncoderLayer"

# A layer's dropout sites, from its first one on.
ATTENTION, ATTENTION_OUTPUT, INNER, OUTPUT = range(4)

Branch = tuple[Tensor, Tensor | None]  # what is added to the residual, and the bias that was left out of it


class EncoderLayer(Swapped):
    """nn.TransformerEncoderLayer. Its `options`: whether to leave padding out."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | Rows | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """From its encoder, src is rows [R, C], and src_key_padding_mask says how they are arranged."""
        if isinstance(src_key_padding_mask, Rows):
            return self._layer(src, src_key_padding_mask)
        if src.is_nested or src.dim() not in (2, 3) or not _has_kernels(src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src_mask is None and not is_causal and self.why_not_attention() is None:
            mask = src_key_padding_mask if self._stackbert.options else None
            known, padding = _padding(src, mask, self.self_attn.batch_first)
            if known and mask is src_key_padding_mask:
                rows = _arrange(src, padding, self.self_attn.batch_first)
                return _leave(rows, self._layer(rows.enter(src), rows), padding)
        theirs = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        return self._layer(src, theirs)

    def why_not_attention(self) -> str | None:
        """Why attention runs as before, whatever the arguments are."""
        if "attention" not in self._stackbert.parts:
            return "not asked for"
        if any(module is not None and hooked(module) for module in self._modules.values()):
            return "a module inside has hooks, which want to see the batch and not rows"
        return _why_not_self_attention(self.self_attn)

    def _layer(self, x: Tensor, keys: Rows | dict) -> Tensor:
        """`keys`: how rows are arranged, or the arguments of PyTorch's attention."""
        rng = new_rng(max(self._chances(isinstance(keys, Rows))), x)
        if self.norm_first:
            x = self._join(
                self._attend(self._norm(self.norm1, x), keys, rng), x, None, self.dropout1, rng, ATTENTION_OUTPUT
            )
            return self._join(self._feed_forward(self._norm(self.norm2, x), rng), x, None, self.dropout2, rng, OUTPUT)
        x = self._join(self._attend(x, keys, rng), x, self.norm1, self.dropout1, rng, ATTENTION_OUTPUT)
        return self._join(self._feed_forward(x, rng), x, self.norm2, self.dropout2, rng, OUTPUT)

    def _chances(self, fused_attention: bool) -> list[float]:
        """Of the dropouts that the ops do."""
        attention = self._attention_p() if fused_attention else 0.0
        return [attention, *(dropout_p(dropout) or 0.0 for dropout in (self.dropout1, self.dropout, self.dropout2))]

    def _attention_p(self) -> float:
        return self.self_attn.dropout if self.self_attn.training else 0.0

    def _site(self, place: int) -> int:
        return self._stackbert.site + place

    def _attend(self, x: Tensor, keys: Rows | dict, rng: Tensor | None) -> Branch:
        module = self.self_attn
        if not isinstance(keys, Rows):
            return module(x, x, x, need_weights=False, **keys)[0], None
        x = attend(module, x, keys, dropout_p=self._attention_p(), rng=rng, site=self._site(ATTENTION), impl="auto")
        if "add_norm" in self._stackbert.parts:
            return F.linear(x, module.out_proj.weight), module.out_proj.bias
        return F.linear(x, module.out_proj.weight, module.out_proj.bias), None

    def _feed_forward(self, x: Tensor, rng: Tensor | None) -> Branch:
        parts, approximate = self._stackbert.parts, _gelu_of(self.activation)
        if (
            "gelu" in parts
            and approximate is not None
            and plain(self.linear1, nn.Linear)
            and self.linear1.bias is not None
        ):
            x = F.linear(x, self.linear1.weight)
            x = ops.bias_gelu(x, taken(self.linear1.bias, x), approximate=approximate)
        else:
            x = self.activation(self.linear1(x))
        p = dropout_p(self.dropout)
        if "add_norm" not in parts:
            return self.linear2(self.dropout(x)), None
        x = self.dropout(x) if p is None else ops.dropout(x, p, rng=rng, site=self._site(INNER))
        return linear(self.linear2, x)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return _layer_norm(norm, x) if "add_norm" in self._stackbert.parts else norm(x)

    def _join(
        self, branch: Branch, x: Tensor, norm: nn.Module | None, dropout: nn.Module, rng: Tensor | None, place: int
    ) -> Tensor:
        """norm(x + dropout(branch)); norm None = without."""
        y, bias = branch
        p = dropout_p(dropout)
        if "add_norm" not in self._stackbert.parts or p is None or not (norm is None or _plain_norm(norm)):
            x = x + dropout(y if bias is None else y + bias.to(y.dtype))
            return x if norm is None else norm(x)
        dtype = torch.promote_types(x.dtype, y.dtype)
        dtype = dtype if norm is None else _norm_dtype(dtype, x)
        y, x = y.to(dtype), x.to(dtype)
        bias = None if bias is None else taken(bias, y)
        options = {"x_bias": bias, "dropout_p": p, "rng": rng, "site": self._site(place)}
        if norm is None:
            return ops.dropout_add(y, x, **options)
        return ops.dropout_add_layer_norm(y, x, *(taken(w, y) for w in affine(norm, y)), eps=norm.eps, **options)


class Encoder(Swapped):
    """nn.TransformerEncoder. Its `options`: whether to leave padding out."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        arranged = None if mask is not None or is_causal else self._arranged(src, src_key_padding_mask)
        if arranged is None:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        rows, padding = arranged
        x = rows.enter(src)
        for layer in self.layers:
            x = layer(x, src_mask=None, is_causal=False, src_key_padding_mask=rows)
        if self.norm is None:
            return _leave(rows, x, padding)
        if "add_norm" not in self._stackbert.parts or not _plain_norm(self.norm):
            return self.norm(_leave(rows, x, padding))
        if self._stackbert.options:  # without padding up to the end: its rows are zero behind the norm, too
            return _leave(rows, _layer_norm(self.norm, x), padding)
        return _layer_norm(self.norm, _leave(rows, x, padding))

    def _arranged(self, src: Tensor, mask: Tensor | None) -> tuple[Rows, Tensor | None] | None:
        """How all layers see the batch, and its padding as bool; None where each has to see it by itself."""
        if src.is_nested or src.dim() not in (2, 3) or not _has_kernels(src):
            return None
        for layer in self.layers:  # a hook wants to see what the layer would have seen
            if not isinstance(layer, EncoderLayer) or not plain(layer, type(layer)) or layer.why_not_attention():
                return None
        batch_first = self.layers[0].self_attn.batch_first
        if mask is not None and not self._stackbert.options and not self._may_make_nested(src):
            return None
        known, padding = _padding(src, mask, batch_first)
        if not known or not (padding is None or self._stackbert.options or _tokens_first(padding)):
            return None
        return _arrange(src, padding, batch_first), padding

    def _may_make_nested(self, src: Tensor) -> bool:
        """Whether PyTorch would, given padding behind tokens: then it is zero before the norm there, too."""
        layer = self.layers[0]
        if torch.compiler.is_compiling() or layer.training or not getattr(self, "use_nested_tensor", False):
            return False
        if src.dim() != 3 or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
            return False
        return not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in layer.parameters())))


def _tokens_first(padding: Tensor) -> bool:
    return not bool((padding[:, :-1] & ~padding[:, 1:]).any())


def _why_not_self_attention(module: nn.Module) -> str | None:
    """Why the op cannot stand for this self-attention."""
    if not (plain(module, nn.MultiheadAttention) or plain(module, MultiHeadAttention)):
        return f"self_attn is a {type(module).__name__} or has hooks"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "self_attn has kdim, vdim, add_bias_kv or add_zero_attn"
    if realised(module.dropout) is None:
        return f"self_attn has dropout {module.dropout}"
    return None


def _gelu_of(activation: Callable) -> str | None:
    """`approximate` of the GELU that it is, None if it is another function."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if isinstance(activation, nn.Module) and plain(activation, nn.GELU) else None


def _plain_norm(norm: nn.Module) -> bool:
    return plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1


def _layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if not _plain_norm(norm):
        return norm(x)
    x = x.to(_norm_dtype(x.dtype, x))
    return ops.layer_norm(x, *(taken(w, x) for w in affine(norm, x)), norm.eps)


def _norm_dtype(dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """What nn.LayerNorm makes of dtype: under autocast on a GPU float32, elsewhere the same."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else dtype


def _arrange(x: Tensor, padding: Tensor | None, batch_first: bool) -> Rows:
    """Tokens alone; in compiled code, where no shape may depend on the mask, the padding behind them."""
    return arrange(x, padding, batch_first=batch_first, packed=not torch.compiler.is_compiling())


def _leave(rows: Rows, x: Tensor, padding: Tensor | None) -> Tensor:
    """As the batch was, zero at padding."""
    x = rows.leave(x)
    if padding is None or not torch.compiler.is_compiling():
        return x
    return x.masked_fill((padding if rows.batch_first else padding.T)[..., None], 0.0)


def _has_kernels(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda")


def _padding(x: Tensor, mask: Tensor | None, batch_first: bool) -> tuple[bool, Tensor | None]:
    """Whether the mask is known to be one of padding, and as bool, True = no token. PyTorch speaks about one of a wrong shape."""
    if mask is None:
        return True, None
    shape = x.shape[:-1] if batch_first or x.dim() == 2 else (x.shape[1], x.shape[0])
    if tuple(mask.shape) != tuple(shape) or mask.device != x.device:
        return False, None
    padding = as_padding(mask)
    return padding is not None, padding


# ---- what is replaced


def plan(model: nn.Module, parts: Parts) -> list[Replacement | Skipped]:
    entries: list[Replacement | Skipped] = []
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            entries += _layer_entries(name, module, parts)
        elif isinstance(module, nn.TransformerEncoder):
            entries += _encoder_entries(name, module, parts)
    return entries


def _layer_entries(name: str, layer: nn.TransformerEncoderLayer, parts: Parts) -> list[Replacement | Skipped]:
    asked = {"attention": parts.attention or parts.unpad, "add_norm": parts.add_norm, "gelu": parts.gelu}
    wanted = [part for part in asked if asked[part]]
    if reason := _overridden(layer, nn.TransformerEncoderLayer, ("forward", "_sa_block", "_ff_block")):
        return [Skipped(name, part, reason) for part in wanted]
    made, skipped = {}, []
    for part in wanted:
        what, why = PLANS[part](layer)
        if what is None:
            skipped.append(Skipped(name, part, why))
        else:
            made[part] = what
    if not made:
        return skipped
    note = "a module inside has hooks"
    if "attention" in made:
        note += "; attention: with src_mask" + ("" if parts.unpad else ", or padding (unpad=True leaves it out)")
    return [Replacement(name, layer, EncoderLayer, made, note, options=parts.unpad, sites=4), *skipped]


def _overridden(module: nn.Module, cls: type[nn.Module], methods: tuple[str, ...]) -> str | None:
    own = [name for name in methods if getattr(type(module), name) is not getattr(cls, name) or name in module.__dict__]
    return f"{type(module).__name__} has its own {', '.join(own)}" if own else None


# A plan for each part of a layer: (what runs, "") or (None, why not).


def _attention(layer: nn.TransformerEncoderLayer) -> tuple[str | None, str]:
    module = layer.self_attn
    if reason := _why_not_self_attention(module):
        return None, reason
    return runs("attention", (1, module.num_heads, module.head_dim), like=next(layer.parameters()))


def _add_norm(layer: nn.TransformerEncoderLayer) -> tuple[str | None, str]:
    for name in ("norm1", "norm2"):
        if not _plain_norm(getattr(layer, name)):
            return None, f"{name} is a {type(getattr(layer, name)).__name__} or has hooks"
    for name in ("dropout1", "dropout", "dropout2"):
        dropout = getattr(layer, name)
        if dropout_p(dropout) is None or realised(getattr(dropout, "p", 0.0)) is None:
            return None, f"{name} is {dropout} or has hooks"
    names = ("dropout_add", "layer_norm") if layer.norm_first else ("dropout_add_layer_norm",)
    shape = (1, layer.norm1.normalized_shape[0])
    found = [runs(op, shape, like=next(layer.parameters())) for op in names]
    for what, why in found:
        if what is None:
            return None, why
    return ", ".join(what for what, _ in found), ""


def _gelu(layer: nn.TransformerEncoderLayer) -> tuple[str | None, str]:
    if _gelu_of(layer.activation) is None:
        return None, f"the activation is {getattr(layer.activation, '__name__', type(layer.activation).__name__)}"
    if not plain(layer.linear1, nn.Linear) or layer.linear1.bias is None:
        return None, "linear1 has no bias, or has hooks, or is wrapped"
    return runs("bias_gelu", (1, len(layer.linear1.bias)), like=next(layer.parameters()))


PLANS = {"attention": _attention, "add_norm": _add_norm, "gelu": _gelu}


def _encoder_entries(name: str, encoder: nn.TransformerEncoder, parts: Parts) -> list[Replacement | Skipped]:
    """The encoder arranges rows for its layers, if they attend on rows."""
    part = "unpad" if parts.unpad else "attention"
    if not (parts.attention or parts.unpad):
        return []
    if reason := _overridden(encoder, nn.TransformerEncoder, ("forward",)):
        return [Skipped(name, part, reason)]
    for i, layer in enumerate(encoder.layers):
        entries = _layer_entries("", layer, parts) if isinstance(layer, nn.TransformerEncoderLayer) else []
        if not any(isinstance(entry, Replacement) and "attention" in entry.runs for entry in entries):
            return [Skipped(name, part, f"the attention of layers.{i} is not replaced")]
    made = {part: "its layers on tokens alone" if parts.unpad else "its layers on rows, arranged once"}
    if parts.add_norm and encoder.norm is not None and _plain_norm(encoder.norm):
        what, _ = runs("layer_norm", (1, encoder.norm.normalized_shape[0]), like=next(encoder.parameters()))
        made |= {"add_norm": what} if what else {}
    note = "a layer has hooks; a mask is given"
    return [Replacement(name, encoder, Encoder, made, note, options=parts.unpad, sites=0)]
