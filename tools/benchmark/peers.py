"""The same model and the same step in other frameworks, as they are written by their own: forward pass, cross entropy,
backward pass, clipping and torch's fused AdamW. Each is optional; what is not installed is told by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_med.checkpoint.huggingface.config import to_huggingface
from megatron_med.config.schema import ModelConfig
from megatron_med.model.build import DTYPES

Step = Callable[[], float]
NEEDS = {
    "transformers": "transformers",
    "transformers, autocast": "transformers",
    "transformers, compiled": "transformers",
    "litgpt": "litgpt",
    "megatron-core": "megatron",
}
"""Contestant -> the module it needs, in the order of the table."""


def missing(name: str) -> bool:
    """Whether a contestant's framework is not installed."""
    return importlib.util.find_spec(NEEDS[name]) is None


def make_peer(name: str, model: ModelConfig, ids: Tensor, precision: str) -> Step:
    """A training step of a contestant, which gives the loss.

    Args:
        name: of ``NEEDS``.
        model: what it is to build, with random weights.
        ids: ``[batch, seq + 1]`` tokens, on the device.
        precision: of weights and activations; with autocast the weights are fp32.
    """
    if name == "litgpt":
        return _step(*_litgpt(model), ids, DTYPES[precision])
    if name == "megatron-core":
        return _step(*_megatron_core(model, ids), ids, DTYPES[precision])
    autocast = name.endswith("autocast")
    return _step(
        *_transformers(model),
        ids,
        torch.float32 if autocast else DTYPES[precision],
        autocast=DTYPES[precision] if autocast else None,
        compiled=name.endswith("compiled"),
    )


def _step(
    network: nn.Module,
    losses_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ids: Tensor,
    dtype: torch.dtype,
    *,
    autocast: torch.dtype | None = None,
    compiled: bool = False,
) -> Step:
    """``losses_of``: model, tokens and labels ``[batch, seq]`` -> the mean loss."""
    network = network.to(ids.device, dtype).train()
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    forward = torch.compile(losses_of) if compiled else losses_of

    def step() -> float:
        with torch.autocast(ids.device.type, dtype=autocast, enabled=autocast is not None):
            loss = forward(network, tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _transformers(model: ModelConfig) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = to_huggingface(model, "float32", None, None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    network = AutoModelForCausalLM.from_config(config)
    return network, lambda network, tokens, labels: _mean_loss(network(tokens, use_cache=False).logits, labels)


def _litgpt(model: ModelConfig) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    from litgpt import GPT, Config

    llama = model.family == "llama"
    config = Config(
        block_size=model.max_position_embeddings,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        n_embd=model.hidden_size,
        n_query_groups=model.num_query_groups,
        intermediate_size=model.ffn_hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=not llama,
        norm_class_name="RMSNorm" if llama else "LayerNorm",
        mlp_class_name="LLaMAMLP" if llama else "GptNeoxMLP",
        norm_eps=model.norm_eps,
    )
    return GPT(config), lambda network, tokens, labels: _mean_loss(network(tokens), labels)


def _megatron_core(model: ModelConfig, ids: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """Its ``GPTModel`` with its local spec (no Transformer Engine), as one process of a world of one. It asks CUDA for
    its device and its random numbers, which on a CPU and without dropout are none."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    if not dist.is_initialized():
        dist.init_process_group("nccl" if ids.is_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    if ids.is_cuda:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    else:
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
        tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: nullcontext()
    llama = model.family == "llama"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        add_bias_linear=not llama,
        gated_linear_unit=llama,
        activation_func=F.silu if llama else F.gelu,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    network = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization),
        model.vocab_size,
        model.max_position_embeddings,
        position_embedding_type="rope" if llama else "learned_absolute",
        share_embeddings_and_output_weights=bool(model.tie_embeddings),
    )
    positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(ids.shape[0], -1)
    hidden = torch.ones(ids.shape[1] - 1, ids.shape[1] - 1, dtype=torch.bool, device=ids.device).triu(1)[None, None]
    return network, lambda network, tokens, labels: network(tokens, positions, hidden, labels=labels).mean()
