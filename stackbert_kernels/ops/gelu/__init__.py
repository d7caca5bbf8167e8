from stackbert_kernels.ops.gelu.op import bias_gelu

__all__ = ["bias_gelu"]
