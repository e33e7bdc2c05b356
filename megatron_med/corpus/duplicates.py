"""Finds documents that are there twice: by id, by text, and by likeness (MinHash, with datatrove's signatures).

Shards are numbered over all sources in the recipe's order, so that of two equal documents the one of the source named
first stays, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from megatron_med.corpus.text import normalized_key

REASONS = ("same id", "same PubMed, PMC or corpus id", "same text", "same beginning", "near duplicate")
"""Why a document is a duplicate, in the order in which reasons are tried."""

BEGINNING = 500
"""Normalised characters that tell two guidelines apart (Chen et al. 2023)."""

_KEY = np.dtype([("key", "<u8"), ("document", "<u4"), ("reason", "u1")])
_REMOVAL = np.dtype([("document", "<u4"), ("reason", "u1"), ("shard", "<u4"), ("kept", "<u4")])

Removals = npt.NDArray[Any]


class Words(WordTokenizer):
    """Words of text from which punctuation is gone: what stands between spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def minhash_config(seed: int) -> MinhashConfig:
    """5-grams, 14 buckets of 8 hashes: likeness 0.75 is found with 0.77, 0.8 with 0.92, 0.9 with 0.9999."""
    return MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, seed=seed)


def document_keys(document: Document, by_beginning: bool) -> list[tuple[int, int]]:
    """``(hash, reason)`` of everything that may not occur twice."""
    text = normalized_key(document.text)
    named = [(f"id:{document.id}", 0), *((key, 1) for key in document.metadata.get("keys", [])), (f"text:{text}", 2)]
    if by_beginning:
        named.append((f"beginning:{text[:BEGINNING]}", 3))
    return [(int.from_bytes(_digest(name), "little"), reason) for name, reason in named]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()


class KeyWriter(PipelineStep):
    """Writes the keys of a shard's documents while they pass.

    Args:
        folder: for one file a shard.
        by_beginning: guidelines: equal beginnings are duplicates too.
    """

    type = "🫂 - DEDUP"
    name = "keys"

    def __init__(self, folder: Path, by_beginning: bool) -> None:
        super().__init__()
        self.folder = folder
        self.by_beginning = by_beginning

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        rows = []
        for number, document in enumerate(data):
            rows += [(key, number, reason) for key, reason in document_keys(document, self.by_beginning)]
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{rank:05d}.npy", np.array(rows, dtype=_KEY))


def documents_with_keys(file: Path) -> int:
    """How many documents ``KeyWriter`` has seen in a shard."""
    rows = np.load(file)
    return int(rows["document"].max()) + 1 if len(rows) else 0


def find_key_duplicates(key_files: list[Path], folder: Path) -> None:
    """Writes for every shard which of its documents repeat one before that stays, in order of shard and document.

    A document goes only for one that stays: rounds decide those that are first in all of their groups (they stay) and
    then the others of these groups (they go), until all are decided.
    """
    keys = [np.load(file) for file in key_files]
    shard = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(rows) for rows in keys])
    rows = np.concatenate(keys) if keys else np.empty(0, _KEY)
    begins = np.cumsum([0, *(int(part["document"].max()) + 1 if len(part) else 0 for part in keys)])
    node = begins[shard] + rows["document"]  # number of the document over all shards
    order = np.lexsort((rows["reason"], node, rows["key"]))
    rows, shard, node = rows[order], shard[order], node[order]
    stays = np.zeros(int(begins[-1]), dtype=bool)
    decided = np.zeros(int(begins[-1]), dtype=bool)
    found = []
    left = np.arange(len(rows))
    while len(left):
        key, of = rows["key"][left], node[left]
        first = np.ones(len(left), dtype=bool)
        first[1:] = key[1:] != key[:-1]
        head = left[np.maximum.accumulate(np.where(first, np.arange(len(left)), 0))]  # first row of the group
        leads = node[head] == of  # a document may have one key twice
        stays[of] = True
        stays[of[~leads]] = False
        decided[of[stays[of]]] = True
        goes = ~leads & stays[node[head]]
        found.append((left[goes], head[goes]))
        decided[of[goes]] = True
        left = left[~decided[of] & ~stays[node[head]]]
    again, kept = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (order, order)
    removals = np.empty(len(again), _REMOVAL)
    removals["document"], removals["reason"] = rows["document"][again], rows["reason"][again]
    removals["shard"], removals["kept"] = shard[kept], rows["document"][kept]
    _write_removals(removals, shard[again], len(keys), folder)


def find_near_duplicates(pair_files: list[Path], shards: int, folder: Path) -> None:
    """From datatrove's pairs of alike documents, writes which to remove: all but the first of each connected group."""
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(node: tuple[int, int]) -> tuple[int, int]:
        path = []
        while (above := parent.setdefault(node, node)) != node:
            path.append(node)
            node = above
        for passed in path:
            parent[passed] = node
        return node

    for file in pair_files:
        for pair in np.fromfile(file, dtype="<u4").reshape(-1, 4).tolist():
            one, other = root((pair[0], pair[1])), root((pair[2], pair[3]))
            if one != other:
                parent[max(one, other)] = min(one, other)
    again = [(node, root(node)) for node in parent if root(node) != node]
    removals = np.array([(node[1], 4, kept[0], kept[1]) for node, kept in again], dtype=_REMOVAL)
    _write_removals(removals, np.array([node[0] for node, _ in again], dtype=np.uint32), shards, folder)


def _write_removals(removals: Removals, shard: npt.NDArray[np.uint32], shards: int, folder: Path) -> None:
    """One file a shard, one row a document: its first reason in the order of ``REASONS``."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.lexsort((removals["reason"], removals["document"], shard))
    removals, shard = removals[order], shard[order]
    borders = np.searchsorted(shard, np.arange(shards + 1))
    for number in range(shards):
        rows = removals[borders[number] : borders[number + 1]]
        np.save(folder / f"{number:05d}.npy", rows[np.unique(rows["document"], return_index=True)[1]])


def read_removals(folder: Path, shard: int) -> dict[int, tuple[str, int, int]]:
    """``document: (reason, shard and document that stay)`` of one shard."""
    rows = np.load(folder / f"{shard:05d}.npy").tolist()
    return {document: (REASONS[reason], other, kept) for document, reason, other, kept in rows}
