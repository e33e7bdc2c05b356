"""Texts that the model writes while it is trained: a few prompts are answered at every validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from megatron_med.config.schema import Config
from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.inference.engine import Engine
from megatron_med.inference.load import request_fault
from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import Request, Stopping, row_seed
from megatron_med.inference.sampling import Sampling
from megatron_med.model.build import DTYPES
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import ParallelContext
from megatron_med.tokenizer import Tokenizer
from megatron_med.tokenizer.chat import ChatEncoder
from megatron_med.tokenizer.template import ChatTemplate


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model has written after it.

    Attributes:
        end: why the text ends: ``end_token``, ``length``, or ``not_finite`` where the model gives no numbers.
    """

    prompt: str
    text: str
    end: str


class SamplePrompts:
    """The prompts of ``logging.sample_prompts``.

    Args:
        config: of the run.
        tokenizer: of its data.
        chat: template of the conversations that it trains on: prompts are then a user's messages.

    Raises:
        ConfigError: there is no tokenizer, or a prompt cannot be answered.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None, chat: dict[str, Any] | None) -> None:
        options = config.logging
        if tokenizer is None:
            raise ConfigError(
                "logging.sample_prompts are given, but the data has no tokenizer: set data.tokenizer, or leave them "
                "out."
            )
        self._dtype = DTYPES[config.precision]
        self._prompts = options.sample_prompts
        self._sampling = Sampling(options.sample_temperature)
        encoder = ChatEncoder(tokenizer, ChatTemplate(chat["template"], chat["chat_template"])) if chat else None
        self._requests = []
        for number, prompt in enumerate(self._prompts):
            ids = encoder.encode_prompt([{"role": "user", "content": prompt}]) if encoder else tokenizer.encode(prompt)
            request = Request(ids, options.sample_tokens, row_seed(config.train.seed, number))
            fault = request_fault(request, config.model)
            if fault:
                raise ConfigError(f"logging.sample_prompts: '{prompt[:40]}' {fault}")
            self._requests.append(request)
        ends = {tokenizer.eod_id, encoder.turn_end_id if encoder else None} - {None}
        self._stopping = Stopping(frozenset(cast(set[int], ends)), (), tokenizer)

    def answer(self, chunks: nn.ModuleList, context: ParallelContext) -> list[Sample]:
        """Answers on every rank of a run, equal on all; data-parallel ranks write the same."""
        chunks.eval()
        model = InferenceModel(cast(list[Transformer], list(chunks)), context, self._dtype)
        engine = Engine(model, self._sampling, self._stopping)
        try:
            answers = sorted(engine.answers(self._requests), key=lambda answer: answer.request)
        except CheckpointError:  # the loss says so, too, and what to do about it is the training's business
            return [Sample(prompt, "", "not_finite") for prompt in self._prompts]
        return [Sample(prompt, answer.text, answer.end) for prompt, answer in zip(self._prompts, answers, strict=True)]
