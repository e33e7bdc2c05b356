"""Loads what is to be read from: a checkpoint of ours or a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_med.checkpoint.adapter import quantize_of, weights_digest
from megatron_med.checkpoint.folder import MANIFEST, TOKENIZER, CheckpointState, read_state, resolve_checkpoint
from megatron_med.checkpoint.huggingface.config import read_settings
from megatron_med.checkpoint.huggingface.load import huggingface_model, is_huggingface, load_huggingface_stage
from megatron_med.checkpoint.load import load_stage, verify_checkpoint
from megatron_med.config import ModelConfig, ParallelConfig, model_from_dict
from megatron_med.config.quantize import nf4_faults, quantize_named
from megatron_med.config.schema import QuantizeConfig
from megatron_med.config.validate import cut_faults
from megatron_med.data.head_form import HeadForm
from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.files import sha256_of_all
from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import Request, Stopping
from megatron_med.model.build import NOT_QUANTIZED
from megatron_med.model.transformer import Transformer
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.tensor_parallel.layers import pack_weights
from megatron_med.tokenizer import Tokenizer, load_tokenizer
from megatron_med.tokenizer.chat import ChatEncoder
from megatron_med.tokenizer.load import has_tokenizer
from megatron_med.tokenizer.template import OWN, ChatTemplate, brings_template, load_template


@dataclass(frozen=True)
class Settings:
    """How a model is loaded.

    Attributes:
        dtype: of the arithmetic.
        layers_per_stage: layers of each stage; None splits them by cost.
        base: of adapters, where it is no longer where they were trained.
        quantize: what the matrices are quantised to: int8, nf4 or none. None: what they were while adapters were
            trained.
    """

    dtype: torch.dtype = torch.float32
    layers_per_stage: list[int] | None = None
    base: str | Path | None = None
    quantize: str | None = None


IN_FP32 = Settings()


_TEXT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"),
)
"""Files of a Hugging Face folder that decide, beside the weights, what a model reads and writes."""


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    Attributes:
        source: the step folder, or the Hugging Face folder.
        model: this rank's part.
        tokenizer: None where there is none.
        chat: template of the conversations that the model was trained on; None where it was not.
        head: what the model scores, and how that is made; None for a language model.
        end_ids: tokens that end an answer.
    """

    source: Path
    model: InferenceModel
    tokenizer: Tokenizer | None
    chat: ChatTemplate | None
    end_ids: frozenset[int]
    head: HeadForm | None = None

    def stopping(self, strings: Sequence[str] = ()) -> Stopping:
        """What ends an answer of this model.

        Raises:
            ConfigError: a text is empty, or there is no tokenizer to find it with.
        """
        if "" in strings:
            raise ConfigError("a stop string is empty: it would end every answer at once. Leave it out.")
        if strings and self.tokenizer is None:
            raise ConfigError(f"{self.source} holds no tokenizer: stop strings cannot be looked for. Leave them out.")
        return Stopping(self.end_ids, tuple(strings), self.tokenizer)

    def chat_encoder(self) -> ChatEncoder:
        """Makes prompts of conversations.

        Raises:
            ConfigError: the model has no template, or no tokenizer.
        """
        if self.chat is None or self.tokenizer is None:
            raise ConfigError(
                f"{self.source} has no chat template: it was not trained on conversations. Give a plain prompt."
            )
        return ChatEncoder(self.tokenizer, self.chat)

    def fingerprint(self) -> str:
        """Names the weights and, of a Hugging Face folder, what turns text into ids: two models that differ in these
        have other names."""
        if (self.source / MANIFEST).is_file():
            return weights_digest(self.source)
        named = (self.source / name for name in _TEXT_FILES)
        files = [*(file for file in named if file.is_file()), *sorted(self.source.glob("*.safetensors"))]
        return hashlib.sha256("\n".join(sha256_of_all(files)).encode()).hexdigest()

    def check(self, request: Request, which: str = "The prompt") -> None:
        """Refuses a request that the model cannot answer.

        Raises:
            ConfigError: names ``which`` and what does not fit.
        """
        fault = request_fault(request, self.model.config)
        if fault:
            raise ConfigError(f"{which} {fault}")


def request_fault(request: Request, config: ModelConfig) -> str | None:
    """What is wrong with a request, to be put behind its name; None where nothing is."""
    limit, tokens = config.max_position_embeddings, len(request.prompt)
    if not tokens:
        return "is empty: there is nothing to go on from. Write a word at least."
    if tokens + request.max_new_tokens > limit:
        return (
            f"has {tokens} tokens and {request.max_new_tokens} new ones are asked for: together at most {limit} "
            "(max_position_embeddings) fit. Shorten it, or ask for fewer new tokens."
        )
    strange = next((token for token in request.prompt if not 0 <= token < config.vocab_size), None)
    if strange is not None:
        return f"holds the id {strange}: the model's vocabulary ends at {config.vocab_size - 1}."
    return None


def load_model(checkpoint: str | Path, context: ParallelContext, settings: Settings = IN_FP32) -> Loaded:
    """Loads a model on every rank of a grid without sequence parallelism.

    Args:
        checkpoint: RUN, RUN/checkpoints, one step, or a Hugging Face folder.
        context: the grid; all its ranks call this.
        settings: how.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or cannot be cut into this grid.
    """
    assert not context.sequence_parallel, "single tokens cannot be cut along the sequence"
    folder = Path(checkpoint)
    if is_huggingface(folder):
        return _from_huggingface(folder, context, settings)
    step = resolve_checkpoint(folder)
    verify_checkpoint(step, context)
    state = read_state(step)
    quantize = quantize_of(state) if settings.quantize is None else quantize_named(settings.quantize)
    _check_grid(model_from_dict(state.model), context, quantize)
    stage = load_stage(step, context, settings.dtype, settings.layers_per_stage, settings.base, quantize)
    stored = step / TOKENIZER
    tokenizer = load_tokenizer(stored) if stored.is_dir() else None
    chat = ChatTemplate(state.chat["template"], state.chat["chat_template"]) if state.chat is not None else None
    model = _read_only(stage, context, settings)
    head = HeadForm.of(state.head) if state.head is not None else None
    return Loaded(step, model, tokenizer, chat, _end_ids(tokenizer, state), head)


def _from_huggingface(folder: Path, context: ParallelContext, settings: Settings) -> Loaded:
    if settings.base is not None:
        raise CheckpointError(f"--base belongs to adapters, and {folder} is a whole model: leave it out.")
    quantize = NOT_QUANTIZED if settings.quantize is None else quantize_named(settings.quantize)
    _check_grid(huggingface_model(folder), context, quantize)
    stage = load_huggingface_stage(folder, context, settings.dtype, settings.layers_per_stage, quantize)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    chat = load_template(OWN, tokenizer) if tokenizer is not None and brings_template(tokenizer) else None
    ends = {*_listed_ends(folder), *([tokenizer.eod_id] if tokenizer and tokenizer.eod_id is not None else [])}
    model = _read_only(stage, context, settings)
    return Loaded(folder, model, tokenizer, chat, frozenset(ends))


def _read_only(stage: Transformer, context: ParallelContext, settings: Settings) -> InferenceModel:
    pack_weights(stage)
    return InferenceModel([stage.eval()], context, settings.dtype)


def _check_grid(model: ModelConfig, context: ParallelContext, quantize: QuantizeConfig) -> None:
    faults = cut_faults(model, ParallelConfig(tensor=context.tp.size, pipeline=context.pp.size))
    faults += nf4_faults(model, context.tp.size, quantize)
    if faults:
        raise ConfigError(faults)


def _end_ids(tokenizer: Tokenizer | None, state: CheckpointState) -> frozenset[int]:
    """The end of a turn where the model was trained on such, and the end of a document."""
    ends = [tokenizer.eod_id if tokenizer is not None else None, state.chat["turn_end_id"] if state.chat else None]
    return frozenset(end for end in ends if end is not None)


def _listed_ends(folder: Path) -> list[int]:
    """What ``generation_config.json``, or else ``config.json``, says ends a text."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        settings: dict[str, Any] = read_settings(path, "generation") if path.is_file() else {}
        ends = settings.get("eos_token_id")
        if ends is not None:
            return [int(end) for end in (ends if isinstance(ends, list) else [ends])]
    return []
