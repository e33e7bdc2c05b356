"""Which matrices of each family LoRA can adapt, by the field's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_med.config.schema import LANGUAGE_MODEL, Config, LoRAConfig, ModelConfig


@dataclass(frozen=True)
class LoRATarget:
    """One matrix that gets an A and a B of its own.

    Attributes:
        name: last word of Hugging Face's name.
        module: Hugging Face's name within a layer.
        linear: the linear of ours that holds it, within a layer.
        part: which of the linear's named parts it is; None: all of it.
    """

    name: str
    module: str
    linear: str
    part: str | None = None

    def shape(self, model: ModelConfig) -> tuple[int, int]:
        """``(out, in)`` of the matrix."""
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        if self.linear == "attention.qkv":
            return {"q": queries, "k": keys, "v": keys, None: queries + 2 * keys}[self.part], hidden
        if self.linear == "attention.output":
            return hidden, queries
        return (hidden, ffn) if self.linear == "mlp.down" else (ffn, hidden)


LORA_TARGETS: dict[str, tuple[LoRATarget, ...]] = {
    "llama": (
        *(LoRATarget(f"{part}_proj", f"self_attn.{part}_proj", "attention.qkv", part) for part in "qkv"),
        LoRATarget("o_proj", "self_attn.o_proj", "attention.output"),
        LoRATarget("gate_proj", "mlp.gate_proj", "mlp.gate_up", "gate"),
        LoRATarget("up_proj", "mlp.up_proj", "mlp.gate_up", "up"),
        LoRATarget("down_proj", "mlp.down_proj", "mlp.down"),
    ),
    "gpt2": (
        LoRATarget("c_attn", "attn.c_attn", "attention.qkv"),
        LoRATarget("c_proj", "attn.c_proj", "attention.output"),
        LoRATarget("c_fc", "mlp.c_fc", "mlp.up"),
        LoRATarget("c_proj", "mlp.c_proj", "mlp.down"),
    ),
}
"""Of each family, in the order of a layer. GPT-2 has two of the name c_proj, as in PEFT both are meant; attn.c_proj is
one of them."""

DEFAULT_TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
"""PEFT's."""


def targets_of(model: ModelConfig, lora: LoRAConfig) -> list[LoRATarget]:
    """The targets of one layer."""
    asked = lora.targets or DEFAULT_TARGETS[model.family]
    return [target for target in LORA_TARGETS[model.family] if {target.name, target.module}.intersection(asked)]


def trained_by_lora(model: ModelConfig, lora: LoRAConfig) -> int:
    """Parameters of all adapters."""
    shapes = [target.shape(model) for target in targets_of(model, lora)]
    return model.num_layers * lora.rank * sum(out + width for out, width in shapes)


def lora_faults(config: Config) -> Iterator[str]:
    """Settings of adapters that cannot be meant."""
    lora, model = config.lora, config.model
    if lora.rank <= 0:
        given = [field.name for field in fields(lora)[1:] if getattr(lora, field.name) != field.default]
        if lora.rank < 0:
            yield f"lora.rank is {lora.rank}: it must be at least 1, or 0 for no adapters."
        elif given:
            yield (
                f"lora.rank is {lora.rank}, and lora.{given[0]} is given: without a rank of at least 1 there are no "
                "adapters. Set lora.rank, or leave the section out."
            )
        return
    if model.head != LANGUAGE_MODEL:
        yield (
            f"lora.rank is {lora.rank}, and model.head {model.head}: a head is trained with all weights. Leave one out."
        )
    yield from _lora_numbers(lora)
    known = {name for target in LORA_TARGETS[model.family] for name in (target.name, target.module)}
    unknown = [name for name in lora.targets or [] if name not in known]
    if lora.targets == [] or unknown:
        yield (
            f"lora.targets is {lora.targets}: {f'{unknown[0]} is' if unknown else 'it names'} no matrix of a "
            f"{model.family} model. There are: {', '.join(_shown_targets(model))}."
        )
        return
    for target in targets_of(model, lora):
        out, width = target.shape(model)
        if lora.rank > min(out, width):
            yield (
                f"lora.rank is {lora.rank}: {target.name} is a {out} x {width} matrix, whose rank is at most "
                f"{min(out, width)}. Lower lora.rank, or leave {target.name} out of lora.targets."
            )
    if config.checkpoint.load is None and lora.base is None:
        yield (
            "lora.rank is set, but there is no base: adapters stand beside the weights of a pretrained model. Name its "
            "checkpoint with checkpoint.load."
        )


def _shown_targets(model: ModelConfig) -> list[str]:
    names = [target.name for target in LORA_TARGETS[model.family]]
    twice = [target.module for target in LORA_TARGETS[model.family] if names.count(target.name) > 1]
    return list(dict.fromkeys([*names, *twice]))


def _lora_numbers(lora: LoRAConfig) -> Iterator[str]:
    for name, value in (("alpha", lora.alpha), ("lr_scale_b", lora.lr_scale_b)):
        if not 0 < value <= 1e30:
            yield f"lora.{name} is {value}: it must be a number above 0, and at most 1e30."
    if not 0 <= lora.dropout < 1:
        yield f"lora.dropout is {lora.dropout}: a probability from 0 up to, not including, 1 is needed."
    names = lora.targets or []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        yield f"lora.targets names {twice} twice: leave one out."
