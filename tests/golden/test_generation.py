"""Generated text and log-likelihoods against transformers, on one process and on grids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megatron_med.checkpoint.huggingface.convert import import_huggingface
from megatron_med.inference.engine import Engine
from megatron_med.inference.load import load_model
from megatron_med.inference.request import Request, row_seed
from megatron_med.inference.sampling import Sampling
from megatron_med.parallel.context import single_process_context
from tests.generation import NEW, Ids, answer_on_rank, answers_of, load, score_on_rank
from tests.ranks import run_ranks

NEAR_TIE = 1e-4
"""Two best logits that lie closer than this may change places."""

LLAMA = LlamaConfig(
    vocab_size=509,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=160,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=None,
)
GPT2 = GPT2Config(
    vocab_size=509,
    n_embd=64,
    n_layer=4,
    n_head=4,
    n_positions=160,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=None,
)
GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of transformers whose logits lie apart; ours is read from the same folder."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LLAMA) if request.param == "llama" else GPT2LMHeadModel(GPT2)
    path = tmp_path_factory.mktemp(request.param) / "hf"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _prompts(lengths: Sequence[int] = (3, 40, 17, 1, 64, 9, 30, 5, 22, 2)) -> list[Ids]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 509, (length,), generator=generator).tolist() for length in lengths]


def _generate(theirs: Any, prompt: Ids, **options: Any) -> tuple[Ids, list[float]]:
    """New tokens of transformers for one prompt, and how far its two best logits lay apart at each."""
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    best = [scores[0].topk(2).values.tolist() for scores in out.scores]
    return out.sequences[0, len(prompt) :].tolist(), [first - second for first, second in best]


def _compared(ours: Ids, expected: Ids, gaps: list[float]) -> int:
    """Tokens that were compared: up to a near tie at which the two went different ways."""
    for place, (mine, other) in enumerate(zip(ours, expected, strict=False)):
        if mine != other:
            assert gaps[place] < NEAR_TIE, f"token {place} is {mine}, not {other}, whose logit leads by {gaps[place]}"
            return place
    assert len(ours) == len(expected)
    return len(ours)


@pytest.mark.parametrize(("tensor", "pipeline"), GRIDS)
def test_greedy_batches_of_unequal_prompts_equal_transformers(
    folder: Path, theirs: Any, tensor: int, pipeline: int
) -> None:
    """Ten prompts in four rows: rows take the next prompt when an answer has ended."""
    prompts = _prompts()
    expected = [_generate(theirs, prompt) for prompt in prompts]
    results = run_ranks(tensor * pipeline, answer_on_rank, folder, tensor, pipeline, prompts, Sampling(), 4, None)
    for answers in results:
        assert answers == results[0], "every rank has every answer"
    compared = sum(
        _compared(ours, tokens, gaps) for (ours, _), (tokens, gaps) in zip(results[0], expected, strict=True)
    )
    assert compared >= 0.95 * NEW * len(prompts)


def test_answers_end_at_an_end_token(folder: Path, theirs: Any) -> None:
    prompts = _prompts()
    plain = [_generate(theirs, prompt)[0] for prompt in prompts]
    end = plain[4][NEW // 2]
    answers = answers_of(load(folder, 1, 1), prompts, Sampling(), 4, end)
    for answer, tokens in zip(answers, plain, strict=True):
        cut = tokens.index(end) if end in tokens else NEW
        assert answer.tokens == tokens[:cut]
        assert answer.end == ("end_token" if cut < NEW else "length")
    assert {answer.end for answer in answers} == {"end_token", "length"}


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_penalised_text_equals_transformers(folder: Path, theirs: Any, options: dict[str, Any]) -> None:
    """One prompt at a time there: transformers penalises the padding on the left, too."""
    prompts = _prompts()
    ours = answers_of(load(folder, 1, 1), prompts, Sampling(**options), 4, None)
    compared = sum(
        _compared(answer.tokens, *_generate(theirs, prompt, **options))
        for answer, prompt in zip(ours, prompts, strict=True)
    )
    assert compared >= 0.95 * NEW * len(prompts)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("beams", "size", "penalty"), [(5, 6, 1.0), (3, 2, 0.0), (4, 0, 2.0)], ids=["biomedlm", "short", "long"]
)
def test_beam_search_equals_transformers(
    folder: Path, theirs: Any, beams: int, size: int, penalty: float, tensor: int, pipeline: int
) -> None:
    prompts = _prompts((3, 40, 17, 9, 22))
    written = [token for prompt in prompts for token in _generate(theirs, prompt)[0]]
    end = max(written, key=written.count)
    sampling = Sampling(beams=beams, no_repeat_ngram_size=size, length_penalty=penalty)
    (answers, *_) = run_ranks(tensor * pipeline, answer_on_rank, folder, tensor, pipeline, prompts, sampling, 10, end)
    ends = set()
    for (ours, how), prompt in zip(answers, prompts, strict=True):
        expected = _generate_beams(theirs, prompt, beams, size, penalty, end)
        assert ours == expected[: len(ours)]
        assert expected[len(ours) :] in ([], [end])
        ends.add(how)
    assert "end_token" in ends or penalty > 1, "some beams end by themselves"


def _generate_beams(theirs: Any, prompt: Ids, beams: int, size: int, penalty: float, end: int) -> Ids:
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        no_repeat_ngram_size=size,
        length_penalty=penalty,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[: out.index(end) + 1] if end in out else out


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_rows_text_depends_neither_on_its_neighbours_nor_on_the_grid(
    folder: Path, tensor: int, pipeline: int
) -> None:
    prompts = _prompts()
    sampling = Sampling(0.9, top_k=40, top_p=0.95)
    model = load(folder, 1, 1)
    together = [answer.tokens for answer in answers_of(model, prompts, sampling, 10, None)]
    two_rows = [answer.tokens for answer in answers_of(model, prompts, sampling, 2, None)]
    assert two_rows == together
    alone = Engine(model, sampling, slots=1).answers([Request(prompts[4], NEW, row_seed(0, 4))])
    assert next(alone).tokens == together[4]
    (on_grid, *_) = run_ranks(tensor * pipeline, answer_on_rank, folder, tensor, pipeline, prompts, sampling, 4, None)
    assert [tokens for tokens, _ in on_grid] == together
    assert len({tuple(tokens) for tokens in together}) == len(prompts)


def _texts() -> list[tuple[Ids, Ids]]:
    """Questions with four options each, behind one beginning for some; single texts of many lengths."""
    generator = torch.Generator().manual_seed(8)

    def ids(length: int) -> Ids:
        return torch.randint(509, (length,), generator=generator).tolist()

    shots = ids(70)
    questions = [[*(shots if number % 2 else []), *ids(5 + number)] for number in range(8)]
    requests = [(question, ids(1 + option)) for question in questions for option in range(4)]
    requests += [(ids(1), ids(length)) for length in (1, 2, 33, 150)]
    return [requests[place] for place in torch.randperm(len(requests), generator=generator).tolist()]


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_log_likelihoods_equal_transformers(folder: Path, theirs: Any, tensor: int, pipeline: int, data: int) -> None:
    requests = _texts()
    greedy_ones = [(prompt, _generate(theirs, prompt)[0][:3]) for prompt in _prompts((4, 9))]
    requests += greedy_ones
    results = run_ranks(tensor * pipeline * data, score_on_rank, folder, tensor, pipeline, requests)
    assert all(scores == results[0][0] for scores, _ in results), "every rank has every score"
    assert sum(told for _, told in results) == len(requests) * tensor * pipeline, "replicas share them out"
    for (context, continuation), (ours, is_greedy) in zip(requests, results[0][0], strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*context, *continuation[:-1]]])).logits[0, len(context) - 1 :].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert ours == pytest.approx(expected, abs=1e-4, rel=1e-6)
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)
    assert all(is_greedy for _, is_greedy in results[0][0][-2:])


def test_a_checkpoint_of_ours_reads_as_the_folder_does(folder: Path, tmp_path: Path) -> None:
    import_huggingface(folder, tmp_path / "checkpoint")
    prompts = _prompts()
    texts = []
    for quantize in ("none", "int8", "nf4"):
        both = []
        for source in (folder, tmp_path / "checkpoint"):
            answers = answers_of(load(source, 1, 1, quantize), prompts, Sampling(), 10, None)
            both.append([answer.tokens for answer in answers])
        assert both[0] == both[1], quantize
        texts.append(both[0])
    assert texts[0] != texts[1] != texts[2] != texts[0], "the matrices are in fewer bits"


def test_every_end_token_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    prompts = _prompts()
    plain = [answer.tokens for answer in answers_of(load(folder, 1, 1), prompts, Sampling(), 10, None)]
    ends = [plain[0][5], plain[3][8]]
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    loaded = load_model(copied, single_process_context())
    assert loaded.end_ids == set(ends)
    requests = [Request(prompt, NEW) for prompt in prompts]
    for answer in Engine(loaded.model, stopping=loaded.stopping()).answers(requests):
        tokens = plain[answer.request]
        cut = next((place for place, token in enumerate(tokens) if token in ends), NEW)
        assert answer.tokens == tokens[:cut]
