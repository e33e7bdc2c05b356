"""The steps of a corpus build as datatrove blocks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import py3langid
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from loguru import logger

from megatron_med.corpus.catalogue import Catalogue, read_papers
from megatron_med.corpus.duplicates import documents_with_keys, read_removals
from megatron_med.corpus.kinds import read_documents
from megatron_med.corpus.personal import redact
from megatron_med.corpus.records import fail, read_records
from megatron_med.errors import DataError

EXCERPT = 600
"""Characters of a removed document that are kept for the report."""

NOT_DRAWN = "not drawn"
BAD_RECORD = "bad record"


def fraction_of(seed: int, purpose: str, identifier: str) -> float:
    """A number in [0, 1) that depends on the document's id alone: the same in every run, whatever else is built."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{identifier}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def text_writer(folder: Path, name: str = "${rank}.jsonl") -> JsonlWriter:
    """A writer of whole documents. Zstandard, because gzip files carry the time they were written."""
    return JsonlWriter(str(folder), name, compression="zstd")


class RemovedWriter(JsonlWriter):
    """Writes removed documents: their beginning, and why."""

    name = "removed"

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), compression="zstd")

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        metadata = {key: value for key, value in document.metadata.items() if key != "keys"}
        return {"id": document.id, "text": document.text[:EXCERPT], "length": len(document.text), "metadata": metadata}


class RawReader(BaseReader):
    """Reads one raw file a task and yields its documents; records that yield none are counted by reason.

    Args:
        files: task ``i`` reads ``files[i]``.
        kind: what the records look like.
        defaults: metadata of every document.
        catalogue: SQLite file, for the kinds that need one.
        share, seed: share of documents taken, drawn by id.
        skip_bad: leave out what cannot be read, instead of failing.
    """

    name = "raw records"

    def __init__(
        self,
        files: list[Path],
        kind: str,
        defaults: dict[str, Any],
        catalogue: Path | None = None,
        share: float = 1.0,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        super().__init__()
        self.files = files
        self.kind = kind
        self.defaults = defaults
        self.catalogue = catalogue
        self.share = share
        self.seed = seed
        self.skip_bad = skip_bad

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        catalogue = Catalogue(self.catalogue) if self.catalogue else None
        fault = self._left_out if self.skip_bad else fail
        for raw in read_documents(self.files[rank], self.kind, catalogue, fault):
            reason = raw.dropped
            if not reason and fraction_of(self.seed, "share", raw.id) >= self.share:
                reason = NOT_DRAWN
            self.stat_update("total", f"dropped_{reason}" if reason else "forwarded")
            self.stat_update("raw_characters", value=raw.raw_characters)
            if not reason:
                # A guideline's number means something within its own collection only.
                name = f"{self.defaults['source']}/{raw.id}" if self.kind == "guidelines" else raw.id
                yield Document(raw.text, name, metadata={**self.defaults, **raw.metadata, "keys": raw.keys})

    def _left_out(self, error: DataError) -> None:
        self.stat_update("total", f"dropped_{BAD_RECORD}")
        logger.warning(f"left out: {error}")


class ShardReader(BaseReader):
    """Reads back one shard a task, in the order it was written.

    Args:
        shards: task ``i`` reads ``shards[i]``; a shard without documents has no file.
        keys: what ``KeyWriter`` wrote of each, which tells how many documents there must be.
    """

    name = "shards"

    def __init__(self, shards: list[Path], keys: list[Path]) -> None:
        super().__init__()
        self.shards = shards
        self.keys = keys

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shard, count = self.shards[rank], 0
        if shard.exists():
            for _, record in read_records(shard):
                count += 1
                yield Document(record["text"], record["id"], metadata=record["metadata"])
        self.stat_update("total", value=count)
        expected = documents_with_keys(self.keys[rank])
        if count != expected:
            raise DataError(
                f"{shard} holds {count:,} documents and held {expected:,} when it was written: remove the folder of "
                f"this source under work/logs (extract-{shard.parent.name}) and start again."
            )


class LanguageFilter(BaseFilter):
    """Keeps one language, told from the beginning of the text by py3langid."""

    name = "language"

    def __init__(self, language: str, characters: int, exclusion_writer: JsonlWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.language = language
        self.characters = characters

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        found, _ = py3langid.classify(doc.text[: self.characters])
        doc.metadata["language"] = found
        return found == self.language or (False, f"language {found}")


class PersonalDataGate(BaseFilter):
    """Redacts or drops documents with personal data; what is found is counted by kind."""

    name = "personal data"

    def __init__(self, actions: dict[str, str], exclusion_writer: JsonlWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.actions = actions

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        wanted = {kind for kind, action in self.actions.items() if action != "keep"}
        text, found = redact(doc.text, wanted)
        for kind, count in found.items():
            self.stat_update(f"found_{kind}", value=count)
        drop = sorted(kind for kind in found if self.actions[kind] == "drop")
        if found:
            self.stat_update("redacted_documents", value=0 if drop else 1)
            doc.text = text
            doc.metadata["personal_data"] = dict(found)
        return (False, f"personal data: {', '.join(drop)}") if drop else True


class DropListed(BaseFilter):
    """Drops the documents that a list of removals names, by their place in the shard."""

    name = "duplicates"

    def __init__(self, removals: Path, shards: list[str], exclusion_writer: JsonlWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.removals = removals
        self.shards = shards
        self._listed: dict[int, tuple[str, int, int]] = {}
        self._number = -1

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self._listed, self._number = read_removals(self.removals, rank), -1
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        self._number += 1
        if self._number not in self._listed:
            return True
        reason, shard, _ = self._listed[self._number]
        doc.metadata["duplicate_of"] = self.shards[shard].split("/")[0]
        return False, reason


class Split(PipelineStep):
    """Tells training from validation documents by the hash of their ids, and takes out what only the build needs."""

    type = "✂️ - SPLIT"
    name = "split"

    def __init__(self, seed: int, shares: dict[str, float]) -> None:
        super().__init__()
        self.seed = seed
        self.shares = shares

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        characters: Counter[str] = Counter()
        for document in data:
            source = document.metadata["source"]
            held_out = fraction_of(self.seed, "valid", document.id) < self.shares[source]
            document.metadata["split"] = "valid" if held_out else "train"
            document.metadata.pop("keys", None)
            self.stat_update(f"{document.metadata['split']}_documents")
            characters[document.metadata["split"]] += len(document.text)
            yield document
        for split, count in characters.items():
            self.stat_update(f"{split}_characters", value=count)


class CatalogueReader(PipelineStep):
    """Passes the papers of PubMed and PMC of one "papers" file a task to a shard of the catalogue."""

    type = "📖 - READER"
    name = "catalogue"

    def __init__(self, files: list[Path], folder: Path) -> None:
        super().__init__()
        self.files = files
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{rank:05d}.jsonl").open("wb") as shard:
            for entry in read_papers(self.files[rank]):
                self.stat_update("total")
                shard.write(orjson.dumps(asdict(entry), option=orjson.OPT_APPEND_NEWLINE))
        yield from ()
