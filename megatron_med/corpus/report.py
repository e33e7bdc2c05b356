"""What a corpus is made of, gathered from its manifest, from what was removed, and from a sample of its text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_med.corpus.manifest import STEPS, read_manifest, verify_manifest
from megatron_med.corpus.records import read_records
from megatron_med.data.indexed import IndexedDataset, token_paths
from megatron_med.tokenizer.special import CORPUS_TOKENS

SAMPLE = 20_000
"""Documents of each source that lengths and words are counted in."""
EXAMPLES = 3
"""Removed texts that are shown for each reason and source."""
TOP_WORDS = 15

_TOKEN = re.compile("|".join(map(re.escape, CORPUS_TOKENS)))
_WORD = re.compile(r"[^\W\d_][\w'’-]{2,}")
_STOP_WORDS = """
about above after again all also although among and any are because been before being below between both but can
could did does doing down during each either first for from further had has have having here high his how
however however into its itself less low may more most much not now off only other our out over own per same
several she should since some such than that the their them then there these they this those three through thus
too two under until use used using very was well were what when where whether which while who will with within
without would you your one many might must her him
"""


@dataclass
class SourceFacts:
    """One source of the corpus.

    Attributes:
        read: documents in the raw files.
        removed: by step, then by reason.
        found: personal data, by kind.
        documents, characters, tokens: by split; tokens are absent where the corpus has no token files.
        lengths: characters of sampled documents.
        words: how often each word occurs in them.
        licenses: documents by licence.
    """

    license: str
    read: int = 0
    removed: dict[str, Counter[str]] = field(default_factory=lambda: {step: Counter() for step in STEPS})
    found: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        return sum(self.documents.values())

    def languages(self) -> Counter[str]:
        """Documents that had text, by language."""
        other = {reason.removeprefix("language "): count for reason, count in self.removed["language"].items()}
        dropped_before = sum(self.removed["raw records"].values())
        return Counter({"kept": self.read - dropped_before - sum(other.values()), **other})


@dataclass
class Removed:
    """A document that was removed, or the beginning of it."""

    source: str
    step: str
    reason: str
    id: str
    text: str
    length: int
    metadata: dict[str, Any]


@dataclass
class CorpusFacts:
    """All that the report shows."""

    root: Path
    code: str
    shards: int
    sources: dict[str, SourceFacts]
    questions: dict[str, dict[str, int]]
    duplicates: Counter[tuple[str, str]]
    """(source of the removed document, source of the one that stayed): documents."""
    examples: list[Removed]
    has_work: bool
    """Whether the folder with the removed texts is still there."""


def gather(root: Path) -> CorpusFacts:
    """Reads a finished corpus.

    Raises:
        DataError: it is not finished, or its files are not those of its manifest.
    """
    shards = verify_manifest(root)
    manifest = read_manifest(root)
    sources = {name: SourceFacts(source["license"]) for name, source in manifest["sources"].items()}
    for item in manifest["inputs"]:
        _add_steps(sources[item["source"]], item["steps"])
    for shard in manifest["shards"]:
        facts, split = sources[shard["source"]], shard["split"]
        facts.documents[split] += shard["documents"]
        facts.characters[split] += shard["characters"]
        facts.licenses.update(shard["licenses"])
        if len(facts.lengths) < SAMPLE:
            _add_text(facts, root / shard["file"])
        prefix = root / f"{shard['source']}-{split}"
        if token_paths(prefix)[1].is_file():
            facts.tokens[split] = IndexedDataset(prefix).token_count
    duplicates: Counter[tuple[str, str]] = Counter()
    examples: list[Removed] = []
    shown: Counter[tuple[str, str]] = Counter()
    for removed in _removed(root / "work" / "removed"):
        if "duplicate_of" in removed.metadata:
            duplicates[removed.source, removed.metadata["duplicate_of"]] += 1
        if shown[removed.source, removed.reason] < EXAMPLES:
            shown[removed.source, removed.reason] += 1
            examples.append(removed)
    return CorpusFacts(
        root,
        manifest["code"],
        shards,
        sources,
        manifest["questions"],
        duplicates,
        examples,
        (root / "work" / "removed").is_dir(),
    )


def _add_steps(facts: SourceFacts, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        facts.read += step["before"] if step["step"] == "raw records" else 0
        facts.removed[step["step"]].update(step["removed"])
        facts.found.update(step.get("found", {}))


def _add_text(facts: SourceFacts, shard: Path) -> None:
    stop_words = frozenset(_STOP_WORDS.split())
    for _, record in read_records(shard):
        facts.lengths.append(len(record["text"]))
        words = (word.lower() for word in _WORD.findall(_TOKEN.sub(" ", record["text"][:20_000])))
        facts.words.update(word for word in words if word not in stop_words)
        if len(facts.lengths) >= SAMPLE:
            return


def _removed(folder: Path) -> Iterator[Removed]:
    for path in sorted(folder.rglob("*.jsonl.zst")):
        step = path.relative_to(folder).parts[0].replace("_", " ")
        for _, record in read_records(path):
            metadata = record["metadata"]
            reason = metadata.get("filter_reason", step)
            yield Removed(metadata["source"], step, reason, record["id"], record["text"], record["length"], metadata)
