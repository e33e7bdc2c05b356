"""A real trained Llama (5 layers, grouped queries 8/4, tied embeddings) against its stored reference outputs.

The weights come in llama2.c's format, whose rotary pairs are neighbours; Hugging Face's (and ours) are halves.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_med.checkpoint.huggingface.convert import export_huggingface, import_huggingface
from megatron_med.config import ParallelConfig
from megatron_med.inference.engine import Engine
from megatron_med.inference.load import Settings, load_model
from megatron_med.inference.request import Request
from megatron_med.parallel.context import create_context, single_process_context
from tests.ranks import run_ranks

TOLERANCE = 1e-4


def _huggingface_folder(source: Path, target: Path) -> Path:
    """The llama2.c file as a Hugging Face folder."""
    raw = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack("7i", raw[:28])
    flat, position = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        size = int(np.prod(shape))
        tensor = torch.from_numpy(flat[position : position + size].copy()).view(*shape)
        position += size
        return tensor

    head = dim // heads
    kv = kv_heads * head
    embedding = take(vocab, dim)
    names = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    shapes = [(dim,), (dim, dim), (kv, dim), (kv, dim), (dim, dim), (dim,), (hidden, dim), (dim, hidden), (hidden, dim)]
    tensors = {"model.embed_tokens.weight": embedding}
    for name, shape in zip(names, shapes, strict=True):
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = weight.view(-1, head // 2, 2, dim).transpose(1, 2).reshape(shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.contiguous()
    tensors["model.norm.weight"] = take(dim)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": seq,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Hugging Face folder, checkpoint and reference outputs."""
    folder = shared / "checkpoints" / "stories260K"
    work = tmp_path_factory.mktemp("stories")
    huggingface = _huggingface_folder(folder / "stories260K.bin", work / "hf")
    checkpoint = work / "checkpoint"
    import_huggingface(huggingface, checkpoint, verify=True)
    return huggingface, checkpoint, json.loads((folder / "reference_greedy.json").read_text())


def _generate_on_rank(checkpoint: Path, tensor: int, pipeline: int, layers: list[int] | None, tokens: list[int]) -> Any:
    if tensor * pipeline == 1:
        context = single_process_context()
    else:
        config = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence_parallel=False)
        context = create_context(config, torch.device("cpu"))
    model = load_model(checkpoint, context, Settings(layers_per_stage=layers)).model
    (answer,) = Engine(model).answers([Request(tokens[:1], len(tokens) - 1)])
    logits = model.all_logits(tokens[:8])
    return answer.tokens, None if logits is None else logits.numpy()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "layers"),
    [(1, 1, None), (2, 1, None), (4, 1, None), (1, 2, [3, 2]), (2, 2, [1, 4])],
)
def test_logits_and_greedy_text_equal_the_reference(
    stories: tuple[Path, Path, dict[str, Any]], tensor: int, pipeline: int, layers: list[int] | None
) -> None:
    _, checkpoint, reference = stories
    tokens = reference["tokens"]
    assert len(tokens) == 200
    results = run_ranks(tensor * pipeline, _generate_on_rank, checkpoint, tensor, pipeline, layers, tokens)
    logits = [logits for _, logits in results if logits is not None]
    assert len(logits) == tensor, "every tensor-parallel rank of the last stage has the logits"
    expected = np.array(reference["logits_first8"])
    for greedy, _ in results:
        assert greedy == tokens[1:]
    for actual in logits:
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


def test_exported_folder_gives_the_reference_in_transformers(
    stories: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    huggingface, checkpoint, reference = stories
    export_huggingface(checkpoint, tmp_path / "hf", verify=True)
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size == (huggingface / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.tensor([reference["tokens"]])
    with torch.no_grad():
        logits = model(tokens).logits[0]
    np.testing.assert_allclose(logits[:8].numpy(), np.array(reference["logits_first8"]), atol=TOLERANCE)
    assert logits[:-1].argmax(-1).tolist() == reference["tokens"][1:]
