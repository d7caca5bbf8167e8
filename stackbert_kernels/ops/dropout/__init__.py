from stackbert_kernels.ops.dropout.op import dropout

__all__ = ["dropout"]
