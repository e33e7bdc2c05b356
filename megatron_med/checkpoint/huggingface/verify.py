"""Runs our model and transformers' on the same token ids and compares the logits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_med.checkpoint.load import load_stage
from megatron_med.config import ModelConfig
from megatron_med.config.schema import CLASSIFICATION, LANGUAGE_MODEL
from megatron_med.errors import CheckpointError
from megatron_med.model.batch import plain_batch
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.random import generator_of
from megatron_med.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest difference of a logit in fp32, relative to the largest logit or 1."""

_TEXT = (
    "A 62-year-old woman with type 2 diabetes and chronic kidney disease was admitted with dyspnoea. Serum "
    "creatinine was 2.4 mg/dL, HbA1c 8.1 %, and echocardiography showed a reduced ejection fraction."
)


def verify_logits(
    huggingface: Path,
    checkpoint: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    rounded: torch.dtype = torch.float32,
    compared: int | None = None,
) -> float:
    """Compares both models in fp32 on real token ids, or on seeded random ones where there is no tokenizer.

    Args:
        huggingface: folder of the Hugging Face model.
        checkpoint: step folder of ours.
        config: the model.
        tokenizer: makes the ids.
        rounded: type that the Hugging Face weights were rounded to.
        compared: logits of this many first tokens are compared; the checkpoint may have more tokens.

    Returns:
        The largest difference of a logit.

    Raises:
        CheckpointError: the logits differ, or transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise CheckpointError("--verify needs transformers: pip install 'megatron_med[verify]'.") from error
    transformers_logging.disable_progress_bar()
    ids = sample_ids(config, tokenizer)
    is_classification = config.head == CLASSIFICATION
    if is_classification:
        ids = ids[:1]  # of more texts theirs scores the last token only where it knows a padding token
    auto = AutoModelForSequenceClassification if is_classification else AutoModelForCausalLM
    hf_model = auto.from_pretrained(huggingface, dtype=torch.float32).eval()
    with torch.no_grad():
        hf_logits = hf_model(ids).logits.float()
    del hf_model
    logits = checkpoint_logits(checkpoint, ids, rounded)[..., :compared]
    if is_classification:  # theirs are of the last token only
        logits = logits[:, -1]
    difference = (logits - hf_logits).abs().max().item()
    limit = TOLERANCE * max(1.0, hf_logits.abs().max().item())
    if not difference <= limit:
        raise CheckpointError(
            f"The logits differ by up to {difference:.3g} (limit {limit:.3g}) between {huggingface} and {checkpoint}: "
            "the conversion is wrong, nothing was written."
        )
    print(f"verified: logits of {ids.numel()} tokens differ by at most {difference:.2g}")
    return difference


@torch.no_grad()
def checkpoint_logits(checkpoint: Path, ids: Tensor, rounded: torch.dtype = torch.float32) -> Tensor:
    """fp32 logits ``[batch, seq, vocabulary]`` of a checkpoint on one process."""
    stage = load_stage(checkpoint, single_process_context(), torch.float32)
    for parameter in stage.parameters():
        parameter.copy_(parameter.to(rounded))
    return logits_of(stage, ids)


@torch.no_grad()
def logits_of(stage: Transformer, ids: Tensor) -> Tensor:
    """fp32 logits ``[batch, seq, vocabulary]`` of a whole model on one process."""
    logits = stage.eval()(None, plain_batch(ids))
    labels = stage.config.vocab_size if stage.config.head == LANGUAGE_MODEL else stage.config.num_labels
    return logits.transpose(0, 1)[..., :labels].float()


def sample_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> Tensor:
    """Token ids ``[batch, seq]`` of a real text, or seeded random ones where there is no tokenizer."""
    length = min(64, config.max_position_embeddings)
    if tokenizer is not None:
        return torch.tensor([tokenizer.encode(_TEXT)[:length]])
    return torch.randint(config.vocab_size, (2, length), generator=generator_of("verify"))
