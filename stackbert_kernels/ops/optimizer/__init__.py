from stackbert_kernels.ops.optimizer.op import adamw_, global_norm, lamb_, lans_

__all__ = ["adamw_", "global_norm", "lamb_", "lans_"]
