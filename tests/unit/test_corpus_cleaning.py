"""The cleaning of single records: guidelines, XML, personal data, language, special tokens, splits."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

pytest.importorskip("datatrove", reason="the corpus extra is not installed")

from datatrove.data import Document

from megatron_med.corpus.blocks import LanguageFilter, fraction_of
from megatron_med.corpus.guidelines import clean_guideline
from megatron_med.corpus.kinds import NO_TEXT, NOT_IN_PUBMED, read_documents
from megatron_med.corpus.personal import redact
from megatron_med.corpus.pubmed_xml import read_citations
from megatron_med.corpus.records import read_records, text_field
from megatron_med.corpus.text import escape_special_tokens, normalize_whitespace, remove_urls
from megatron_med.errors import DataError
from megatron_med.tokenizer.special import CORPUS_TOKENS


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("See https://www.cdc.gov/flu/ for more.", "See for more."),
        ("Data (http://a.org/x_(1).html) are open.", "Data are open."),
        ("as in (CDC, https://cdc.gov/flu).", "as in (CDC)."),
        ("Go to www.jnma.com.np, please; www alone stays", "Go to, please; www alone stays"),
        ("p = 0.05 (n = 3) [see text]", "p = 0.05 (n = 3) [see text]"),
    ],
)
def test_urls_leave_no_hole(text: str, clean: str) -> None:
    found = re.sub(r" +([.,])", r"\1", normalize_whitespace(remove_urls(text)))
    assert found == clean


def test_white_space_and_invisible_characters() -> None:
    raw = "\ufeffa\u200b b\u00a0\u2009c\t d\r\n\r\n\r\n\r\ne\u2028f \u00ad\x00g"
    assert normalize_whitespace(raw) == "a b c d\n\ne\nf g"


def test_special_token_strings_of_raw_text_stay_text() -> None:
    raw = "The [table] shows [formula] = x, [/table] and [Table] and [1]."
    found = escape_special_tokens(raw)
    assert found == "The (table) shows (formula) = x, (/table) and [Table] and [1]."
    assert len(found) == len(raw), "annotations are offsets"
    assert not any(token in found for token in CORPUS_TOKENS)


GUIDELINE = """## Fever in children [1]

See [our page](https://who.int/fever_(child)) for **details** [2, 3-5].
* Paracetamol 15 mg/kg. - Fluids.
o Rest<br/> &amp; sleep
==========

#### When to refer
Dose of 5 - 10 mg is common.

##### References
1. Smith J. Lancet 2001.

##### Dosing
◆ Twice a day

### References
2. Jones K.
"""


def test_a_guideline_without_links_references_and_furniture() -> None:
    assert clean_guideline(GUIDELINE, "Fever in children") == (
        "# Fever in children\n\nSee our page for details.\n- Paracetamol 15 mg/kg.\n- Fluids.\n- Rest & sleep\n\n"
        "### When to refer\nDose of 5 - 10 mg is common.\n\n### Dosing\n- Twice a day"
    )
    assert clean_guideline("Give oxygen.", "Asthma") == "# Asthma\n\nGive oxygen."
    assert clean_guideline(" \n==\n", "Asthma") == ""


def test_real_guidelines_lose_links_and_nothing_else(shared: Path) -> None:
    for _, record in read_records(shared / "guidelines" / "nih_guidelines.jsonl"):
        text = clean_guideline(record["raw_text"], record["title"])
        assert text.lstrip("# ").startswith(record["title"][:20].strip())
        assert not re.search(r"https?://|^#{4}|\n{3}|^[•*] ", text, re.MULTILINE)
        kept = len(re.findall(r"\w+", text)) / len(re.findall(r"\w+", record["raw_text"]))
        assert kept > 0.9, record["id"]


PERSONAL = [
    ("mail a.b-c@ward3.hospital.org or x (at) y.com now", {"email": 2}),
    ("call (212) 555-0199, tel. +41 44 123 45 67, fax: 020 7946 0958 or 1-800-4-CANCER", {"phone": 4}),
    ("MRN: 00123-456; hospital no. 445566; SSN 123-45-6789; NHS number 943 476 5919", {"record_number": 4}),
    ("Patient: John A. Smith\nAge: 44\nDear Dr. Jones, thank you", {"name": 2}),
    ("Patient name: Müller, Anna-Maria\nDiagnosis: asthma", {"name": 1}),
]


@pytest.mark.parametrize(("text", "found"), PERSONAL)
def test_personal_data_is_found_and_counted(text: str, found: dict[str, int]) -> None:
    redacted, counts = redact(text)
    assert dict(counts) == found
    for kind, count in found.items():
        assert redacted.count(f"<{kind}>") == count
    assert redact(redacted)[1].total() == 0


@pytest.mark.parametrize(
    "text",
    [
        "J Pediatr Surg. 2009 Apr;54(5):516-28, doi 10.1136/bmj.38945.573-1234, NCT01234567, ISRCTN48489393",
        "1435.67 (95-1000) patients, 82 000 in 2012-2013, P < 0.001, 120/80 mmHg, PMC 10231538, 37203959",
        "Patients: 120 were randomised. Name: the primary outcome. Dear colleague, the case record form 12 was used.",
        "Smith et al. wrote at length. Case 3: Type 2 diabetes. 3-4-2010 to 12-11-2012, ratio 555-12",
    ],
)
def test_what_papers_are_full_of_is_no_personal_data(text: str) -> None:
    assert redact(text) == (text, {})


def test_real_abstracts_hold_none(shared: Path) -> None:
    hits = [
        record["id"]
        for _, record in read_records(shared / "pubmed" / "abstracts_medline.jsonl")
        if redact(record["text"])[1]
    ]
    assert hits == []


def test_names_below_the_header_stay() -> None:
    body = "\n".join(["A line."] * 20 + ["Patient: John Smith"])
    assert redact(body)[1] == {}


def test_language_is_told_without_a_mistake_on_real_text(shared: Path) -> None:
    keep = LanguageFilter("en", 2000)
    english = [record for _, record in read_records(shared / "pubmed" / "abstracts_ccby.jsonl")][:400]
    french = [record for _, record in read_records(shared / "pubmed" / "non_english_fr.jsonl")]
    assert all(keep.filter(Document(record["text"], "x")) is True for record in english)
    assert {keep.filter(Document(record["text"], "x")) for record in french} == {(False, "language fr")}


def test_splits_depend_on_the_id_alone() -> None:
    fractions = [fraction_of(1234, "valid", f"pubmed:{number}") for number in range(20_000)]
    share = sum(fraction < 0.03 for fraction in fractions) / len(fractions)
    assert abs(share - 0.03) < 0.004
    assert fraction_of(1234, "valid", "pubmed:7") == fractions[7]
    assert fraction_of(1235, "valid", "pubmed:7") != fractions[7]
    assert fraction_of(1234, "share", "pubmed:7") != fractions[7]


def pubmed_xml(records: list[dict[str, Any]]) -> str:
    """Real abstracts in the form of the NLM's baseline files."""
    articles = [
        f"""<PubmedArticle><MedlineCitation Status="MEDLINE"><PMID Version="1">{record["id"]}</PMID>
        <Article PubModel="Print"><Journal><JournalIssue><PubDate><Year>{record["year"]}</Year></PubDate></JournalIssue>
        <Title>{escape(record["journal"])}</Title></Journal>
        <ArticleTitle>{escape(record["title"]).replace("in vivo", "<i>in vivo</i>")}</ArticleTitle>
        <Abstract><AbstractText>{escape(record["text"])}</AbstractText></Abstract>
        <Language>eng</Language></Article></MedlineCitation><PubmedData><ArticleIdList>
        <ArticleId IdType="pubmed">{record["id"]}</ArticleId><ArticleId IdType="pmc">{record["pmcid"]}</ArticleId>
        </ArticleIdList></PubmedData></PubmedArticle>"""
        for record in records
    ]
    doctype = '"-//NLM//DTD PubMedArticle, 1st January 2025//EN" "pubmed_250101.dtd"'
    head = f'<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE PubmedArticleSet PUBLIC {doctype}>\n'
    return f"{head}<PubmedArticleSet>{''.join(articles)}</PubmedArticleSet>"


def test_baseline_xml_gives_the_abstracts_that_the_records_give(shared: Path, tmp_path: Path) -> None:
    source = shared / "pubmed" / "abstracts_ccby.jsonl"
    records = [record for _, record in read_records(source)][:300]
    path = tmp_path / "pubmed26n0001.xml.gz"
    path.write_bytes(gzip.compress(pubmed_xml(records).encode()))
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    from_xml = list(read_documents(path, "pubmed_xml", None))
    from_json = list(read_documents(tmp_path / "same.jsonl", "abstracts", None))
    assert [(d.id, " ".join(d.text.split())) for d in from_xml] == [(d.id, " ".join(d.text.split())) for d in from_json]
    assert [set(d.keys) <= set(e.keys) for d, e in zip(from_xml, from_json, strict=True)] == [True] * 300
    assert from_xml[0].metadata["journal"] == records[0]["journal"]


def test_structured_abstracts_keep_their_labels_and_markup_its_text() -> None:
    xml = b"""<PubmedArticleSet><PubmedArticle><MedlineCitation><PMID>7</PMID><Article>
    <ArticleTitle>CO<sub>2</sub> <i>in vitro</i></ArticleTitle><Abstract>
    <AbstractText Label="BACKGROUND" NlmCategory="BACKGROUND">Rest &lt; 5.</AbstractText>
    <AbstractText Label="RESULTS">Good.</AbstractText><CopyrightInformation>(c) 2020</CopyrightInformation></Abstract>
    </Article></MedlineCitation></PubmedArticle><PubmedArticle><MedlineCitation><PMID>8</PMID><Article>
    <ArticleTitle>Only a title</ArticleTitle></Article></MedlineCitation></PubmedArticle></PubmedArticleSet>"""
    first, second = read_citations(io.BytesIO(xml), "a.xml")
    assert (first.title, first.abstract) == ("CO2 in vitro", "Background: Rest < 5.\nResults: Good.")
    assert first.copyright == "(c) 2020"
    assert second.abstract == ""


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"<PubmedArticleSet><PubmedArticle>", "a.xml:1: broken XML after 0 articles"),
        (b"<html></html>", "a.xml begins with <html>, not <PubmedArticleSet>"),
        (b"<PubmedArticleSet><PubmedArticle/></PubmedArticleSet>", "a.xml, article 1: no 'MedlineCitation/PMID'"),
    ],
)
def test_broken_xml_is_named(xml: bytes, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        list(read_citations(io.BytesIO(xml), "a.xml"))


def test_what_is_not_in_pubmed_or_has_no_text_says_so(shared: Path) -> None:
    sample = list(read_documents(shared / "s2orc" / "s2ag_abstracts_sample.jsonl", "s2ag_abstracts", None))
    assert len(sample) == 50
    assert {document.dropped for document in sample} <= {NOT_IN_PUBMED, ""}
    assert all(bool(document.text) != bool(document.dropped) for document in sample)
    odd = list(read_documents(shared / "pubmed" / "abstracts_odd.jsonl", "abstracts", None))
    assert sum(document.dropped == NO_TEXT for document in odd) == 40


def test_fields_are_named_with_their_line() -> None:
    record = {"a": {"b": 5, "c": None, "d": True}, "t": ["x"]}
    assert text_field(record, "a.b", "f:3") == "5"
    assert text_field(record, "a.c", "f:3") == text_field(record, "z", "f:3", required=False) == ""
    for name, message in (
        ("z", "f:3: no field 'z' (there are: a, t)"),
        ("t", "f:3: 't' is a list, not text"),
        ("a.d", "f:3: 'a.d' is true or false, not text"),
        ("t.x", "f:3: 't.x' cannot be read: 'x' is sought in a list"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            text_field(record, name, "f:3")


def test_a_record_of_millions_of_letters_is_told_or_counted(tmp_path: Path) -> None:
    """It is not read whole: a file without line ends may be larger than the memory."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + b"x " * (1 << 23) + b'"}\n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"records.jsonl:2: longer than 16 MiB.*Split the record"):
        list(read_records(path))
    faults: list[DataError] = []
    kept = list(read_records(path, faults.append))
    assert [place.rsplit(":", 1)[1] for place, _ in kept] == ["1", "3"]
    assert len(faults) == 1
