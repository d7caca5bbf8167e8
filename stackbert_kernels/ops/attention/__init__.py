from stackbert_kernels.ops.attention.op import attention, attention_qkv_varlen, attention_varlen

__all__ = ["attention", "attention_qkv_varlen", "attention_varlen"]
