"""Folders whose tensors are not all those of the model that config.json describes: refused by name, never half read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_med.checkpoint.folder import read_state
from megatron_med.checkpoint.huggingface.convert import export_huggingface, import_huggingface
from megatron_med.checkpoint.huggingface.mapping import new_rows
from megatron_med.checkpoint.storage import Reader
from megatron_med.errors import CheckpointError

Tensors = dict[str, Tensor]

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def _change(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refused(folder: Path, *messages: str) -> None:
    target = folder.parent / "checkpoint"
    with pytest.raises(CheckpointError) as caught:
        import_huggingface(folder, target)
    for message in messages:
        assert any(message in fault for fault in caught.value.faults), caught.value.faults
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is stored as I8: quantized weights"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"{Q} is stored as F8_E4M3"),
        (lambda t: t.update({DOWN: t[DOWN].t()}), f"{DOWN} has the shape [64, 32], which does not fit config.json"),
        (lambda t: t.update({DOWN: t[DOWN].t()}), "that makes it [32, 64]. It is transposed."),
        (lambda t: t.update({Q: t[Q][:-1]}), f"{Q} has the shape [31, 32]"),
        (lambda t: t.update({Q + "_scale": torch.ones(1)}), f"also holds {Q}_scale, which a llama model"),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.ones(32)}), "also holds model.layers.1.self_attn.q_pr"),
        (lambda t: t.update({f"base.{Q}.lora_A.weight": torch.ones(2, 2)}), "or an adapter that was not merged"),
        (lambda t: t.pop("lm_head.weight"), "has no tensor lm_head.weight: its config.json promises one"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(folder: Path, change: Callable[[Tensors], Any], message: str) -> None:
    _change(folder, change)
    _refused(folder, message)


def test_a_model_that_is_named_llama_is_refused(tmp_path: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(tmp_path / "hf")
    _configure(tmp_path / "hf", model_type="llama")
    _refused(tmp_path / "hf", "self_attn.k_proj.bias", "it is another model than its model_type says")


def test_a_tied_head_must_be_the_embedding(folder: Path) -> None:
    _configure(folder, tie_word_embeddings=True)
    _refused(folder, "ties the head to the embedding (tie_word_embeddings), but lm_head.weight is not model.embed_tok")
    _change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    step = import_huggingface(folder, folder.parent / "checkpoint")
    assert "head.weight" not in Reader(step).shapes()


def test_constants_of_the_code_are_known(folder: Path, tmp_path: Path) -> None:
    _change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    import_huggingface(folder, tmp_path / "checkpoint")
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 1024, 1024).tril().to(torch.uint8)
    _change(tmp_path / "gpt2", lambda t: t.update({"h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.ones(())}))
    import_huggingface(tmp_path / "gpt2", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config (method bitsandbytes)"),
        ({"num_hidden_layers": "2"}, "num_layers of the model is '2'"),
        ({"num_attention_heads": 0}, "num_attention_heads of the model is 0"),
        ({"hidden_size": -32}, "hidden_size of the model is -32"),
        ({"rope_parameters": 3}, "config.json has a value of another kind"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    _configure(folder, **changes)
    _refused(folder, message)


def test_files_that_are_no_part_of_the_model_are_named(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    _refused(folder, "holds an adapter (adapter_config.json)")
    (folder / "adapter_config.json").unlink()
    save_file({"x": torch.ones(1)}, folder / "extra.safetensors")
    _refused(folder, "also holds extra.safetensors, which is no part of the model in model.safetensors")
    (folder / "extra.safetensors").rename(folder / "consolidated.00.safetensors")
    import_huggingface(folder, folder.parent / "checkpoint")
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no settings of a model"):
        import_huggingface(folder, folder.parent / "again")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "{}"])
def test_an_index_that_cannot_be_read_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    _refused(folder, "model.safetensors.index.json ")


def test_a_tensor_in_two_files_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({Q: tensors[Q]}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {Q: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _refused(folder, f"{Q} stands in {folder}/a.safetensors and in {folder}/b.safetensors")


def test_parts_of_other_types_are_not_rounded(folder: Path, tmp_path: Path) -> None:
    k = Q.replace("q_proj", "k_proj")
    _change(folder, lambda t: t.update({Q: t[Q].bfloat16()}))
    step = import_huggingface(folder, tmp_path / "checkpoint")
    export_huggingface(step, tmp_path / "back", dtype="fp32")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(before[k], after[k])
    assert torch.equal(before[Q].float(), after[Q])
    assert read_state(step).run["precision"] == "fp32"


def test_exported_files_obey_the_umask_and_tell_the_longest_sequence(tmp_path: Path, sample_tokenizer: Path) -> None:
    folder = tmp_path / "hf"
    LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 512})).save_pretrained(folder)
    shutil.copy(sample_tokenizer / "tokenizer.json", folder)
    (folder / "tokenizer.json").chmod(0o400)
    import_huggingface(folder, tmp_path / "checkpoint")
    before = os.umask(0o027)
    try:
        export_huggingface(tmp_path / "checkpoint", tmp_path / "back")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "back").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert {"model.safetensors", "tokenizer.json"} < modes.keys()
    described = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert described["model_max_length"] == LlamaConfig(**SHAPE).max_position_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "back").model_max_length == described["model_max_length"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_those_of_the_whole_matrix(dtype: torch.dtype) -> None:
    """They are computed a few columns at a time, and are bitwise what they were."""
    from megatron_med.checkpoint.huggingface.mapping import NEW_ROW_NOISE
    from megatron_med.parallel.random import generator_of

    rows = torch.randn(30_011, 1100, generator=torch.Generator().manual_seed(1)).to(dtype)
    noise = torch.randn(7, 1100, generator=generator_of("new vocabulary rows", "x"))
    whole = rows.float()
    expected = (whole.mean(0) + NEW_ROW_NOISE * whole.std(0) * noise).to(dtype)
    assert torch.equal(new_rows(rows, 7, "x"), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": None}, "norm_eps of the model is None: a number is needed"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps of the model is '1e-5': a number is needed"),
        ({"rms_norm_eps": -1}, "norm_eps is -1"),
        ({"rope_theta": -5.0, "rope_parameters": None}, "rope_theta is -5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"num_key_value_heads": True}, "num_query_groups of the model is True"),
        ({"num_hidden_layers": 10**9}, "num_layers of the model is 1000000000"),
        ({"quantization_config": "awq"}, "quantization_config (method awq)"),
    ],
)
def test_settings_that_make_another_model(folder: Path, changes: dict[str, Any], message: str) -> None:
    _configure(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        import_huggingface(folder, folder.parent / "ckpt")
    assert message in str(caught.value)
    assert not (folder.parent / "ckpt").exists()


def test_a_config_that_is_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        import_huggingface(folder, folder.parent / "ckpt")
