from stackbert_kernels.ops.optimizer.op import adamw_, global_norm

__all__ = ["adamw_", "global_norm"]
