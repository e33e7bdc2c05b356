"""Configuration: dataclasses, presets, loading and validation."""

from megatron_med.config.load import dump_config, load_config, model_from_dict
from megatron_med.config.schema import Config, ModelConfig, ParallelConfig

__all__ = ["Config", "ModelConfig", "ParallelConfig", "dump_config", "load_config", "model_from_dict"]
