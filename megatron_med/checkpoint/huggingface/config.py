"""Hugging Face's ``config.json`` and our ModelConfig."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_med.config import ModelConfig
from megatron_med.config.ranges import model_numbers
from megatron_med.config.schema import RopeScaling
from megatron_med.errors import CheckpointError

_UNKNOWN_HERE = {"partial_rotary_factor": 1.0, "sliding_window": None, "no_rope_layers": None}
"""Settings of Llama's relatives that change the arithmetic, and their value for a Llama."""
_MOST_LAYERS = 65536
_GPT2_GELUS = ("gelu_new", "gelu_pytorch_tanh")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a Hugging Face folder: it has no config.json. Check --from.")
    return read_settings(path, "a model")


def read_settings(path: Path, of: str) -> dict[str, Any]:
    """A JSON file of settings.

    Raises:
        CheckpointError: it is something else; ``of`` says what it should tell of.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Fetch it again.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings of {of}. Fetch it again.")
    return settings


def from_huggingface(config: dict[str, Any]) -> ModelConfig:
    """Our configuration of a Hugging Face model.

    Raises:
        CheckpointError: another family, or a setting that we have no arithmetic for, by name.
    """
    try:
        model = _from_known(config)
        faults = list(_value_faults(model))
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error.args[0]!r}: it is needed. Get the whole file.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json has a value of another kind than its name says ({error}).") from error
    if faults:
        raise CheckpointError(faults)
    return model


def _value_faults(model: ModelConfig) -> Iterator[str]:
    for field in fields(model):
        if field.name == "num_labels":  # no number of the file
            continue
        value = getattr(model, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type == "int" and not (is_number and isinstance(value, int) and value >= 1):
            yield f"config.json: {field.name} of the model is {value!r}: a whole number of at least 1 is needed."
        elif field.type == "float" and not is_number:
            yield f"config.json: {field.name} of the model is {value!r}: a number is needed."
    if isinstance(model.num_layers, int) and model.num_layers > _MOST_LAYERS:
        yield f"config.json: num_layers of the model is {model.num_layers}: at most {_MOST_LAYERS} are possible."
    with suppress(TypeError):
        yield from (fault.replace("model.", "config.json: ", 1) for fault in model_numbers(model))


def _from_known(config: dict[str, Any]) -> ModelConfig:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"config.json has a quantization_config (method {method}): quantized weights are not imported. Save the "
            "model in bf16, fp16 or fp32 (transformers: model.dequantize(), then save_pretrained)."
        )
    family = config.get("model_type")
    if family == "llama":
        _refuse(config, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"})
        _refuse(config, {name: value for name, value in _UNKNOWN_HERE.items() if config.get(name) is not None})
        return _llama(config)
    if family == "gpt2":
        _refuse(config, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})
        if config.get("activation_function", "gelu_new") not in _GPT2_GELUS:
            raise CheckpointError(
                f"config.json: activation_function is {config['activation_function']}: only GELU is known."
            )
        return _gpt2(config)
    raise CheckpointError(f"config.json: model_type is {family}: only llama and gpt2 can be imported.")


def to_huggingface(
    model: ModelConfig,
    dtype: str,
    bos_id: int | None,
    eos_id: int | None,
    labels: Sequence[str] = (),
    pad_id: int | None = None,
) -> dict[str, Any]:
    """``config.json`` for an exported model, read by transformers 4 and 5; ``labels`` and ``pad_id`` of a
    classification."""
    scores = {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "pad_token_id": pad_id,
        "problem_type": "single_label_classification",
    }
    common = {
        **(scores if labels else {}),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": bool(model.tie_embeddings),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "initializer_range": model.init_std,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if model.family == "gpt2":
        return {
            "architectures": ["GPT2ForSequenceClassification" if labels else "GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": model.max_position_embeddings,
            "layer_norm_epsilon": model.norm_eps,
            "activation_function": "gelu_new",
            "embd_pdrop": model.embedding_dropout,
            "resid_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
            **common,
        }
    return {
        "architectures": ["LlamaForSequenceClassification" if labels else "LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling_to_huggingface(model.rope_scaling),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **common,
    }


def _llama(config: dict[str, Any]) -> ModelConfig:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return ModelConfig(
        family="llama",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or 0,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling_from_huggingface(config.get("rope_scaling") or rope),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=config.get("initializer_range", 0.02),
    )


def _gpt2(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        num_layers=config["n_layer"],
        hidden_size=config["n_embd"],
        num_attention_heads=config["n_head"],
        ffn_hidden_size=config.get("n_inner") or 0,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["n_positions"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        init_std=config.get("initializer_range", 0.02),
        embedding_dropout=config.get("embd_pdrop", 0.1),
        hidden_dropout=config.get("resid_pdrop", 0.1),
        attention_dropout=config.get("attn_pdrop", 0.1),
    )


def _rope_scaling_from_huggingface(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise CheckpointError(f"config.json: rope scaling '{kind}' is not known: only linear and llama3 are.")


def _rope_scaling_to_huggingface(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _refuse(config: dict[str, Any], expected: dict[str, Any]) -> None:
    faults = [
        f"config.json: {name} is {config[name]}: only {value} can be imported."
        for name, value in expected.items()
        if config.get(name, value) != value
    ]
    if faults:
        raise CheckpointError(faults)
