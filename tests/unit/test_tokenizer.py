"""Tokenizers against stored ids; BPE training; bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_med.errors import ConfigError, DataError
from megatron_med.tokenizer import load_tokenizer
from megatron_med.tokenizer.train import save_tokenizer, train_bpe

_FILES = {
    "llama2": "llama2_tokenizer.model",
    "mistral_v1": "mistral_v1_tokenizer.model",
    "mistral_v3": "mistral_v3_tokenizer.model",
    "gpt2": "gpt2_encoder.json,gpt2_vocab.bpe",
}


def _golden(shared: Path) -> list[dict[str, Any]]:
    lines = (shared / "tokenizers" / "golden_ids_sample.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("kind", _FILES)
def test_ids_equal_the_stored_ones(shared: Path, kind: str) -> None:
    folder = shared / "tokenizers"
    tokenizer = load_tokenizer(",".join(str(folder / name) for name in _FILES[kind].split(",")))
    records = _golden(shared)
    assert len(records) == 48
    for record in records:
        assert tokenizer.encode(record["text"]) == record[kind], record["id"]
    assert tokenizer.encode_batch([r["text"] for r in records]) == [r[kind] for r in records]


def test_gpt2_text_comes_back(shared: Path) -> None:
    folder = shared / "tokenizers"
    tokenizer = load_tokenizer(f"{folder / 'gpt2_encoder.json'},{folder / 'gpt2_vocab.bpe'}")
    for record in _golden(shared):
        assert tokenizer.decode(record["gpt2"]) == record["text"]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)


def test_trained_bpe_has_the_size_and_keeps_special_strings_as_text(sample_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(sample_tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (512, 511)
    for text in ("Metformin lowers glucose.", "a<|endoftext|>b", "µg/mL \u2013 β≥0.5 → 37 °C", " \n\t x"):
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids
        assert tokenizer.decode(ids) == text


def test_biomedlms_vocabulary_from_real_abstracts(shared: Path, tmp_path: Path) -> None:
    """28,896 pieces; frequent medical words are one; fewer tokens than GPT-2's vocabulary on text it has not seen."""
    from megatron_med.data.jsonl import read_lines, text_of

    files = [shared / "pubmed" / f"abstracts_{name}.jsonl" for name in ("medline", "ccby")]
    texts = [text_of(line, "text") for line in read_lines(files)]
    unseen = texts[::20]
    save_tokenizer(train_bpe([text for number, text in enumerate(texts) if number % 20], 28896), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    gpt2 = load_tokenizer(f"{shared / 'tokenizers/gpt2_encoder.json'},{shared / 'tokenizers/gpt2_vocab.bpe'}")
    assert tokenizer.vocab_size == 28896
    for word in (" chromatography", " cytotoxicity", " probiotic", " olanzapine", " simvastatin"):
        assert len(tokenizer.encode(word)) == 1, word
        assert len(gpt2.encode(word)) > 1, word
    ours, theirs = (sum(map(len, one.encode_batch(unseen))) for one in (tokenizer, gpt2))
    assert ours < 0.92 * theirs
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(unseen)] == unseen


def test_too_small_vocabulary() -> None:
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(["text"], 256)


def test_bad_tokenizers_are_named(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.json").write_text("{")
    (tmp_path / "v.json").write_text('{"a": 0}')
    cases = {
        str(shared / "tokenizers" / "llama3_tokenizer.model"): "not a SentencePiece model",
        str(tmp_path / "absent.model"): "no tokenizer file",
        str(tmp_path / "empty"): "holds no tokenizer",
        str(tmp_path / "t.json"): "is not JSON",
        str(tmp_path / "v.json"): "together with its merges",
        f"{tmp_path / 'v.json'},{tmp_path / 'absent.txt'}": "no tokenizer file",
        str(shared / "README.md"): "no tokenizer ends in '.md'",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
