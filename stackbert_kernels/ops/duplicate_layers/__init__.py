from stackbert_kernels.ops.duplicate_layers.op import duplicate_banks_, duplicate_layers_

__all__ = ["duplicate_banks_", "duplicate_layers_"]
