"""The model: parameters in a LayerBank, a BERT encoder on unpadded tokens, its heads, and names to and from transformers."""

from stackbert_kernels.model.bank import LayerBank
from stackbert_kernels.model.bert import Bert, Output

__all__ = ["Bert", "LayerBank", "Output"]
