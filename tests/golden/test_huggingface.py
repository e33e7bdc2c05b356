"""Models made by transformers: import, equal logits, export, bitwise equal weights; tokenizers survive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from megatron_med.checkpoint.folder import read_state, resolve_checkpoint
from megatron_med.checkpoint.huggingface.convert import export_huggingface, import_huggingface
from megatron_med.checkpoint.huggingface.files import open_tensors
from megatron_med.checkpoint.huggingface.peft import export_adapter, import_adapter
from megatron_med.checkpoint.huggingface.verify import checkpoint_logits, logits_of
from megatron_med.checkpoint.load import load_stage, load_weights
from megatron_med.config import ParallelConfig, model_from_dict
from megatron_med.errors import CheckpointError, TargetExistsError
from megatron_med.model.batch import plain_batch
from megatron_med.model.build import build_stage
from megatron_med.model.flops import parameter_count
from megatron_med.parallel.collectives import gather_last_dim
from megatron_med.parallel.context import create_context, single_process_context
from megatron_med.tokenizer import load_tokenizer
from tests.ranks import run_ranks

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MODELS: dict[str, Any] = {
    "llama-groups": LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
    ),
    "llama-tied-theta": LlamaConfig(
        vocab_size=515,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama3-scaling": LlamaConfig(
        vocab_size=640,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "llama-linear-scaling-wide-heads": LlamaConfig(
        vocab_size=640,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "gpt2": GPT2Config(vocab_size=997, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0),
    "gpt2-inner-untied": GPT2Config(
        vocab_size=640,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_inner=100,
        n_positions=128,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def _make(name: str, folder: Path) -> Any:
    torch.manual_seed(sum(map(ord, name)))
    config = MODELS[name]
    model = (LlamaForCausalLM if isinstance(config, LlamaConfig) else GPT2LMHeadModel)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases would else be constant
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_import_logits_export_round_trip(name: str, tmp_path: Path) -> None:
    model = _make(name, tmp_path / "hf")
    step = import_huggingface(tmp_path / "hf", tmp_path / "checkpoint", verify=True)
    config = model_from_dict(read_state(step).model)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    np.testing.assert_allclose(checkpoint_logits(step, ids).numpy(), expected.numpy(), atol=1e-4)

    export_huggingface(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def _logits_on_rank(step: Path, ids: torch.Tensor, tensor: int) -> np.ndarray:
    context = create_context(ParallelConfig(tensor=tensor), torch.device("cpu"))
    config = model_from_dict(read_state(step).model)
    stage = build_stage(config, context, torch.float32).eval()
    load_weights(step, stage, context)
    with torch.no_grad():
        logits = stage(None, plain_batch(ids))
    return gather_last_dim(logits, context.tp)[..., : config.vocab_size].transpose(0, 1).numpy()


@pytest.mark.parametrize("name", ["llama-groups", "gpt2"])
def test_imported_model_gives_equal_logits_with_sequence_parallelism(name: str, tmp_path: Path) -> None:
    model = _make(name, tmp_path / "hf")
    step = import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    ids = torch.randint(900, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    for logits in run_ranks(2, _logits_on_rank, step, ids, 2):
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_sharded_bf16_folder_survives_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make("llama-groups", tmp_path / "plain")
    LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "hf", max_shard_size="100KB"
    )
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint", verify=True)
    monkeypatch.setattr("megatron_med.checkpoint.huggingface.files.SHARD_BYTES", 100_000)
    export_huggingface(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    before, after = open_tensors(tmp_path / "hf"), open_tensors(tmp_path / "back")
    for name in before.names():
        assert after.read(name).dtype == torch.bfloat16
        assert torch.equal(before.read(name), after.read(name)), name


def test_verification_refuses_wrong_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make("llama-groups", tmp_path / "hf")
    import megatron_med.checkpoint.huggingface.mapping as mapping

    broken = tuple(
        entry if "gate_up" not in entry.name else mapping.Entry(entry.name, entry.hf_names, ("up", "gate"))
        for entry in mapping.TABLES["llama"]
    )
    monkeypatch.setitem(mapping.TABLES, "llama", broken)
    with pytest.raises(CheckpointError, match="logits differ"):
        import_huggingface(tmp_path / "hf", tmp_path / "checkpoint", verify=True)
    assert not (tmp_path / "checkpoint" / "latest").exists()


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    _make("gpt2", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        import_huggingface(tmp_path / "nothing", tmp_path / "checkpoint")
    for change, message in (
        ({"model_type": "bert"}, "model_type is bert"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"vocab_size": 998}, "vocab_size of 998"),
        ({"n_inner": 128}, "does not fit config.json"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "n_head"}))
    with pytest.raises(CheckpointError, match="no 'n_head'"):
        import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")


def test_targets_are_not_overwritten(tmp_path: Path) -> None:
    _make("gpt2", tmp_path / "hf")
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(TargetExistsError, match="--overwrite"):
        import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    import_huggingface(tmp_path / "hf", tmp_path / "checkpoint", overwrite=True)
    with pytest.raises(TargetExistsError, match="--overwrite"):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "hf")
    with pytest.raises(TargetExistsError, match="no tool of ours has written it"):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "hf", overwrite=True)
    for _ in range(2):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "again", overwrite=True)
    assert resolve_checkpoint(tmp_path / "checkpoint").name == "step-00000000"


def _golden(shared: Path) -> list[dict[str, Any]]:
    lines = (shared / "tokenizers" / "golden_ids_sample.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize(("kind", "vocab_size"), [("llama2", 32000), ("gpt2", 50257)])
def test_real_tokenizers_survive_the_round_trip(shared: Path, tmp_path: Path, kind: str, vocab_size: int) -> None:
    source = tmp_path / "hf"
    if kind == "llama2":
        config: Any = LlamaConfig(
            vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(source)
        shutil.copy(shared / "tokenizers" / "llama2_tokenizer.model", source / "tokenizer.model")
    else:
        GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2)).save_pretrained(source)
        shutil.copy(shared / "tokenizers" / "gpt2_encoder.json", source / "vocab.json")
        shutil.copy(shared / "tokenizers" / "gpt2_vocab.bpe", source / "merges.txt")
    import_huggingface(source, tmp_path / "checkpoint", verify=True)
    export_huggingface(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    tokenizer = load_tokenizer(tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    for record in _golden(shared):
        assert tokenizer.encode(record["text"]) == record[kind], record["id"]
        if not record["id"].startswith("edge"):
            assert theirs.encode(record["text"], add_special_tokens=False) == record[kind], record["id"]


def test_tokenizer_of_another_vocabulary_is_refused(shared: Path, tmp_path: Path) -> None:
    _make("gpt2", tmp_path / "hf")
    with pytest.raises(CheckpointError, match="32000 pieces, the model 997"):
        import_huggingface(
            tmp_path / "hf",
            tmp_path / "checkpoint",
            tokenizer=str(shared / "tokenizers" / "llama2_tokenizer.model"),
        )


def test_hub_spelling_without_prefix_is_found(tmp_path: Path) -> None:
    model = _make("gpt2", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    step = import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    ids = torch.randint(900, (1, 20))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    np.testing.assert_allclose(checkpoint_logits(step, ids).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-tied-theta", {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True}),
        ("llama-groups", {"target_modules": r".*self_attn\.[qo]_proj"}),
        ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    ],
)
def test_adapters_of_peft_there_and_back(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = _make(name, tmp_path / "hf")
    base = import_huggingface(tmp_path / "hf", tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "peft")
    step = import_adapter(tmp_path / "peft", tmp_path / "adapter", base)
    ids = torch.randint(500, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
    stage = load_stage(step, single_process_context(), torch.float32)
    assert (logits_of(stage, ids) - expected).abs().max() < 1e-5
    export_adapter(step, tmp_path / "again")
    for file in ("peft", "again"):
        assert (tmp_path / file / "adapter_model.safetensors").exists()
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "again")(input_ids=ids).logits
    assert (theirs - expected).abs().max() < 1e-5
