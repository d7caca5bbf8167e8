"""Multi-head self-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackbert_kernels import ops
from stackbert_kernels.nn.norm import checked_p
from stackbert_kernels.nn.rows import Rows, arrange


class MultiHeadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention for self-attention, by the op attention_qkv_varlen; the arguments and the state dict are those of
    nn.MultiheadAttention: in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias.

        query             [S, B, C], [B, S, C] with batch_first, or [S, C]; any floating dtype
        key, value        the same tensor as query
        key_padding_mask  [B, S] or [S] bool, True = no token, any pattern; None = no padding
        rng               [2] int64 (seed, step) from ops.new_rng; None = drawn from torch's generator in each call
        returns           (output like query, None); dropout on the probabilities in training only

    The output at padding is finite and means nothing: there PyTorch's rows see the tokens, these see the padding of their own sequence.
    A sequence of padding alone is fine. With an rng of your own, `site` must be unique to the place in the model.

    What needs the probabilities or another mask is a ValueError that names it, never a slower path: need_weights=True (the default of
    PyTorch's forward, False here), attn_mask, is_causal, a key or value that is another tensor than query, kdim, vdim, add_bias_kv,
    add_zero_attn. A float key_padding_mask is taken where it is 0 or -inf throughout, but not under torch.compile.

    Before:
        attention = nn.MultiheadAttention(C, H, dropout=p, batch_first=True)
        y, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
    After:
        attention = sbk.nn.MultiHeadAttention(C, H, dropout=p, batch_first=True)
        y, _ = attention(x, x, x, key_padding_mask=padding)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        site: int = 0,
        impl: str = "auto",
    ):
        for name, given, wanted in (
            ("add_bias_kv", add_bias_kv, (False,)),
            ("add_zero_attn", add_zero_attn, (False,)),
            ("kdim", kdim, (None, embed_dim)),
            ("vdim", vdim, (None, embed_dim)),
        ):
            if given not in wanted:
                raise _unsupported(name, wanted[-1], given)
        if num_heads <= 0 or embed_dim <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"MultiHeadAttention: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        checked_p("MultiHeadAttention", dropout)
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        self.site, self.impl = site, impl

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        rng: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        for name, given in (("need_weights", need_weights), ("is_causal", is_causal)):
            if given:
                raise _unsupported(name, False, given)
        if attn_mask is not None:
            raise _unsupported("attn_mask", None, f"a tensor {list(attn_mask.shape)}")
        if key is not query or value is not query:
            raise ValueError(
                "MultiHeadAttention: key and value must be query itself (self-attention), got another tensor; use nn.MultiheadAttention"
            )
        if query.is_nested or query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            wanted = f"[S, {self.embed_dim}] or [{'B, S' if self.batch_first else 'S, B'}, {self.embed_dim}]"
            given = "a nested tensor" if query.is_nested else list(query.shape)
            raise ValueError(f"MultiHeadAttention: query must be {wanted}, got {given}")
        padding = checked_padding("MultiHeadAttention", key_padding_mask, query, self.batch_first)
        rows = arrange(query, padding, batch_first=self.batch_first, packed=False)
        p = self.dropout if self.training else 0.0
        x = attend(self, rows.enter(query), rows, dropout_p=p, rng=rng, site=self.site, impl=self.impl)
        return rows.leave(F.linear(x, self.out_proj.weight, self.out_proj.bias)), None

    def extra_repr(self) -> str:
        impl = "" if self.impl == "auto" else f", impl={self.impl!r}"
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"bias={self.in_proj_bias is not None}, batch_first={self.batch_first}{impl}"
        )


def attend(
    module: nn.MultiheadAttention, x: Tensor, rows: Rows, *, dropout_p: float, rng: Tensor | None, site: int, impl: str
) -> Tensor:
    """The heads' outputs side by side, before the output projection. x [R, C] -> [R, C]"""
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    qkv = qkv.view(x.shape[0], 3, module.num_heads, module.head_dim)
    out = ops.attention_qkv_varlen(
        qkv, rows.cu_seqlens, rows.max_seqlen, dropout_p=dropout_p, rng=rng, site=site, impl=impl
    )
    return out.view(x.shape[0], module.embed_dim)


def checked_padding(module: str, mask: Tensor | None, x: Tensor, batch_first: bool) -> Tensor | None:
    """The mask as bool, True = no token; or an error that says what it should be."""
    if mask is None:
        return None
    wanted = list(x.shape[:-1]) if batch_first or x.dim() == 2 else [x.shape[1], x.shape[0]]
    if list(mask.shape) != wanted or mask.device != x.device:
        raise ValueError(
            f"{module}: key_padding_mask must be {wanted} on {x.device}, got {list(mask.shape)} on {mask.device}"
        )
    padding = as_padding(mask)
    if padding is None:
        raise ValueError(
            f"{module}: key_padding_mask must be bool, True for padding"
            f"{'' if torch.compiler.is_compiling() else ', or float of 0 and -inf'}, got {mask.dtype}"
            f"{'' if torch.compiler.is_compiling() or not mask.is_floating_point() else ' with other values'}"
        )
    return padding


def as_padding(mask: Tensor) -> Tensor | None:
    """A key padding mask as bool, True = no token; None if it is something else: values to add, or unknown where nobody can look.

    PyTorch hands masks of 0 and -inf from TransformerEncoder to its layers.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or torch.compiler.is_compiling():
        return None
    padding = mask == -torch.inf
    return padding if bool((padding | (mask == 0)).all()) else None


def _unsupported(name: str, wanted: object, given: object) -> ValueError:
    return ValueError(f"MultiHeadAttention: {name} must be {wanted}, got {given}; nn.MultiheadAttention has it")
