"""Fused operations: tensors in, tensors out, each beside its formula in plain PyTorch."""
