"""Rules of the corpus that a whole build shows badly: which duplicate stays, which question is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from datatrove.data import Document

from megatron_med.corpus.contamination import QuestionFilter, write_index
from megatron_med.corpus.duplicates import KeyWriter, find_key_duplicates, find_near_duplicates, read_removals
from megatron_med.corpus.guidelines import clean_guideline
from megatron_med.corpus.kinds import read_documents
from megatron_med.corpus.personal import redact
from megatron_med.corpus.recipe import Questions
from megatron_med.corpus.s2orc import format_paper
from megatron_med.corpus.text import remove_urls
from megatron_med.errors import DataError
from megatron_med.tokenizer.special import CORPUS_TOKENS


def _kept(shards: list[list[tuple[str, str]]], folder: Path) -> list[tuple[int, int]]:
    """(shard, document) that stay, of documents given as (id, text)."""
    for number, documents in enumerate(shards):
        items = [Document(text, name, metadata={"keys": []}) for name, text in documents]
        list(KeyWriter(folder / "keys", by_beginning=False).run(iter(items), number))
    find_key_duplicates([folder / "keys" / f"{number:05d}.npy" for number in range(len(shards))], folder / "same")
    gone = {(number, item) for number in range(len(shards)) for item in read_removals(folder / "same", number)}
    return [(n, i) for n, documents in enumerate(shards) for i in range(len(documents)) if (n, i) not in gone]


def test_a_document_goes_only_for_one_that_stays(tmp_path: Path) -> None:
    """The third shares its text with the second, which goes for its id: the text must not be lost."""
    shards = [[("1", "u"), ("1", "x")], [("2", "x"), ("2", "v"), ("3", "w"), ("4", "u")]]
    assert _kept(shards, tmp_path) == [(0, 0), (1, 0), (1, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_which_duplicates_stay_is_what_one_pass_in_order_gives(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = [
        [(str(rng.integers(30)), f"text {rng.integers(30)}") for _ in range(rng.integers(0, 25))] for _ in range(4)
    ]
    seen: set[str] = set()
    expected = []
    for number, documents in enumerate(shards):
        for place, (name, text) in enumerate(documents):
            if not {f"id {name}", text} & seen:
                seen |= {f"id {name}", text}
                expected.append((number, place))
    assert _kept(shards, tmp_path) == expected


def test_of_a_chain_of_near_duplicates_the_first_stays(tmp_path: Path) -> None:
    pairs = np.array([[1, 4, 2, 0], [0, 3, 1, 4], [2, 7, 2, 8]], dtype="<u4")
    (tmp_path / "0.dups").write_bytes(pairs.tobytes())
    find_near_duplicates([tmp_path / "0.dups"], 3, tmp_path / "near")
    gone = {(shard, place): kept for shard in range(3)
            for place, (_, *kept) in read_removals(tmp_path / "near", shard).items()}  # fmt: skip
    assert gone == {(1, 4): [0, 3], (2, 0): [0, 3], (2, 8): [2, 7]}


STEM = "A 54 year old man comes to the clinic because of crushing chest pain that spreads to his left arm at night."
PHRASE = "Which of the following is the most appropriate next step in the management of this patient at this time?"


@pytest.fixture
def questions(tmp_path: Path) -> QuestionFilter:
    texts = [f"{STEM} What is seen in his {sign}?" for sign in ("ECG", "blood count", "radiograph", "urine")]
    texts += [
        f"A {n} year old woman has been coughing for {n} days and has lost {n} kg. {PHRASE}" for n in range(20, 32)
    ]
    texts += ["Which of the following is the most common cause of stroke?"]
    texts += ["Which of the following is the most common cause of blindness?", "What is gout?", PHRASE]
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    counts = write_index("exam", Questions(str(path), ["question"]), 13, tmp_path / "index")
    assert counts == {"questions": 20, "too_short_to_be_found": 1}
    return QuestionFilter(tmp_path / "index")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (f"In class: {STEM} We discuss.", 0),
        ("Hint: which of the following is the most common CAUSE of blindness? Diabetes.", 17),
        ("Hint: which of the following is the most common cause of stroke, they ask.", 16),
        ("A 25 year old woman has been coughing for 25 days and has lost 25 kg. So?", 9),
        ("Which of the following is the most common cause of falls?", None),
        ("A 25 year old woman has been coughing for 11 days and is well.", None),
        ("0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", None),
    ],
)
def test_questions_are_found_by_what_tells_them(questions: QuestionFilter, text: str, number: int | None) -> None:
    document = Document(text, "x")
    result = questions.filter(document)
    if number is None:
        assert result is True
    else:
        assert result == (False, "contaminated: exam")
        assert document.metadata["contamination"]["question"] == number


def test_a_phrase_is_sought_where_a_question_has_nothing_else(questions: QuestionFilter) -> None:
    document = Document(f"Exams ask: {PHRASE}", "x")
    assert questions.filter(document) == (False, "contaminated: exam")
    assert document.metadata["contamination"]["question"] == 19


SMUGGLED = [
    "&#91;table&#93;",
    "[**fig**]",
    "[ta<b></b>ble]",
    "[ta\u200bble]",
    "[f\u00adig]",
    "[ table ]",
    "[[table]](x)",
]


@pytest.mark.parametrize("kind", ["guidelines", "abstracts", "redpajama", "s2orc"])
def test_no_raw_text_becomes_a_token(tmp_path: Path, kind: str) -> None:
    """Escaping is the last step: what cleaning makes of raw text is text too."""
    raw = " and ".join(SMUGGLED) + " [bib_ref] x [/bib_ref] \ue000fig\ue001."
    record: dict[str, Any] = {"id": "1", "title": f"On {raw}", "text": raw, "raw_text": raw}
    if kind == "s2orc":
        abstract = json.dumps([{"start": 0, "end": 3}])
        record = {
            "corpusid": 1, "externalids": {"pubmed": "5"},
            "content": {"text": raw, "annotations": {"abstract": abstract}},
        }  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (document,) = read_documents(path, kind, None)
    assert len(document.text) > 40
    assert not [token for token in CORPUS_TOKENS if token in document.text]


def test_formatted_papers_have_tokens_and_keep_brackets_that_mean_something() -> None:
    text = "Intro (1). We gave (-)-epicatechin to HIV (-) people [2, 3] in the range [12, 15]. End [4]."
    references = [(text.index(mark), text.index(mark) + 1) for mark in ("1)", "2, 3", "3]", "4]")]
    spans = json.dumps([{"start": start, "end": end} for start, end in references])
    paragraph = json.dumps([{"start": 0, "end": len(text)}])
    record = {"content": {"text": text, "annotations": {"bibref": spans, "paragraph": paragraph}}}
    expected = "Intro. We gave (-)-epicatechin to HIV (-) people in the range [12, 15]. End."
    assert format_paper(record, None, "x") == expected


def test_a_figure_in_the_middle_does_not_end_the_paper() -> None:
    parts = ["First part.\n", "\nFigure 1\nA picture of it\n", "\nSecond part.", "\nFurniture of the page."]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    span = lambda n: {"start": starts[n], "end": starts[n + 1]}  # noqa: E731
    figure = span(1) | {"attributes": {"id": "fig_0"}}
    caption = {"start": starts[1] + 10, "end": starts[2] - 1}
    annotations = {"paragraph": [span(0), span(2)], "figure": [figure], "figurecaption": [caption]}
    record = {"content": {"text": "".join(parts), "annotations": {k: json.dumps(v) for k, v in annotations.items()}}}
    text = format_paper(record, None, "x")
    assert "First part." in text
    assert "Second part." in text
    assert "[fig] Figure 1: A picture of it [/fig]" in text


def test_guidelines_keep_what_only_looks_like_furniture() -> None:
    text = (
        "Give 95% CI [12, 15] and range [10\u201320] in [2019].\nHbA1c <target and BP >130 mmHg [3].\n"
        "o negative blood is rare\n"
        'See [the [1] page](http://x.org/b_(c)_(d(e))) and [this][1] on f() calls.\n\n[1]: http://y.org "Y"\n'
        "**References**\n1. Smith\n\n## Next\nMore &lt;b&gt; text"
    )
    found = clean_guideline(text, None)
    for kept in (
        "[12, 15]",
        "[10\u201320]",
        "[2019]",
        "<target and BP >130 mmHg.",
        "o negative blood",
        "this on f() calls",
    ):
        assert kept in found, kept
    assert "Smith" not in found
    assert "y.org" not in found
    assert found.endswith("## Next\nMore <b> text".replace("## ", "# "))


def test_brackets_go_only_with_an_address() -> None:
    assert remove_urls("f() is at (http://x.org) and [] stays, <https://y.org/z>.") == "f() is at  and [] stays, ."


@pytest.mark.parametrize(
    "text",
    [
        "at +37.50\u201338.50 °C, (+10.55 12.33), coefficients +1.25 10.30 22.10",
        "patient number 1000-2000 were enrolled; patient no. 12 2005; record no. 7",
        "Patient: Men aged 40 were seen", "Name: Aspirin tablets", "Hospital numbers rose by 12 in 2005",
    ],
)  # fmt: skip
def test_clinical_numbers_are_no_personal_data(text: str) -> None:
    assert redact(text) == (text, {})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Name of patient: J. Doe", "name"), ("Dear Mr. Smith", "name"), ("Patient ID: AB-123", "record_number"),
        ("MR# 0012345", "record_number"), ("call 0800 123 4567 now", "phone"), ("at 301\u2011496\u20115248", "phone"),
    ],
)  # fmt: skip
def test_personal_data_in_other_forms(text: str, kind: str) -> None:
    assert dict(redact(text)[1]) == {kind: 1}


@pytest.mark.parametrize("annotations", ["x", {"bibref": '[{"start": 0, "end": 1, "attributes": "b1"}]'}])
def test_annotations_of_another_schema_are_named(annotations: Any) -> None:
    with pytest.raises(DataError, match=r"f:1: 'content.annotations"):
        format_paper({"content": {"text": "some text", "annotations": annotations}}, None, "f:1")


def test_replay_keeps_the_indentation_of_code(tmp_path: Path) -> None:
    code = "def f():\n    if x:\n\treturn 1\n"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": code, "meta": {}}) + "\n")
    (document,) = read_documents(tmp_path / "a.jsonl", "redpajama", None)
    assert document.text == code.strip("\n")
