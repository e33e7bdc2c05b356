"""Tensor, pipeline and data parallelism: tensors and process groups, nothing of models."""
