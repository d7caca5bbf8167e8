from stackbert_kernels.ops.optimizer.op import adamw_

__all__ = ["adamw_"]
