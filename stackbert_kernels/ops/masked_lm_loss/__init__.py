from stackbert_kernels.ops.masked_lm_loss.op import masked_lm_loss, masked_lm_predictions

__all__ = ["masked_lm_loss", "masked_lm_predictions"]
