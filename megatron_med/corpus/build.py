"""Builds a corpus from a recipe: the stages in order, and the record of what they did.

Everything is below ``recipe.output``: ``SOURCE-train/`` and ``SOURCE-valid/`` (text), ``SOURCE-train.bin/.idx/.json``
(tokens), ``manifest.json``, and ``work/`` with what can be deleted when the manifest is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature

from megatron_med.corpus import manifest
from megatron_med.corpus.blocks import (
    CatalogueReader,
    DropListed,
    LanguageFilter,
    PersonalDataGate,
    RawReader,
    RemovedWriter,
    ShardReader,
    Split,
    text_writer,
)
from megatron_med.corpus.catalogue import CatalogueEntry, write_catalogue
from megatron_med.corpus.contamination import QuestionFilter, write_index
from megatron_med.corpus.duplicates import KeyWriter, Words, find_key_duplicates, find_near_duplicates, minhash_config
from megatron_med.corpus.executors import Stage, is_finished, run_stages
from megatron_med.corpus.recipe import CorpusRecipe
from megatron_med.corpus.records import read_records
from megatron_med.data.merge import merge_datasets
from megatron_med.data.preprocess import PreprocessOptions, preprocess
from megatron_med.errors import DataError
from megatron_med.files import replacing, sha256, write_json
from megatron_med.tokenizer import load_tokenizer
from megatron_med.tokenizer.special import CORPUS_TOKENS, extend_tokenizer, tokens_of

SPLITS = ("train", "valid")


class Build:
    """The stages of one recipe and where each finds its files.

    Args:
        recipe: what to build.
    """

    def __init__(self, recipe: CorpusRecipe) -> None:
        self.recipe = recipe
        self.root = Path(recipe.output)
        self.work = self.root / "work"
        self.logs = self.work / "logs"
        self.inputs = {name: recipe.inputs(name) for name in recipe.sources}
        self.shards = [f"{name}/{number:05d}" for name, files in self.inputs.items() for number in range(len(files))]
        """Every shard of the corpus, one for each raw file, in order of precedence."""

    def stages(self) -> list[Stage]:
        """Every stage in order."""
        # What records are looked up in comes before they are read.
        stages = self._catalogue()
        if self.recipe.quality.questions:
            stages.append(Stage("questions", [self._index_questions], 1))
        # Each raw file by itself, then what needs all of them: which copy of a document stays.
        stages += map(self._extract, self.recipe.sources)
        stages.append(Stage("duplicates", [self._find_key_duplicates], 1))
        if self.recipe.quality.near_duplicates:
            stages += self._near_duplicates()
        # Documents are drawn into splits only now, so that no copy of a training document is held out.
        stages.append(Stage("finish", self._finish(), len(self.shards)))
        return [*stages, *self._tokenize(), Stage("manifest", [self._write_manifest], 1)]

    def run(self, wanted: Callable[[str], bool], report: Callable[[str], None]) -> None:
        """Runs the stages that ``wanted`` names, and says what it does.

        Raises:
            DataError: the folder holds another build, or a stage met data it cannot use.
        """
        self._check_same_build()
        stages = self.stages()
        self._check_what_went_before(stages, wanted)
        run_stages([s for s in stages if wanted(s.name)], self.recipe.execution, self.logs, report)
        if is_finished(stages[-1], self.logs):
            manifest.verify_manifest(self.root, hashes=False)

    def _check_what_went_before(self, stages: list[Stage], wanted: Callable[[str], bool]) -> None:
        """A stage on its own needs what the stages before it write."""
        faults = []
        for number, stage in enumerate(stages):
            before = stages[:number]
            if stage.name in ("questions", "tokenizer"):
                continue  # they read no other stage's files
            # Sources are extracted independently: one needs only what its records are looked up in.
            source = self.recipe.sources.get(stage.name.removeprefix("extract-"))
            if source is not None:
                needed = ("catalogue", "questions") if source.catalogue else ("questions",)
                before = [earlier for earlier in before if earlier.name.startswith(needed)]
            missing = [s.name for s in before if not wanted(s.name) and not is_finished(s, self.logs)]
            if wanted(stage.name) and missing:
                faults.append(f"{stage.name} needs {', '.join(missing)}, not finished yet: run without --stage.")
        if faults:
            raise DataError(faults)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the text depends on: the recipe without its execution, and the files by name and size."""
        plain = dataclasses.asdict(self.recipe)
        # The same corpus may be built by other executors, and its folder may move.
        del plain["execution"], plain["output"]
        files = [*self.recipe.catalogue_inputs(), *(file for files in self.inputs.values() for file in files)]
        files += [Path(questions.path) for questions in self.recipe.quality.questions.values()]
        if self.recipe.tokenization is not None:
            files += load_tokenizer(self.recipe.tokenization.tokenizer).files
        plain["files"] = {str(file): manifest.quick_checksum(file) for file in files}
        return plain

    def _check_same_build(self) -> None:
        # datatrove skips tasks that it has finished, whatever they were of: another recipe must not find them.
        record = self.work / "recipe.json"
        now = self.fingerprint()
        if not record.is_file():
            if self.root.exists() and any(self.root.glob("*-train*")):
                raise DataError(f"{self.root} holds a corpus whose work/ is gone: name another output, or remove it.")
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(record, now, indent=1)
            return
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
        if changed:
            raise DataError(
                f"{self.root} was begun with another recipe or other files (changed: {', '.join(changed)}): name "
                f"another output, or remove {self.root} to build anew."
            )

    def _catalogue(self) -> list[Stage]:
        files = self.recipe.catalogue_inputs()
        if not files:
            return []
        reader = CatalogueReader(files, self.work / "catalogue")
        return [
            Stage("catalogue", [reader], len(files)),
            Stage("catalogue-join", [partial(self._join_catalogue, len(files))], 1),
        ]

    def _join_catalogue(self, files: int, _data: Any, _rank: int, _world_size: int) -> None:
        shards = [self.work / "catalogue" / f"{number:05d}.jsonl" for number in range(files)]
        entries = (CatalogueEntry(**record) for shard in shards for _, record in read_records(shard))
        write_catalogue(self.work / "catalogue.sqlite", entries)

    def _extract(self, name: str) -> Stage:
        source, quality = self.recipe.sources[name], self.recipe.quality
        removed = self.work / "removed"
        reader = RawReader(
            self.inputs[name],
            source.kind,
            {"source": name, "license": source.license},
            self.work / "catalogue.sqlite" if source.catalogue else None,
            source.share,
            self.recipe.seed,
            self.recipe.bad_records == "skip",
        )
        # Cheap filters first: what they remove is never looked up among the questions. Duplicates are found later by
        # keys that are written here, of the documents that are left.
        steps: list[Any] = [reader]
        if quality.language:
            steps.append(
                LanguageFilter(
                    quality.language, quality.language_characters, RemovedWriter(removed / "language" / name)
                )
            )
        steps.append(PersonalDataGate(dict(quality.personal_data), RemovedWriter(removed / "personal_data" / name)))
        if quality.questions:
            steps.append(QuestionFilter(self.work / "questions", RemovedWriter(removed / "contaminated" / name)))
        steps.append(KeyWriter(self.work / "keys" / name, by_beginning=source.kind == "guidelines"))
        steps.append(text_writer(self.work / "extracted" / name))
        return Stage(f"extract-{name}", steps, len(self.inputs[name]))

    def _find_key_duplicates(self, _data: Any, _rank: int, _world_size: int) -> None:
        # The first stage that sees every source: an empty one is a mistake that hours of work would hide.
        for name in self.recipe.sources:
            self._check_not_empty(name)
        find_key_duplicates(self._keys(), self.work / "same")

    def _check_not_empty(self, name: str) -> None:
        if any((self.work / "extracted" / name).glob("*.jsonl.zst")):
            return
        totals: Counter[str] = Counter()
        for number in range(len(self.inputs[name])):
            for step in manifest.read_steps(self.logs / f"extract-{name}", number):
                totals.update({"read": step["before"]} if step["step"] == "raw records" else {})
                totals.update(step["removed"])
        counts = ", ".join(f"{value:,} {key}" for key, value in totals.items()) or "0 read"
        raise DataError(
            f"sources.{name} yields no document ({counts}). Check its kind, its files and what quality asks for, or "
            f"take it out of the recipe; then remove {self.root} and start again."
        )

    def _extracted(self) -> list[Path]:
        return [self.work / "extracted" / f"{shard}.jsonl.zst" for shard in self.shards]

    def _keys(self) -> list[Path]:
        return [self.work / "keys" / f"{shard}.npy" for shard in self.shards]

    def _near_duplicates(self) -> list[Stage]:
        config = minhash_config(self.recipe.seed)
        signatures, pairs = str(self.work / "minhash" / "signatures"), str(self.work / "minhash" / "pairs")
        # Exact copies are left out of the search: each would be a pair of its own.
        signing = [
            ShardReader(self._extracted(), self._keys()),
            DropListed(self.work / "same", self.shards),
            MinhashDedupSignature(signatures, config, language=Words()),
        ]
        return [
            Stage("near-signatures", signing, len(self.shards)),
            # datatrove wants one task a bucket.
            Stage("near-pairs", [MinhashDedupBuckets(signatures, pairs, config=config)], config.num_buckets),
            Stage("near-groups", [self._find_near_duplicates], 1),
        ]

    def _find_near_duplicates(self, _data: Any, _rank: int, _world_size: int) -> None:
        pairs = sorted((self.work / "minhash" / "pairs").glob("*.dups"))
        find_near_duplicates(pairs, len(self.shards), self.work / "near")

    def _index_questions(self, _data: Any, _rank: int, _world_size: int) -> None:
        quality = self.recipe.quality
        folder = self.work / "questions"
        counts = {name: write_index(name, item, quality.n_grams, folder) for name, item in quality.questions.items()}
        write_json(self.work / "questions.json", counts, indent=1)

    def _finish(self) -> list[Any]:
        # Text was written before duplicates were known: it is read again, without those that go.
        removed = self.work / "removed"
        steps: list[Any] = [
            ShardReader(self._extracted(), self._keys()),
            DropListed(self.work / "same", self.shards, RemovedWriter(removed / "same")),
        ]
        if self.recipe.quality.near_duplicates:
            steps.append(NearDuplicates(self.work / "near", self.shards, RemovedWriter(removed / "near")))
        shares = {name: source.valid for name, source in self.recipe.sources.items()}
        steps.append(Split(self.recipe.seed, shares))
        steps.append(text_writer(self.root, "${source}-${split}/${rank}.jsonl"))
        return steps

    def text_shards(self, name: str, split: str) -> list[Path]:
        """The finished text of a source and split; shards without documents have no file."""
        return sorted((self.root / f"{name}-{split}").glob("*.jsonl.zst"))

    def _write_manifest(self, _data: Any, _rank: int, _world_size: int) -> None:
        content = describe(self)
        for name in self.recipe.sources:
            if not any(shard["source"] == name for shard in content["shards"]):
                steps = [step for item in content["inputs"] if item["source"] == name for step in item["steps"]]
                counts = ", ".join(f"{n:,} {reason}" for step in steps for reason, n in step["removed"].items())
                raise DataError(
                    f"sources.{name} has no document left ({counts}): take it out of the recipe, or name it before the "
                    f"source that has the same documents; then remove {self.root} and start again."
                )
        manifest.write_manifest(self.root, content)

    def _pieces(self) -> list[tuple[str, str, int]]:
        return [(shard.split("/")[0], split, number) for number, shard in enumerate(self.shards) for split in SPLITS]

    def _tokenize(self) -> list[Stage]:
        if self.recipe.tokenization is None:
            return []
        # One task a shard and split, joined afterwards: tokens are in the order of the shards, however many workers.
        return [
            Stage("tokenizer", [self._extend_tokenizer], 1),
            Stage("tokenize", [self._tokenize_piece], len(self._pieces())),
            Stage("tokenize-join", [self._join_tokens], len(self.recipe.sources) * len(SPLITS)),
        ]

    def _extend_tokenizer(self, _data: Any, _rank: int, _world_size: int) -> None:
        settings = self.recipe.tokenization
        assert settings is not None, "this stage is planned only where a tokenizer is named"
        if settings.tokens:
            with replacing(self.root / "tokenizer") as folder:
                extend_tokenizer(settings.tokenizer, tokens_of(settings.tokens), folder)
        else:
            load_tokenizer(settings.tokenizer).copy_to(self.root / "tokenizer")

    def _piece_prefix(self, name: str, split: str, number: int) -> Path:
        return self.work / "tokens" / f"{name}-{split}" / f"{number:05d}"

    def _tokenize_piece(self, _data: Any, rank: int, _world_size: int) -> None:
        settings = self.recipe.tokenization
        assert settings is not None, "this stage is planned only where a tokenizer is named"
        name, split, number = self._pieces()[rank]
        text = self.root / f"{name}-{split}" / f"{number:05d}.jsonl.zst"
        # Only papers hold the markers as markup; elsewhere they are text like any other.
        has_markup = "gap_replay" in settings.tokens and self.recipe.sources[name].kind == "s2orc"
        if text.exists():  # a shard of which nothing was left has no file
            options = PreprocessOptions(
                [text],
                self._piece_prefix(name, split, number),
                str(self.root / "tokenizer"),
                append_eod=settings.append_eod,
                markup=CORPUS_TOKENS if has_markup else (),
                overwrite=True,
            )
            preprocess(options)

    def _join_tokens(self, _data: Any, rank: int, _world_size: int) -> None:
        name, split = [(name, split) for name in self.recipe.sources for split in SPLITS][rank]
        numbers = [number for other, part, number in self._pieces() if (other, part) == (name, split)]
        prefixes = [self._piece_prefix(name, split, number) for number in numbers]
        written = [prefix for prefix in prefixes if prefix.with_suffix(".idx").exists()]
        if written:
            merge_datasets(written, self.root / f"{name}-{split}", overwrite=True)


class NearDuplicates(DropListed):
    """``DropListed`` under a name of its own in the statistics."""

    name = "near duplicates"


def describe(build: Build) -> dict[str, Any]:
    """The manifest's content: sources, what each step did to each raw file, every shard of the corpus."""
    recipe = build.recipe
    inputs, shards = [], []
    # A raw file is one task of extracting and one of finishing: their logs together say where its documents went.
    for number, shard in enumerate(build.shards):
        name, raw = shard.split("/")
        path = build.inputs[name][int(raw)]
        logs = ((build.logs / f"extract-{name}", int(raw)), (build.logs / "finish", number))
        steps = [step for folder, rank in logs for step in manifest.read_steps(folder, rank)]
        inputs.append({"source": name, "file": str(path), "bytes": path.stat().st_size, "steps": steps})
        for split in SPLITS:
            text = build.root / f"{name}-{split}" / f"{number:05d}.jsonl.zst"
            if text.exists():
                facts = manifest.describe_shard(text, build.root)
                shards.append({"source": name, "split": split, "made_from": str(path), **facts, "steps": steps})
    questions = build.work / "questions.json"
    plain = build.fingerprint()
    return {
        "version": 1,
        "code": manifest.code_version(),
        "recipe_sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest(),
        "recipe": plain,
        "sources": {
            name: {"kind": source.kind, "license": source.license, "valid": source.valid}
            for name, source in recipe.sources.items()
        },
        "questions": json.loads(questions.read_text(encoding="utf-8")) if questions.is_file() else {},
        "inputs": inputs,
        "shards": shards,
        "tokens": [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(build.root.glob("*.*"))
            if path.suffix in (".bin", ".idx", ".json") and path.name != manifest.FILE_NAME
        ],
    }
