"""megatron_med: tensor, pipeline and data parallel training of medical language models."""

__version__ = "0.1.0"
