"""Training: the loop, the optimizer, checkpoints, the report."""
