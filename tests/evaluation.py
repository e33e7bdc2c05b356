"""Evaluation on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_med.config import ParallelConfig
from megatron_med.parallel.context import create_context


def scores_on_rank(
    checkpoint: Path, tensor: int, pipeline: int, pairs: list[tuple[str, str]], texts: list[str]
) -> tuple[Any, Any]:
    """Log-likelihoods of pairs and of whole texts through the API of lm-eval."""
    from lm_eval.api.instance import Instance

    from megatron_med.evaluate.language_model import MegatronMedLM

    context = None
    if dist.is_initialized():
        config = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=False)
        context = create_context(config, torch.device("cpu"))
    model = MegatronMedLM(str(checkpoint), context=context)
    assert (model.rank, model.world_size) == (0, 1), "data-parallel ranks share the requests inside the model"
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    rolled = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    return model.loglikelihood(asked, disable_tqdm=True), model.loglikelihood_rolling(rolled, disable_tqdm=True)
