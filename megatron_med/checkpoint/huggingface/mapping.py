"""The names and layouts of each family in Hugging Face's files: one table, used in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_med.config import ModelConfig
from megatron_med.model.build import build_stage
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import ParameterLayout, parameters_with_layout
from megatron_med.parallel.random import generator_of


@dataclass(frozen=True)
class Entry:
    """One canonical tensor and the Hugging Face tensors it is made of.

    Attributes:
        name: canonical name; ``{i}`` is the layer.
        hf_names: Hugging Face's names. Several of them hold one named part of the layout each.
        parts: named parts of the layout in the order in which Hugging Face's rows come.
        transposed: Hugging Face keeps ``[in, out]`` (GPT-2's Conv1D).
        vocabulary: rows beyond the true vocabulary are padding and never leave.
    """

    name: str
    hf_names: tuple[str, ...]
    parts: tuple[str, ...] = ()
    transposed: bool = False
    vocabulary: bool = False


NEW_ROW_NOISE = 0.01
"""Noise of new vocabulary rows, in standard deviations of the old ones."""

_COLUMNS = 256
"""Columns whose mean and deviation are computed at once: fp32 copies of them are held."""

IGNORED = {
    "llama": re.compile(r".*\.rotary_emb\.inv_freq"),
    "gpt2": re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
}
"""Tensors of each family that are constants of its code: frequencies and masks."""

_LLAMA_LAYER = "model.layers.{i}."
_GPT2_LAYER = "transformer.h.{i}."

TABLES: dict[str, tuple[Entry, ...]] = {
    "llama": (
        Entry("embedding.word.weight", ("model.embed_tokens.weight",), vocabulary=True),
        Entry("layers.{i}.attention_norm.weight", (_LLAMA_LAYER + "input_layernorm.weight",)),
        Entry(
            "layers.{i}.attention.qkv.weight",
            tuple(_LLAMA_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
            parts=("q", "k", "v"),
        ),
        Entry("layers.{i}.attention.output.weight", (_LLAMA_LAYER + "self_attn.o_proj.weight",)),
        Entry("layers.{i}.mlp_norm.weight", (_LLAMA_LAYER + "post_attention_layernorm.weight",)),
        Entry(
            "layers.{i}.mlp.gate_up.weight",
            (_LLAMA_LAYER + "mlp.gate_proj.weight", _LLAMA_LAYER + "mlp.up_proj.weight"),
            parts=("gate", "up"),
        ),
        Entry("layers.{i}.mlp.down.weight", (_LLAMA_LAYER + "mlp.down_proj.weight",)),
        Entry("final_norm.weight", ("model.norm.weight",)),
        Entry("head.weight", ("lm_head.weight",), vocabulary=True),
        Entry("score.weight", ("score.weight",)),
    ),
    "gpt2": (
        Entry("embedding.word.weight", ("transformer.wte.weight",), vocabulary=True),
        Entry("embedding.position.weight", ("transformer.wpe.weight",)),
        Entry("layers.{i}.attention_norm.weight", (_GPT2_LAYER + "ln_1.weight",)),
        Entry("layers.{i}.attention_norm.bias", (_GPT2_LAYER + "ln_1.bias",)),
        Entry(
            "layers.{i}.attention.qkv.weight",
            (_GPT2_LAYER + "attn.c_attn.weight",),
            parts=("q", "k", "v"),
            transposed=True,
        ),
        Entry("layers.{i}.attention.qkv.bias", (_GPT2_LAYER + "attn.c_attn.bias",), parts=("q", "k", "v")),
        Entry("layers.{i}.attention.output.weight", (_GPT2_LAYER + "attn.c_proj.weight",), transposed=True),
        Entry("layers.{i}.attention.output.bias", (_GPT2_LAYER + "attn.c_proj.bias",)),
        Entry("layers.{i}.mlp_norm.weight", (_GPT2_LAYER + "ln_2.weight",)),
        Entry("layers.{i}.mlp_norm.bias", (_GPT2_LAYER + "ln_2.bias",)),
        Entry("layers.{i}.mlp.up.weight", (_GPT2_LAYER + "mlp.c_fc.weight",), transposed=True),
        Entry("layers.{i}.mlp.up.bias", (_GPT2_LAYER + "mlp.c_fc.bias",)),
        Entry("layers.{i}.mlp.down.weight", (_GPT2_LAYER + "mlp.c_proj.weight",), transposed=True),
        Entry("layers.{i}.mlp.down.bias", (_GPT2_LAYER + "mlp.c_proj.bias",)),
        Entry("final_norm.weight", ("transformer.ln_f.weight",)),
        Entry("final_norm.bias", ("transformer.ln_f.bias",)),
        Entry("head.weight", ("lm_head.weight",), vocabulary=True),
        Entry("score.weight", ("score.weight",)),
    ),
}


@dataclass(frozen=True)
class TensorMap:
    """An entry of one layer, with the layout of our tensor."""

    layout: ParameterLayout
    hf_names: tuple[str, ...]
    entry: Entry
    vocab_size: int

    def to_canonical(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """Reads Hugging Face tensors, one after the other, and makes the canonical one."""
        if not (self.hf_names[1:] or self.entry.parts or self.entry.transposed or self.entry.vocabulary):
            return read(self.hf_names[0]).view(self.layout.global_shape).to(dtype)
        canonical = torch.empty(self.layout.global_shape, dtype=dtype)
        rows = canonical.flatten(0, -2) if canonical.dim() > 2 else canonical
        order = self._order() if self.entry.parts else None
        end = 0
        for name in self.hf_names:
            piece = read(name).t() if self.entry.transposed else read(name)
            begin, end = end, end + len(piece)
            if order is None:
                rows[begin:end] = piece
            else:
                rows.index_copy_(0, order[begin:end], piece.to(dtype))
        if self.entry.vocabulary:
            if end < self.vocab_size:
                rows[end : self.vocab_size] = new_rows(rows[:end], self.vocab_size - end, self.entry.name)
            rows[self.vocab_size :] = 0
        return canonical

    def hf_shapes(self, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes that Hugging Face's tensors have, by name.

        Args:
            vocab_size: rows of their vocabulary.
        """
        shape = self.layout.global_shape
        width, count = shape[-1:] if len(shape) > 1 else (), math.prod(shape[:-1] or shape)
        shapes = [(rows, *width) for rows in ([vocab_size] if self.entry.vocabulary else self._hf_rows(count))]
        return {
            name: shape[::-1] if self.entry.transposed else shape
            for name, shape in zip(self.hf_names, shapes, strict=True)
        }

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Cuts the canonical tensor into Hugging Face's."""
        rows = tensor
        if self.entry.parts:
            rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
            rows = rows.index_select(0, self._order())
        if self.entry.vocabulary:
            rows = rows[: self.vocab_size]
        pieces = zip(self.hf_names, rows.split(self._hf_rows(rows.shape[0])), strict=True)
        return {name: (piece.t() if self.entry.transposed else piece).contiguous() for name, piece in pieces}

    def _hf_rows(self, count: int) -> list[int]:
        """Rows of each of Hugging Face's tensors, ``count`` in all."""
        if len(self.hf_names) == 1:
            return [count]
        return [len(self.layout.parts[part]) for part in self.entry.parts]

    def _order(self) -> Tensor:
        """Our rows in the order in which Hugging Face's come."""
        return torch.cat([self.layout.parts[part] for part in self.entry.parts])


def new_rows(rows: Tensor, count: int, name: str) -> Tensor:
    """Rows ``[count, hidden]`` for tokens that a pretrained model has not seen.

    Each is the mean of the old rows and a hundredth of their standard deviation, column by column, as seeded noise
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"): a new token begins as an average
    word, and no two are the same. The padding below the vocabulary is made elsewhere and stays zero.
    """
    noise = torch.randn(count, rows.shape[1], generator=generator_of("new vocabulary rows", name))
    new = rows.new_empty(count, rows.shape[1])
    for columns in torch.arange(rows.shape[1]).split(_COLUMNS):
        first, last = int(columns[0]), int(columns[-1]) + 1
        old = rows[:, first:last].float()
        new[:, first:last] = old.mean(0) + NEW_ROW_NOISE * old.std(0) * noise[:, first:last]
    return new


def tensor_maps(config: ModelConfig) -> Iterator[TensorMap]:
    """Every canonical tensor of a model with its Hugging Face tensors, in the order of the layers."""
    stage = build_stage(config, single_process_context(torch.device("meta")), torch.float32)
    layouts = {layout.name: layout for layout, _ in parameters_with_layout(stage)}
    table = TABLES[config.family]
    layered = [entry for entry in table if "{i}" in entry.name]
    once = [entry for entry in table if "{i}" not in entry.name and entry.name in layouts]
    for entry in once:
        yield TensorMap(layouts[entry.name], entry.hf_names, entry, config.vocab_size)
    for layer in range(config.num_layers):
        for entry in layered:
            layout = layouts[entry.name.format(i=layer)]
            yield TensorMap(layout, tuple(name.format(i=layer) for name in entry.hf_names), entry, config.vocab_size)
