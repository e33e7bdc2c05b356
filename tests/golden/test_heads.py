"""Heads that score, against transformers: sequences, scores, loss, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2Model

from megatron_med.checkpoint.huggingface.mapping import tensor_maps
from megatron_med.config.schema import ModelConfig
from megatron_med.data.head_form import HeadForm
from megatron_med.data.indexed import IndexedDataset
from megatron_med.data.labelled import labels_prefix
from megatron_med.evaluate.catalogue import load_task, read_questions
from megatron_med.evaluate.heads import HeadEncoder, cut_longest_first
from megatron_med.model.batch import MicroBatch
from megatron_med.parallel.parameters import parameters_with_layout
from megatron_med.tokenizer import load_tokenizer
from megatron_med.train.step import compute_gradients
from megatron_med.train.timers import StepTimer
from tests.heads import preprocess_choice, preprocess_classes, with_separator, write_questions, write_texts
from tests.ranks import run_ranks
from tests.training import GPT2, make_config, set_up

SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 515}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, sample_tokenizer: Path) -> Path:
    return with_separator(sample_tokenizer, tmp_path_factory.mktemp("extended") / "tokenizer")


def test_sequences_are_those_of_biomedlms_script(tokenizer: Path, tmp_path: Path) -> None:
    """Which joins ``question[SEP]`` and `` option[SEP]`` as transformers' pair of texts, cut ``longest_first``."""
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    questions = read_questions(load_task("medqa_4options"), "train", write_questions(tmp_path / "a.jsonl", 12, 1))
    for room in (512, 40, 12, 7):
        encoder = HeadEncoder(HeadForm("multiple_choice", (), "[SEP]", room), load_tokenizer(tokenizer))
        for question in questions:
            firsts = [f"{question.question}[SEP]"] * 4
            seconds = [f" {text}[SEP]" for text in question.texts]
            wanted = theirs(firsts, seconds, truncation=True, max_length=room)["input_ids"]
            assert encoder.sequences(question) == wanted


def test_what_is_too_long_is_cut_as_by_hand() -> None:
    for first in range(1, 9):
        for second in range(1, 9):
            for room in range(2, 12):
                a, b = first, second
                while a + b > room:
                    a, b = (a - 1, b) if a > b else (a, b - 1)
                found = cut_longest_first(first, second, room)
                assert sum(found) == min(first + second, room)
                assert max(abs(found[0] - a), abs(found[1] - b)) <= 1  # of two that are as long, either


def _of_theirs(model: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Canonical tensors of a transformers model and its gradients' names."""
    state = dict(model.state_dict())
    read = lambda name: state[name if name in state else name.removeprefix("transformer.")]  # noqa: E731
    return {one.layout.name: one.to_canonical(read, torch.float32) for one in tensor_maps(config)}


def _compare_on_rank(
    prefix: Path, model: dict[str, Any], weights: dict[str, torch.Tensor]
) -> tuple[float, dict[str, Any], list[Any]]:
    """Mean loss of the first four questions, gradients, and the rows that were read."""
    config = make_config(prefix, model, batch=4, steps=1)
    config.data.sequence_length = 160
    train_module, loader = set_up(config)
    with torch.no_grad():
        for layout, parameter in parameters_with_layout(train_module.chunks):
            parameter.copy_(weights[layout.name])
    batches = loader.load(0, 4, 1)
    loss = compute_gradients(train_module, batches, StepTimer(torch.device("cpu")))
    gradients = {item.layout.name: item.gradient.clone().numpy() for item in train_module.optimizer.owned}
    return loss.item(), gradients, [_sequences(batch) for batch in batches]


def _sequences(batch: MicroBatch) -> list[tuple[list[int], int]]:
    """Ids and label of every sequence of a row."""
    found, begin = [], 0
    (tokens,), (labels,) = batch.tokens.tolist(), batch.labels.tolist()
    for place, label in enumerate(labels):
        if label:
            found.append((tokens[begin : place + 1], label))
            begin = place + 1
    return found


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_loss_and_gradients_are_those_of_transformers(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    """Four packed rows of ours against one padded batch of theirs."""
    torch.manual_seed(0)
    prefix = tmp_path / "data"
    model = GPT2 | {"num_layers": 2, "vocab_size": 515, "head": kind}
    is_choice = kind == "multiple_choice"
    shape = GPT2Config(**SHAPE, num_labels=1 if is_choice else 3, pad_token_id=512, resid_pdrop=0, embd_pdrop=0)
    shape.attn_pdrop = 0
    if is_choice:
        preprocess_choice(write_questions(tmp_path / "q.jsonl", 20, 0), tokenizer, prefix)
        body: Any = GPT2Model(shape)
        score = torch.nn.Linear(32, 1)
        theirs: Any = torch.nn.ModuleDict({"transformer": body, "score": score})
    else:
        preprocess_classes(write_texts(tmp_path / "t.json", 20, 0), tokenizer, prefix)
        model |= {"num_labels": 3}
        theirs = GPT2ForSequenceClassification(shape)
    weights = _of_theirs(theirs, ModelConfig(**model))
    if is_choice:
        weights["score.bias"] = score.bias.detach()
    ((loss, gradients, rows),) = run_ranks(1, _compare_on_rank, prefix, model, weights)
    sequences = [one for row in rows for one in row]
    assert len(sequences) > 12
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([one + [512] * (longest - len(one)) for one, _ in sequences])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one, _ in sequences])
    labels = torch.tensor([label for _, label in sequences])
    if is_choice:
        hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = score(hidden)[range(len(sequences)), mask.sum(1) - 1].view(-1, 4)
        expected = torch.nn.functional.cross_entropy(scores, (labels.view(-1, 4) % 2 == 0).int().argmax(1))
    else:
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels - 1).loss
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    named = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    if is_choice:
        torch.testing.assert_close(torch.from_numpy(gradients["score.bias"]), named["score.bias"], atol=1e-6, rtol=1e-5)
    for one in tensor_maps(ModelConfig(**model)):
        if one.layout.name == "score.bias":
            continue
        wanted = one.to_canonical(lambda name: named[name], torch.float32)
        found = torch.from_numpy(gradients[one.layout.name])
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-4, msg=one.layout.name)


def test_labels_stand_at_the_ends_of_sequences(tokenizer: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    questions = write_questions(tmp_path / "q.jsonl", 5, 0)
    written = preprocess_choice(questions, tokenizer, prefix)
    assert (written.questions, written.sequences, written.cut) == (5, 20, 0)
    labels, ids = IndexedDataset(labels_prefix(prefix)), IndexedDataset(prefix)
    read = read_questions(load_task("medqa_4options"), "train", questions)
    for number, question in enumerate(read):
        ends = labels.read(number)[labels.read(number) > 0].tolist()
        assert ends == [2 if letter == question.answer else 1 for letter in question.letters]
        assert (ids.read(number)[labels.read(number) > 0] == 514).all()  # [SEP]
