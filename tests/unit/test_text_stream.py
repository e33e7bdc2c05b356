"""Text of tokens as they come: whole characters, no text twice, stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_med.inference.text import TextStream
from megatron_med.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Fever of 39 °C, β-blockers → naïve  spaces\n\nand a new line",
    "体温は39度です。 😀 done",
    "word",
]


@pytest.fixture(scope="module", params=["llama2_tokenizer.model", "mistral_v3_tokenizer.model", "gpt2", "sample"])
def tokenizer(request: pytest.FixtureRequest, sample_tokenizer: Path) -> Tokenizer:
    if request.param == "sample":
        return load_tokenizer(sample_tokenizer)
    folder = request.getfixturevalue("shared") / "tokenizers"
    if request.param == "gpt2":
        return load_tokenizer(f"{folder / 'gpt2_encoder.json'},{folder / 'gpt2_vocab.bpe'}")
    return load_tokenizer(folder / request.param)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt_tokens", [1, 5])
def test_pieces_are_the_text_and_no_character_is_cut(tokenizer: Tokenizer, text: str, prompt_tokens: int) -> None:
    ids = tokenizer.encode("The patient said: " + text)
    prompt, answer = ids[:prompt_tokens], ids[prompt_tokens:]
    stream = TextStream(tokenizer, prompt)
    for token in answer:
        before = stream.text
        stream.push(token)
        assert stream.text.startswith(before), "what was shown stays"
        assert "\ufffd" not in stream.text
    assert tokenizer.decode(prompt) + stream.close() == tokenizer.decode(ids)


def test_a_character_that_is_never_finished_comes_at_the_end(sample_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(sample_tokenizer)
    ids = tokenizer.encode("It is 体")
    stream = TextStream(tokenizer, ids[:1])
    for token in ids[1:-1]:
        stream.push(token)
    held = stream.text
    assert "\ufffd" not in held
    assert stream.close().startswith(held)
    assert stream.text.endswith("\ufffd")


def test_a_stop_string_is_found_over_several_tokens_and_cut_off(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Answer: it is B ### next ### more")
    stream = TextStream(tokenizer, ids[:2], ["never", " ### n"])
    shown = ""
    for token in ids[2:]:
        stream.push(token)
        settled = stream.settled()
        assert settled.startswith(shown), "nothing that was shown is taken back"
        shown = settled
        if stream.is_stopped:
            break
    assert stream.is_stopped
    assert (tokenizer.decode(ids[:2]) + stream.close()).endswith("it is B")
    assert shown == stream.text
    assert "#" not in shown


def test_text_that_only_begins_like_a_stop_string_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Answer: it is B ##")
    stream = TextStream(tokenizer, ids[:2], ["###"])
    for token in ids[2:]:
        stream.push(token)
    assert not stream.settled().endswith("#")
    assert stream.close().endswith("B ##")
