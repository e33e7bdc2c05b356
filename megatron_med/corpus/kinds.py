"""The kinds of raw sources: each turns the records of a file into documents, or says why there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_med.corpus.catalogue import Catalogue, CatalogueEntry, corpus_id
from megatron_med.corpus.guidelines import clean_guideline
from megatron_med.corpus.pubmed_xml import read_citations
from megatron_med.corpus.records import Fault, fail, read_records, text_field
from megatron_med.corpus.s2orc import format_paper
from megatron_med.corpus.text import escape_special_tokens, normalize_characters, normalize_whitespace, remove_urls
from megatron_med.data.compressed import open_input
from megatron_med.errors import DataError

NO_TEXT = "no text"
NOT_IN_PUBMED = "not in PubMed or PMC"


@dataclass
class RawDocument:
    """One record after cleaning.

    Attributes:
        id: of the document, unique within the corpus and the same in every run.
        text: clean text; empty where ``dropped`` says why.
        keys: names of the record in other collections, ``pmid:123``; equal keys mean the same document.
        metadata: title, year, licence and the like.
        dropped: why the record yields no document, or "".
        raw_characters: length of the text before cleaning.
    """

    id: str
    text: str
    keys: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""
    raw_characters: int = 0


def s2orc(record: dict[str, Any], place: str, catalogue: Catalogue | None) -> RawDocument:
    """Full texts in the S2ORC bulk format; title and licence come from the catalogue."""
    number = corpus_id(record, place)
    entry = _entry(catalogue, number)
    pmid = entry.pmid or text_field(record, "externalids.pubmed", place, required=False)
    pmcid = entry.pmcid or text_field(record, "externalids.pubmedcentral", place, required=False)
    pmcid = pmcid.removeprefix("PMC")
    document = RawDocument(f"s2orc:{number}", "", _keys(number, pmid, pmcid), _metadata(entry, pmid, pmcid))
    raw = text_field(record, "content.text", place)
    document.raw_characters = len(raw)
    if not pmid and not pmcid:
        document.dropped = NOT_IN_PUBMED
    elif raw:
        document.text = format_paper(record, entry.title, place)
    return _or_dropped(document)


def s2ag_abstracts(record: dict[str, Any], place: str, catalogue: Catalogue | None) -> RawDocument:
    """The Semantic Scholar "abstracts" data set; title and PubMed id come from the catalogue."""
    number = corpus_id(record, place)
    entry = _entry(catalogue, number)
    pmcid = entry.pmcid or text_field(record, "openaccessinfo.externalids.PubMedCentral", place, required=False)
    pmcid = pmcid.removeprefix("PMC")
    abstract = text_field(record, "abstract", place)
    identifier = f"pubmed:{entry.pmid}" if entry.pmid else f"s2ag:{number}"
    document = _abstract(identifier, entry.title, abstract, _keys(number, entry.pmid, pmcid))
    document.metadata = _metadata(entry, entry.pmid, pmcid) | document.metadata
    if not entry.pmid and not pmcid:
        document.dropped, document.text = NOT_IN_PUBMED, ""
    return document


def abstracts(record: dict[str, Any], place: str, catalogue: Catalogue | None) -> RawDocument:
    """Abstracts as ``{"id": PubMed id, "title", "text"}`` with optional ``pmcid``, ``corpusid``, ``license``."""
    pmid = text_field(record, "id", place)
    pmcid = text_field(record, "pmcid", place, required=False).removeprefix("PMC")
    number = text_field(record, "corpusid", place, required=False)
    title, text = text_field(record, "title", place), text_field(record, "text", place)
    document = _abstract(f"pubmed:{pmid}", title, text, _keys(number, pmid, pmcid))
    document.metadata |= {name: record[name] for name in ("license", "year", "journal") if record.get(name) is not None}
    return document


def pubmed_xml(path: Path) -> Iterator[RawDocument]:
    """PubMed baseline and update files of the NLM."""
    with open_input(path) as stream:
        for citation in read_citations(stream, str(path)):
            keys = _keys("", citation.pmid, citation.pmcid)
            document = _abstract(f"pubmed:{citation.pmid}", citation.title, citation.abstract, keys)
            facts = {"journal": citation.journal, "year": citation.year, "license": citation.copyright}
            document.metadata |= {name: value for name, value in facts.items() if value}
            yield document


def guidelines(record: dict[str, Any], place: str, catalogue: Catalogue | None) -> RawDocument:
    """Guidelines as ``{"title", "raw_text" or "text", "id" and "source" if known}``."""
    raw = text_field(record, "raw_text" if "raw_text" in record else "text", place)
    title = text_field(record, "title", place, required=False)
    text = escape_special_tokens(clean_guideline(raw, title))
    source = text_field(record, "source", place, required=False)
    name = text_field(record, "id", place, required=False) or _digest(raw)
    metadata = {"title": title, "body": source, "url": record.get("url"), "license": record.get("license")}
    metadata = {key: value for key, value in metadata.items() if value}
    return _or_dropped(
        RawDocument(
            f"guideline:{source}/{name}" if source else f"guideline:{name}",
            text,
            metadata=metadata,
            raw_characters=len(raw),
        )
    )


def redpajama(record: dict[str, Any], place: str, catalogue: Catalogue | None) -> RawDocument:
    """Replay text as ``{"text", "meta": {...}}``; nothing is cleaned but characters that cannot be seen."""
    raw = text_field(record, "text", place)
    meta = record.get("meta")
    metadata = {"meta": meta} if isinstance(meta, dict) else {}
    text = escape_special_tokens(normalize_characters(raw)).strip("\n")
    return _or_dropped(RawDocument(f"replay:{_digest(raw)}", text, metadata=metadata, raw_characters=len(raw)))


_RECORDS = {
    "s2orc": s2orc,
    "s2ag_abstracts": s2ag_abstracts,
    "abstracts": abstracts,
    "guidelines": guidelines,
    "redpajama": redpajama,
}


def read_documents(path: Path, kind: str, catalogue: Catalogue | None, fault: Fault = fail) -> Iterator[RawDocument]:
    """The documents of one raw file.

    Args:
        path: the file; plain, ``.gz`` or ``.zst``.
        kind: what its records look like, as a recipe names it.
        catalogue: titles and PubMed ids by corpus id, for the kinds of Semantic Scholar.
        fault: what to do with a record that cannot be read.

    Raises:
        DataError: names file, line and field.
    """
    if kind == "pubmed_xml":
        yield from pubmed_xml(path)
        return
    for place, record in read_records(path, fault):
        try:
            document = _RECORDS[kind](record, place, catalogue)
        except DataError as error:
            fault(error)
        else:
            yield document


def _abstract(identifier: str, title: str, abstract: str, keys: list[str]) -> RawDocument:
    text = escape_special_tokens(normalize_whitespace(remove_urls(abstract)))
    heading = escape_special_tokens(normalize_whitespace(title))
    metadata = {"title": heading} if heading else {}
    document = RawDocument(identifier, text, keys, metadata, raw_characters=len(abstract))
    if text and heading and not text.startswith(heading):
        document.text = f"{heading}\n\n{text}"
    return _or_dropped(document)


def _or_dropped(document: RawDocument) -> RawDocument:
    if not document.text.strip() and not document.dropped:
        document.dropped = NO_TEXT
    return document


def _entry(catalogue: Catalogue | None, number: int) -> CatalogueEntry:
    found = catalogue.find(number) if catalogue else None
    return found or CatalogueEntry(number, "", "", "", None, "")


def _keys(number: int | str, pmid: str, pmcid: str) -> list[str]:
    named = (("corpusid", str(number)), ("pmid", pmid), ("pmcid", pmcid))
    return [f"{name}:{value}" for name, value in named if value]


def _metadata(entry: CatalogueEntry, pmid: str, pmcid: str) -> dict[str, Any]:
    facts = {"title": entry.title, "pmid": pmid, "pmcid": pmcid, "year": entry.year, "license": entry.license}
    return {name: value for name, value in facts.items() if value}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=10).hexdigest()
