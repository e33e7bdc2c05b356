"""Models that are read from, on one process and on ranks. No transformers here: every rank would import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_med.config import ParallelConfig
from megatron_med.inference.engine import Engine
from megatron_med.inference.load import Settings, load_model
from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import Answer, Request, Stopping, row_seed
from megatron_med.inference.sampling import Sampling
from megatron_med.inference.scoring import log_likelihoods
from megatron_med.parallel.context import create_context, single_process_context

NEW = 24
"""Tokens of an answer."""

Ids = list[int]


def load(folder: Path, tensor: int, pipeline: int, quantize: str | None = None) -> InferenceModel:
    if tensor * pipeline == 1 and not torch.distributed.is_initialized():
        context = single_process_context()
    else:
        config = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=False)
        context = create_context(config, torch.device("cpu"))
    return load_model(folder, context, Settings(quantize=quantize)).model


def answers_of(
    model: InferenceModel, prompts: list[Ids], sampling: Sampling, slots: int, end: int | None
) -> list[Answer]:
    requests = [Request(ids, NEW, row_seed(0, number)) for number, ids in enumerate(prompts)]
    stopping = Stopping(frozenset() if end is None else frozenset([end]))
    found = list(Engine(model, sampling, stopping, slots).answers(requests))
    return sorted(found, key=lambda answer: answer.request)


def answer_on_rank(
    folder: Path, tensor: int, pipeline: int, prompts: list[Ids], sampling: Sampling, slots: int, end: int | None
) -> list[tuple[Ids, str]]:
    answers = answers_of(load(folder, tensor, pipeline), prompts, sampling, slots, end)
    return [(answer.tokens, answer.end) for answer in answers]


def score_on_rank(folder: Path, tensor: int, pipeline: int, requests: list[tuple[Ids, Ids]]) -> Any:
    told: list[int] = []
    scores = log_likelihoods(load(folder, tensor, pipeline), requests, told.append)
    return [(score.log_likelihood, score.is_greedy) for score in scores], sum(told)
