from stackbert_kernels.ops.layer_norm.op import dropout_add, dropout_add_layer_norm, layer_norm

__all__ = ["dropout_add", "dropout_add_layer_norm", "layer_norm"]
