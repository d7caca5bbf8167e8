from stackbert_kernels.ops.embedding.op import embedding_layer_norm

__all__ = ["embedding_layer_norm"]
