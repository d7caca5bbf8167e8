from stackbert_kernels.ops.duplicate_layers.op import duplicate_layers_

__all__ = ["duplicate_layers_"]
