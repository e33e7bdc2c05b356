"""Exported folders as others read them: pipelines of transformers, PEFT, llama.cpp's package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_med.checkpoint.adapter import weights_digest
from megatron_med.checkpoint.folder import resolve_checkpoint
from tests.cli.processes import python, train, write_config
from tests.small_models import write_small_llama

QUESTIONS = {
    "What are signs of measles?": "Fever, cough and a rash.",
    "What helps against scurvy?": "Fruit, or vitamin C.",
    "Is gout a disease of joints?": "Yes, of crystals in them.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    """A base, a model that has learnt three answers by heart, adapters that have, and what they are exported to."""
    folder = tmp_path_factory.mktemp("serving")
    _ok(
        "tools/extend_tokenizer.py",
        "--tokenizer",
        sample_tokenizer,
        "--tokens",
        "chatml",
        "--output",
        folder / "tokens",
    )
    write_small_llama(folder / "hf", sample_tokenizer, 3, initializer_range=0.08)
    base = ("import", "--from", folder / "hf", "--to", folder / "base", "--tokenizer", folder / "tokens")
    _ok("tools/convert_checkpoint.py", *base)
    _ok("tools/convert_checkpoint.py", "export", "--from", folder / "base", "--to", folder / "base_hf")
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in QUESTIONS.items()]
    (folder / "input.json").write_text(json.dumps(rows))
    for template in ("chatml", "alpaca"):
        data = ("--input", folder / "input.json", "--output-prefix", folder / template, "--template", template)
        _ok("tools/preprocess_instructions.py", *data, "--tokenizer", folder / "tokens")
    (folder / "manifest.json").write_text(json.dumps({"sources": {}}))
    _tune(folder, "full", "chatml", steps=60, lr=3e-3)
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"rank": 32, "alpha": 64.0, "targets": everything}
    _tune(folder, "lora", "alpaca", steps=120, lr=1e-2, lora=lora)
    export = ("tools/convert_checkpoint.py", "export", "--from")
    _ok(*export, folder / "full" / "run", "--to", folder / "full_hf", "--verify")
    _ok("tools/convert_adapter.py", "merge", "--from", folder / "lora" / "run", "--to", folder / "merged")
    _ok(*export, folder / "merged", "--to", folder / "merged_hf")
    adapter = ("export", "--from", folder / "lora" / "run", "--to", folder / "peft")
    _ok("tools/convert_adapter.py", *adapter, "--base-model", folder / "base_hf")
    return folder


def _ok(*arguments: object) -> None:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr


def _tune(folder: Path, name: str, data: str, steps: int, lr: float, **sections: Any) -> None:
    (folder / name).mkdir()
    stored = json.loads(next((folder / "base").glob("step-*/state.json")).read_text())["model"]
    config = write_config(
        folder / name,
        folder / data,
        model={field: value for field, value in stored.items() if field != "preset"},
        data={"sequence_length": 128},
        train={"steps": steps, "global_batch_size": 1},
        optimizer={"lr": lr, "weight_decay": 0.0},
        lr_schedule={"warmup_steps": 5, "min_lr": 0.0},
        checkpoint={"load": str(folder / "base"), "interval": steps},
        **sections,
    )
    done = train(config)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model", "turn_end"), [("full_hf", "<|im_end|>"), ("merged_hf", "<|endoftext|>"), ("peft", "<|endoftext|>")]
)
def test_a_pipeline_speaks_the_template_and_stops_at_the_end_of_the_turn(
    folder: Path, model: str, turn_end: str
) -> None:
    import transformers

    pipe = transformers.pipeline("text-generation", model=str(folder / model), tokenizer=str(folder / model))
    end = pipe.tokenizer.convert_tokens_to_ids(turn_end)
    for question, answer in QUESTIONS.items():
        messages = [{"role": "user", "content": question}]
        (found,) = pipe(messages, do_sample=False, max_new_tokens=80, return_tensors=True)
        ids = found["generated_token_ids"]
        prompt = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        written = ids[len(prompt) :]
        assert pipe.tokenizer.decode(written, skip_special_tokens=True).strip() == answer
        assert written[-1] == end
        assert len(written) < 80


def test_medalpacas_own_example_works_on_an_export(folder: Path) -> None:
    import transformers

    path = str(folder / "full_hf")
    pl = transformers.pipeline("text-generation", model=path, tokenizer=path)
    prompt = "Context: Scurvy is a lack of vitamin C.\n\nQuestion: What helps against scurvy?\n\nAnswer: "
    (found,) = pl(prompt, do_sample=False, max_new_tokens=12)
    assert found["generated_text"].startswith(prompt)
    options = ("--checkpoint", folder / "full" / "run", "--prompt", prompt, "--max-new-tokens", 12)
    assert python("tools/generate.py", *options).stdout.strip() == found["generated_text"].strip()


def test_llama_cpps_package_reads_the_tokenizers(folder: Path, shared: Path, tmp_path: Path) -> None:
    """Of a BPE: merges, special tokens, template. Of a SentencePiece model: every piece, and the added tokens."""
    gguf = pytest.importorskip("gguf")
    special = gguf.SpecialVocab(folder / "full_hf", load_merges=True)
    template = json.loads((folder / "full_hf" / "tokenizer_config.json").read_text())["chat_template"]
    assert special.chat_template == template
    assert len(special.merges) > 100
    llama2 = tmp_path / "tokens"
    source = shared / "tokenizers" / "llama2_tokenizer.model"
    _ok("tools/extend_tokenizer.py", "--tokenizer", source, "--tokens", "gap_replay", "chatml", "--output", llama2)
    write_small_llama(tmp_path / "hf", source, 1, vocab_size=32000)
    _ok(
        "tools/convert_checkpoint.py",
        "import",
        "--from",
        tmp_path / "hf",
        "--to",
        tmp_path / "c",
        "--tokenizer",
        llama2,
    )
    _ok("tools/convert_checkpoint.py", "export", "--from", tmp_path / "c", "--to", tmp_path / "out")
    vocabulary = gguf.vocab.SentencePieceVocab(tmp_path / "out")
    assert vocabulary.vocab_size == 32014
    assert vocabulary.added_tokens_list[-1] == "<|im_end|>"
    assert gguf.SpecialVocab(tmp_path / "out").special_token_ids == {"bos": 1, "eos": 2, "unk": 0} | {}


def test_the_card_tells_base_data_licences_recipe_and_scores(folder: Path, tmp_path: Path) -> None:
    text = (folder / "full_hf" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pipeline_tag"] == "text-generation"
    for words in ("Not medical advice", f"The weights of `{folder / 'base'}`", "- steps: 60", "template `chatml`"):
        assert words in text
    assert "licence not recorded" in text
    results = tmp_path / "results"
    results.mkdir()
    scores = {"medqa": {"letter": {"value": 0.25, "interval": [0.2, 0.3], "count": 40}, "letter@1": {"value": 1}}}
    weights = weights_digest(resolve_checkpoint(folder / "full" / "run"))
    (results / "results.json").write_text(json.dumps({"tasks": scores, "settings": {"weights": weights}}))
    manifest = {"sources": {"chatml": {"license": "CC BY 4.0"}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    source = ("export", "--from", folder / "full" / "run", "--to", tmp_path / "out", "--results", results)
    _ok("tools/convert_checkpoint.py", *source)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| medqa | letter | 0.2500 | 0.2000 to 0.3000 | 40 |" in text
    assert "letter@1" not in text
    (results / "results.json").write_text(json.dumps({"tasks": scores, "settings": {"weights": "others"}}))
    others = python("tools/convert_checkpoint.py", *source, "--overwrite")
    assert others.returncode == 2
    assert "the scores of other weights" in others.stderr
    refused = python("tools/convert_checkpoint.py", *source[:-1], tmp_path, "--overwrite")
    assert refused.returncode == 2
    assert "holds no results.json" in refused.stderr


def test_the_card_of_adapters_names_their_base_whole_or_merged(folder: Path) -> None:
    text = (folder / "peft" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", str(folder / "base_hf"))
    adapters = "- adapters: rank 32, alpha 64, on q_proj, "
    for words in ("Not medical advice", "To be loaded beside", "- steps: 120", adapters, "`alpaca`: licence"):
        assert words in text
    merged = (folder / "merged_hf" / "README.md").read_text()
    base = resolve_checkpoint(folder / "base")
    for words in (f"merged into the weights of `{base}`", "- steps: 120", adapters, "`alpaca`: licence"):
        assert words in merged


def test_an_adapter_without_a_base_that_peft_can_read_is_told_of(folder: Path, tmp_path: Path) -> None:
    done = python("tools/convert_adapter.py", "export", "--from", folder / "lora" / "run", "--to", tmp_path / "peft")
    assert done.returncode == 0
    assert "a checkpoint that PEFT cannot read: with --base-model" in done.stdout
