"""Generates token by token with a key/value cache, on every rank of a TP x PP grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_med.checkpoint.adapter import quantize_of
from megatron_med.checkpoint.folder import TOKENIZER, read_state, resolve_checkpoint
from megatron_med.checkpoint.load import load_stage, verify_checkpoint
from megatron_med.config import ParallelConfig, model_from_dict
from megatron_med.config.quantize import nf4_faults, quantize_named
from megatron_med.config.validate import cut_faults
from megatron_med.errors import CheckpointError, ConfigError
from megatron_med.generate.sampling import Sampling, next_token
from megatron_med.model.batch import plain_batch
from megatron_med.model.cache import KeyValueCache
from megatron_med.parallel.collectives import broadcast, gather_last_dim
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.pipeline_parallel.p2p import PipelineLink
from megatron_med.parallel.random import generator_of
from megatron_med.tokenizer import Tokenizer, load_tokenizer

_NOT_FINITE = -1
"""Instead of an id, to all stages."""


class Generator:
    """A model loaded for generation.

    Args:
        checkpoint: RUN, RUN/checkpoints or one step.
        context: the grid, without sequence parallelism; all its ranks call the same methods.
        dtype: of the arithmetic.
        layers_per_stage: layers of each stage; None splits them by cost.
        base: of adapters, where it is no longer where they were trained.
        quantize: what the matrices are quantised to: int8, nf4 or none. None: what they were while adapters were
            trained.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        context: ParallelContext,
        dtype: torch.dtype,
        layers_per_stage: list[int] | None = None,
        base: str | Path | None = None,
        quantize: str | None = None,
    ) -> None:
        assert not context.sequence_parallel, "single tokens cannot be cut along the sequence"
        step = resolve_checkpoint(checkpoint)
        verify_checkpoint(step, context)
        self._step = step
        state = read_state(step)
        self.config = model_from_dict(state.model)
        format_ = quantize_of(state) if quantize is None else quantize_named(quantize)
        faults = cut_faults(self.config, ParallelConfig(tensor=context.tp.size, pipeline=context.pp.size))
        faults += nf4_faults(self.config, context.tp.size, format_)
        if faults:
            raise ConfigError(faults)
        self._context = context
        self._stage = load_stage(step, context, dtype, layers_per_stage, base, format_).eval()
        self._link = PipelineLink(context, dtype)
        stored = step / TOKENIZER
        self.tokenizer: Tokenizer | None = load_tokenizer(stored) if stored.is_dir() else None
        end = self.tokenizer.eod_id if self.tokenizer is not None else None
        self.stop_id: int | None = state.chat["turn_end_id"] if state.chat is not None else end

    @torch.no_grad()
    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int = 0, stop_id: int | None = None
    ) -> Iterator[int]:
        """New ids one by one, equal on every rank.

        Raises:
            CheckpointError: prompt and new tokens do not fit into the model's context, or its weights are broken.
        """
        limit = self.config.max_position_embeddings
        if not prompt or len(prompt) + max_new_tokens > limit:
            raise CheckpointError(
                f"The prompt has {len(prompt)} tokens and {max_new_tokens} new ones are asked for: at least 1 and "
                f"together at most {limit} (max_position_embeddings) fit. Shorten one of them."
            )
        strange = [token for token in prompt if not 0 <= token < self.config.vocab_size]
        if strange:
            raise CheckpointError(
                f"The prompt holds the id {strange[0]}: the model's vocabulary ends at {self.config.vocab_size - 1}."
            )
        generator = generator_of("generate", seed, device=self._context.device)
        cache = KeyValueCache()
        tokens = torch.tensor([list(prompt)], device=self._context.device)
        position = 0
        for _ in range(max_new_tokens):
            logits = self.logits(tokens, position, cache)
            position += tokens.shape[1]
            tokens = self._choose(logits, sampling, generator)
            token = int(tokens.item())
            if token == _NOT_FINITE:
                raise CheckpointError(
                    f"{self._step} gives logits that are not finite: its weights hold NaN or infinity, or the numbers "
                    "overflow in this precision. Choose another checkpoint, or --precision fp32."
                )
            yield token
            if token == stop_id:
                return

    @torch.no_grad()
    def logits(self, tokens: Tensor, position: int = 0, cache: KeyValueCache | None = None) -> Tensor | None:
        """fp32 logits ``[seq, batch, vocabulary]`` of ``[batch, seq]`` tokens; None but on the last stage."""
        batch = plain_batch(tokens, first=position)
        context = self._context
        received = None
        if not context.pp.is_first:
            received = self._link.receive_forward(self._stage.hidden_shape(batch)).wait()
        out = self._stage(received, batch, cache)
        if context.pp.is_last:
            return gather_last_dim(out, context.tp)[..., : self.config.vocab_size].float()
        self._link.send_forward(out)
        self._link.drain()
        return None

    def _choose(self, logits: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """The last stage chooses; all stages hear of it. ``[batch, 1]``; _NOT_FINITE where nothing can be chosen."""
        chosen = torch.zeros(1, 1, dtype=torch.int64, device=self._context.device)
        if logits is not None and not logits[-1].isfinite().all():
            chosen.fill_(_NOT_FINITE)
        elif logits is not None:
            chosen = next_token(logits[-1], sampling, generator).unsqueeze(-1)
        return broadcast(chosen, self._context.pp, self._context.pp.size - 1)
