"""The names and layouts of each family in Hugging Face's files: one table, used in both directions."""

from __future__ import annotations

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
    ),
}


@dataclass(frozen=True)
class TensorMap:
    """An entry of one layer, with the layout of our tensor."""

    layout: ParameterLayout
    hf_names: tuple[str, ...]
    entry: Entry
    vocab_size: int

    def to_canonical(self, read: Callable[[str], Tensor]) -> Tensor:
        """Reads Hugging Face tensors and makes the canonical one."""
        pieces = [read(name) for name in self.hf_names]
        rows = torch.cat([piece.t() if self.entry.transposed else piece for piece in pieces])
        if self.entry.vocabulary:
            rows = torch.cat([rows, new_rows(rows, self.vocab_size - rows.shape[0], self.entry.name)])
            rows = torch.cat([rows, rows.new_zeros(self.layout.global_shape[0] - rows.shape[0], *rows.shape[1:])])
        if self.entry.parts:
            rows = torch.empty_like(rows).index_copy_(0, self._order(), rows)
        return rows.reshape(self.layout.global_shape).contiguous()

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Cuts the canonical tensor into Hugging Face's."""
        rows = tensor
        if self.entry.parts:
            rows = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor
            rows = rows.index_select(0, self._order())
        if self.entry.vocabulary:
            rows = rows[: self.vocab_size]
        sizes = [rows.shape[0]]
        if len(self.hf_names) > 1:
            sizes = [len(self.layout.parts[part]) for part in self.entry.parts]
        pieces = zip(self.hf_names, rows.split(sizes), strict=True)
        return {name: (piece.t() if self.entry.transposed else piece).contiguous() for name, piece in pieces}

    def _order(self) -> Tensor:
        """Our rows in the order in which Hugging Face's come."""
        return torch.cat([self.layout.parts[part] for part in self.entry.parts])


def new_rows(rows: Tensor, count: int, name: str) -> Tensor:
    """Rows ``[count, hidden]`` for tokens that a pretrained model has not seen.

    Each is the mean of the old rows and a hundredth of their standard deviation, column by column, as seeded noise
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"): a new token begins as an average
    word, and no two are the same. The padding below the vocabulary is made elsewhere and stays zero.
    """
    old = rows.float()
    noise = torch.randn(count, rows.shape[1], generator=generator_of("new vocabulary rows", name))
    return (old.mean(0) + NEW_ROW_NOISE * old.std(0) * noise).to(rows.dtype)


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
