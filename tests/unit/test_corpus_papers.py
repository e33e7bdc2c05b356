"""S2ORC papers as text: against Meditron's own output for twelve records, and by rule."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_med.corpus.records import read_records
from megatron_med.corpus.s2orc import MAIN_HEADINGS, format_paper
from megatron_med.errors import DataError

NO_ABSTRACT_ERRATUM = 256867980
"""Its only heading is the publisher's name after the text: Meditron takes all before a first heading for a header."""


@pytest.fixture(scope="module")
def records(shared: Path) -> dict[int, dict[str, Any]]:
    files = [shared / "s2orc" / name for name in ("s2orc_real.jsonl", "s2orc_from_jats.jsonl")]
    return {record["corpusid"]: record for file in files for _, record in read_records(file)}


@pytest.fixture(scope="module")
def titles(shared: Path) -> dict[int, str]:
    papers = read_records(shared / "s2orc" / "papers_from_jats.jsonl")
    return {record["corpusid"]: record["title"] for _, record in papers}


@pytest.fixture(scope="module")
def pairs(shared: Path, records: dict[int, Any], titles: dict[int, str]) -> dict[int, tuple[str, str]]:
    """Meditron's text and ours of the same record."""
    sample = read_records(shared / "s2orc" / "meditron_processed_sample.jsonl")
    theirs = {record["corpusid"]: record["text"] for _, record in sample}
    return {i: (text, format_paper(records[i], titles.get(i), str(i))) for i, text in theirs.items()}


URL = re.compile(r"(?:https?://|www\.)[^\s()]*[^\s().,;]")
ACKNOWLEDGEMENTS = re.compile(
    r"\n\n##? acknowledge?ments?\s*\n(?:(?!\n\n|\[fig\]|\[table\]).)*", re.IGNORECASE | re.DOTALL
)
LAST_HEADING = re.compile(r"\n\n##? [^\n]+\n*(?=\[fig\]|\[table\]|\Z)")


def _letters(text: str) -> str:
    """Letters and digits in order, without case: blind to brackets, punctuation, white space and capitals."""
    return "".join(character for character in text.lower() if character.isalnum())


def _without_listed_differences(text: str) -> str:
    """Meditron's text without what docs/corpus.md lists as removed by us."""
    return LAST_HEADING.sub("\n", ACKNOWLEDGEMENTS.sub("", URL.sub("", text)))


def test_papers_equal_meditrons_but_for_the_listed_differences(pairs: dict[int, tuple[str, str]]) -> None:
    assert len(pairs) == 12
    for number, (theirs, ours) in pairs.items():
        if number == NO_ABSTRACT_ERRATUM:
            continue
        expected, found = _letters(_without_listed_differences(theirs)), _letters(ours)
        differences = (
            [
                (expected[a - 40 : b + 40], found[c - 40 : d + 40])
                for tag, a, b, c, d in difflib.SequenceMatcher(None, expected, found, autojunk=False).get_opcodes()
                if tag != "equal"
            ]
            if expected != found
            else []
        )
        assert not differences, f"{number}: {differences[:3]}"


def test_special_tokens_equal_meditrons(pairs: dict[int, tuple[str, str]]) -> None:
    """Every reference, caption and heading: as many, the same words in them, in the same order."""
    token = re.compile(r"\[(bib_ref|fig_ref|fig|table|formula)\] (.*?) \[/\1\]")
    total: Counter[str] = Counter()
    for number, (theirs, ours) in pairs.items():
        if number == NO_ABSTRACT_ERRATUM:
            continue
        theirs = ACKNOWLEDGEMENTS.sub("", theirs)
        expected = [(kind, _letters(URL.sub("", text))) for kind, text in token.findall(theirs)]
        assert [(kind, _letters(text)) for kind, text in token.findall(ours)] == expected
        total.update(kind for kind, _ in expected)
        headings = [h.lower() for h in re.findall(r"^##? .+$", LAST_HEADING.sub("\n", theirs), re.MULTILINE)]
        assert [h.lower() for h in re.findall(r"^##? .+$", ours, re.MULTILINE)] == headings
    assert total["bib_ref"] > 300
    assert min(total[kind] for kind in ("fig_ref", "fig", "table")) > 5


def test_our_differences_are_what_the_docs_say(pairs: dict[int, tuple[str, str]]) -> None:
    theirs, ours = ("\n".join(text) for text in zip(*pairs.values(), strict=True))
    holes = {
        "glued sentences": r"[a-z]\.(?:CMN|Around|Antenatal|Neonates|It is)",
        "empty brackets": r"\[[\s,–-]*\]",
        "brackets around a citation": r"\[ \[bib_ref\]",
        "space before a full stop": r"[a-z] \.(?=\s)",
        "addresses": r"https?://",
        "capitals lost in headings": r"^##? (?:Hiv|Mri|Fmri|Mr|Pns|Gps|Pcc)\b",
        "thanks": r"^##? Acknowledge?ments?$",
    }
    for name, pattern in holes.items():
        assert re.search(pattern, theirs, re.MULTILINE), f"the docs list '{name}', which Meditron does not have"
        assert not re.search(pattern, ours, re.MULTILINE), name


def test_an_erratum_without_abstract_keeps_its_text(pairs: dict[int, tuple[str, str]]) -> None:
    theirs, ours = pairs[NO_ABSTRACT_ERRATUM]
    assert "inappropriate representative images" not in theirs
    assert ours.startswith("We regret that the original version of our paper")
    assert "Ivyspring" not in ours, "a heading of nothing"
    assert ours.count("[fig] Figure") == 2


def test_every_record_becomes_text_of_its_own_words(records: dict[int, Any], titles: dict[int, str]) -> None:
    """All 119: title first, abstract next, no bibliography, no authors, brackets of tokens in pairs."""
    for number, record in records.items():
        text = format_paper(record, titles.get(number), str(number))
        spans = {name: json.loads(value or "[]") for name, value in record["content"]["annotations"].items()}
        raw = record["content"]["text"]
        if number in titles:
            assert _letters(text).startswith(_letters(titles[number]))
        for span in spans["abstract"][:1]:
            words = _letters(URL.sub("", raw[span["start"] : span["end"]])[:200])
            assert words[:80] in _letters(text), number
        for kind in ("bib_ref", "fig_ref", "fig", "table", "formula"):
            assert text.count(f"[{kind}]") == text.count(f"[/{kind}]")
        assert "http://" not in text
        assert "\\documentclass" not in text, "a formula without the document that publishers wrap around it"
        assert not re.search(r"[^\S\n]{2}|\n{3}|[ \t]\n", text)
        for citation in re.findall(r"\[bib_ref\] (.*?) \[/bib_ref\]", text):
            assert len(citation.rsplit(", ", 1)[0].split()) <= 12


def test_headings_follow_the_published_list() -> None:
    spans = [("INTRODUCTION", "#"), ("Materials and methods", "#"), ("Study design", "##"), ("fMRI", "##")]
    text, sections = "Abstract text. ", []
    for heading, _ in spans:
        sections.append({"start": len(text), "end": len(text) + len(heading)})
        text += f"{heading}\nWords of the section {len(sections)}.\n"
    record = {"content": {"text": text, "annotations": {
        "sectionheader": json.dumps(sections), "abstract": json.dumps([{"start": 0, "end": 14}]),
    }}}  # fmt: skip
    found = re.findall(r"^(##?) (.*)$", format_paper(record, None, "x"), re.MULTILINE)
    assert found == [(mark, "Introduction" if name.isupper() else name) for name, mark in spans]
    assert all(name == name.lower() for name in MAIN_HEADINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "'content' is str, not an S2ORC object"),
        ({"text": 5}, "'content.text' is int"),
        ({"text": "x", "annotations": {"bibref": "[{"}}, "'content.annotations.bibref' is not JSON"),
        ({"text": "x", "annotations": {"bibref": "{}"}}, "'content.annotations.bibref' is dict, not a list"),
        ({"text": "x", "annotations": {"figure": '[{"start": 1}]'}}, "'content.annotations.figure' has a span without"),
    ],
)
def test_a_wrong_schema_names_the_field(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"papers.jsonl:7: {message}")):
        format_paper({"content": content}, None, "papers.jsonl:7")
