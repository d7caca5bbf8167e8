"""stackbert_kernels: fast BERT training by fused kernels and layer stacking.

The flow, which is also the reading order: config -> recipes -> plan -> growth -> model -> ops -> csrc.
"""

__version__ = "0.1.0"
