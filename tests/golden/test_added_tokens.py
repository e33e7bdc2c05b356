"""Meditron's twelve tokens and ChatML's two: ids against Hugging Face, rows of an imported model, what refuses them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_med.checkpoint.huggingface.mapping import NEW_ROW_NOISE
from megatron_med.corpus.records import read_records
from megatron_med.corpus.s2orc import format_paper
from megatron_med.data.indexed_writer import IndexedDatasetWriter
from megatron_med.data.sources import write_side_file
from megatron_med.errors import ConfigError, DataError
from megatron_med.tokenizer import describe_difference, load_tokenizer
from megatron_med.tokenizer.special import CHAT_TOKENS, CORPUS_TOKENS, extend_tokenizer
from tests.cli.processes import python, write_config

transformers = pytest.importorskip("transformers", reason="the verify extra is not installed")


@pytest.fixture(scope="module")
def extended(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    size = extend_tokenizer(shared / "tokenizers" / "llama2_tokenizer.model", (*CORPUS_TOKENS, *CHAT_TOKENS), folder)
    assert size == 32014
    return folder


@pytest.fixture(scope="module")
def papers(shared: Path) -> list[str]:
    records = [record for _, record in read_records(shared / "s2orc" / "s2orc_from_jats.jsonl")][:30]
    return [format_paper(record, None, "x") for record in records]


def test_ids_are_the_published_ones(extended: Path) -> None:
    ids = load_tokenizer(extended).special_tokens()
    assert [ids[32000 + number] for number in range(14)] == [
        *("[bib_ref]", "[/bib_ref]", "[fig_ref]", "[/fig_ref]", "[bib]", "[/bib]"),
        *("[fig]", "[/fig]", "[table]", "[/table]", "[formula]", "[/formula]", "<|im_start|>", "<|im_end|>"),
    ]


def test_real_papers_have_the_ids_that_huggingface_gives_them(extended: Path, papers: list[str]) -> None:
    ours = load_tokenizer(extended)
    theirs = transformers.AutoTokenizer.from_pretrained(extended)
    assert len(theirs) == 32014
    for text, ids in zip(papers, ours.encode_markup_batch(papers, CORPUS_TOKENS), strict=True):
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    assert sum(token >= 32000 for ids in ours.encode_markup_batch(papers, CORPUS_TOKENS) for token in ids) > 500


def test_the_same_strings_in_raw_text_are_text(extended: Path, shared: Path, papers: list[str]) -> None:
    ours, plain = load_tokenizer(extended), load_tokenizer(shared / "tokenizers" / "llama2_tokenizer.model")
    texts = [*papers[:5], *CORPUS_TOKENS, *CHAT_TOKENS, "</s> [table] <s>"]
    assert ours.encode_batch(texts) == plain.encode_batch(texts)
    marked = ours.encode_markup_batch(["<|im_end|> </s> [Table] [table]"], CORPUS_TOKENS)[0]
    assert [token for token in marked if token >= 32000 or token < 3] == [32008]


def test_a_byte_level_vocabulary_is_extended_too(shared: Path, tmp_path: Path, papers: list[str]) -> None:
    files = [shared / "tokenizers" / name for name in ("gpt2_encoder.json", "gpt2_vocab.bpe")]
    assert extend_tokenizer(f"{files[0]},{files[1]}", CORPUS_TOKENS, tmp_path) == 50269
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.added_tokens == CORPUS_TOKENS
    for text, ids in zip(papers[:5], ours.encode_markup_batch(papers[:5], CORPUS_TOKENS), strict=True):
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    assert ours.encode("[table]") == load_tokenizer(f"{files[0]},{files[1]}").encode("[table]")
    with pytest.raises(ConfigError, match=re.escape("has [table] already")):
        extend_tokenizer(tmp_path, ["[table]"], tmp_path / "x")


def test_another_order_is_another_tokenizer(extended: Path, shared: Path, tmp_path: Path) -> None:
    swapped = (CORPUS_TOKENS[1], CORPUS_TOKENS[0], *CORPUS_TOKENS[2:], *CHAT_TOKENS)
    extend_tokenizer(shared / "tokenizers" / "llama2_tokenizer.model", swapped, tmp_path)
    first, second = (load_tokenizer(folder).describe() for folder in (extended, tmp_path))
    assert describe_difference(first, second) == "added token 0 is [bib_ref] against [/bib_ref]"
    assert describe_difference(first, first) is None
    names = json.loads((tmp_path / "added_tokens.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps(names | {"[bib]": 40000}))
    with pytest.raises(DataError, match="do not follow the vocabulary of 32000 pieces one by one"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def pretrained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with Llama-2's vocabulary, whose columns have means and spreads of their own."""
    folder = tmp_path_factory.mktemp("pretrained") / "hf"
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.mul_(torch.linspace(0.5, 2, 32)).add_(torch.linspace(-0.01, 0.02, 32))
    model.save_pretrained(folder)
    shutil.copy(shared / "tokenizers" / "llama2_tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def imported(pretrained: Path, extended: Path) -> Path:
    target = pretrained.parent / "checkpoint"
    done = python(
        "tools/convert_checkpoint.py", "import", "--from", pretrained, "--to", target, "--tokenizer", extended,
        "--verify",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified: logits" in done.stdout
    return target


def test_new_rows_begin_near_the_mean_and_are_not_copies(pretrained: Path, imported: Path, tmp_path: Path) -> None:
    done = python("tools/convert_checkpoint.py", "export", "--from", imported, "--to", tmp_path / "hf", "--verify")
    assert done.returncode == 0, done.stderr
    before = transformers.LlamaForCausalLM.from_pretrained(pretrained)
    after = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert after.config.vocab_size == 32014
    pairs = [(before.model.embed_tokens, after.model.embed_tokens), (before.lm_head, after.lm_head)]
    noises = []
    for old, new in pairs:
        rows, added = old.weight.double(), new.weight[32000:].double()
        assert torch.equal(new.weight[:32000], old.weight)
        noise = (added - rows.mean(0)) / (NEW_ROW_NOISE * rows.std(0))
        assert abs(noise.std().item() - 1) < 0.15
        assert abs(noise.mean().item()) < 0.15
        assert len(torch.unique(added, dim=0)) == 14
        noises.append(noise)
    assert not torch.allclose(noises[0], noises[1]), "embedding and head have noise of their own"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").convert_tokens_to_ids("[/formula]") == 32011
    again = python(
        "tools/convert_checkpoint.py", "import", "--from", pretrained, "--to", tmp_path / "again", "--tokenizer",
        imported / "step-00000000" / "tokenizer",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    for file in (tmp_path / "again" / "step-00000000").glob("*.distcp"):
        assert file.read_bytes() == (imported / "step-00000000" / file.name).read_bytes(), "the noise is seeded"


def _corpus(folder: Path, tokenizer: Path) -> Path:
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for start in range(20):
            writer.add_document(np.arange(start * 100, start * 100 + 60))
    write_side_file(folder / "corpus", load_tokenizer(tokenizer), {"documents": 20, "tokens": 1200})
    return folder / "corpus"


def test_training_refuses_tokens_in_another_order(imported: Path, shared: Path, tmp_path: Path) -> None:
    swapped = (CORPUS_TOKENS[1], CORPUS_TOKENS[0], *CORPUS_TOKENS[2:], *CHAT_TOKENS)
    extend_tokenizer(shared / "tokenizers" / "llama2_tokenizer.model", swapped, tmp_path / "swapped")
    shape = {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
             "num_query_groups": 2, "norm_eps": 1e-6, "vocab_size": 32014, "max_position_embeddings": 128}  # fmt: skip
    outcomes = {}
    for name, tokenizer in (("right", imported / "step-00000000" / "tokenizer"), ("swapped", tmp_path / "swapped")):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        config = write_config(
            folder, _corpus(folder, tokenizer), model=shape, data={"sequence_length": 32}, train={"steps": 1},
            checkpoint={"load": str(imported)},
        )  # fmt: skip
        outcomes[name] = python("-m", "megatron_med.train", config)
    assert outcomes["right"].returncode == 0, outcomes["right"].stderr
    assert outcomes["swapped"].returncode == 2
    assert "(added token 0 is [bib_ref] against [/bib_ref])" in outcomes["swapped"].stderr


def test_export_refuses_a_tokenizer_that_was_changed(imported: Path, tmp_path: Path) -> None:
    shutil.copytree(imported, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "step-00000000" / "tokenizer" / "added_tokens.json"
    names = json.loads(file.read_text())
    names["[bib]"], names["[/bib]"] = names["[/bib]"], names["[bib]"]
    file.write_text(json.dumps(names))
    target = tmp_path / "hf"
    done = python("tools/convert_checkpoint.py", "export", "--from", tmp_path / "checkpoint", "--to", target)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr
    assert not target.exists()
