"""The fused ops as modules. Each is a subclass of the torch module that it replaces: same parameters, same state dict, same defaults."""

from stackbert_kernels.nn.attention import MultiHeadAttention
from stackbert_kernels.nn.gelu import BiasGELU
from stackbert_kernels.nn.norm import DropoutAddLayerNorm, LayerNorm

__all__ = ["BiasGELU", "DropoutAddLayerNorm", "LayerNorm", "MultiHeadAttention"]
