"""A corpus recipe: the YAML file that says what is read, how it is cleaned, and where it goes."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_med.config.reader import PATH, Reader, read_yaml
from megatron_med.errors import ConfigError
from megatron_med.tokenizer.special import TOKEN_SETS

PERSONAL_DATA: dict[str, Literal["redact", "drop", "keep"]] = {
    "email": "redact",
    "phone": "redact",
    "record_number": "drop",
    "name": "redact",
}
"""What is done with personal data where the recipe says nothing."""

KINDS = ("s2orc", "s2ag_abstracts", "abstracts", "pubmed_xml", "guidelines", "redpajama")


@dataclass
class Source:
    """One source. Where two sources hold the same document, that of the source named first stays."""

    kind: Literal["s2orc", "s2ag_abstracts", "abstracts", "pubmed_xml", "guidelines", "redpajama"]
    """What the records look like: see megatron_med/corpus/kinds.py."""
    input: list[str] = field(metadata=PATH)
    """Files, or patterns of files; plain, .gz or .zst."""
    license: str
    """Of the documents that carry none of their own."""
    catalogue: list[str] = field(default_factory=list, metadata=PATH)
    """s2orc, s2ag_abstracts: files of the Semantic Scholar "papers" data set, for title and PubMed ids."""
    valid: float = 0.0
    """Share of documents that are held out for validation."""
    share: float = 1.0
    """Share of documents that are taken at all, drawn by the hash of their id."""


@dataclass
class Questions:
    """A benchmark that no document may repeat."""

    path: str = field(metadata=PATH)
    """JSONL, or JSON with a list or an object of records."""
    fields: list[str]
    """Fields whose text is sought: the question, long answers. Texts below a field are taken too."""


@dataclass
class Quality:
    """What is removed."""

    language: str | None = "en"
    """Language that is kept (ISO 639-1); null keeps all."""
    language_characters: int = 2000
    """It is told from this many first characters."""
    near_duplicates: bool = True
    """MinHash: 5-grams of words, 14 buckets of 8 hashes, which finds texts alike to 0.75 and more."""
    n_grams: int = 13
    """Decontamination: words in a row that a document and a question may not share (Brown et al. 2020)."""
    questions: dict[str, Questions] = field(default_factory=dict)
    """Benchmarks by name."""
    personal_data: dict[str, Literal["redact", "drop", "keep"]] = field(default_factory=lambda: dict(PERSONAL_DATA))
    """What to do with a document that holds an e-mail address, a telephone or record number, a name in its header.
    Kinds that are not named keep their default."""


@dataclass
class Execution:
    """Where the work is done."""

    kind: Literal["local", "slurm", "ray"] = "local"
    """datatrove's executors."""
    workers: int = 2
    """Tasks at once."""
    options: dict[str, Any] = field(default_factory=dict)
    """slurm, ray: options of datatrove's executor, such as partition, time, mem_per_cpu_gb."""


@dataclass
class Tokenization:
    """Token files for training, one for each source and split."""

    tokenizer: str = field(metadata=PATH)
    """As megatron-med preprocess takes it."""
    tokens: list[str] = field(default_factory=lambda: ["gap_replay"])
    """Sets of tokens added after the vocabulary: gap_replay, chatml."""
    append_eod: bool = True
    """End each document with the end-of-document id."""


@dataclass
class CorpusRecipe:
    """All of it."""

    output: str = field(metadata=PATH)
    """Folder of the corpus, its manifest and its token files."""
    sources: dict[str, Source]
    """By name, in order of precedence."""
    seed: int = 1234
    """Of splits, shares and MinHash."""
    bad_records: Literal["fail", "skip"] = "fail"
    """A record that cannot be read stops the build, or is left out and counted."""
    quality: Quality = field(default_factory=Quality)
    """What is removed."""
    tokenization: Tokenization | None = None
    """Token files; null writes text only."""
    execution: Execution = field(default_factory=Execution)
    """Where the work is done."""

    def inputs(self, source: str) -> list[Path]:
        """Files of a source, in order: of two equal documents the first stays."""
        return _files(self.sources[source].input)

    def catalogue_inputs(self) -> list[Path]:
        """Files of all catalogues, each once."""
        return _files([pattern for source in self.sources.values() for pattern in source.catalogue])


def load_recipe(path: Path) -> CorpusRecipe:
    """Reads and checks a recipe. Relative paths stand as the shell would read them, from the working folder.

    Raises:
        ConfigError: with every fault.
    """
    reader = Reader()
    recipe = reader.read(CorpusRecipe, read_yaml(path, "recipe"))
    faults = reader.faults
    if not faults:
        assert recipe is not None, "what could not be read is told"
        faults = _broken_rules(recipe)
    if faults or recipe is None:
        raise ConfigError(faults)
    return recipe


def _broken_rules(recipe: CorpusRecipe) -> list[str]:
    faults = []
    if not recipe.sources:
        faults.append("sources is empty: name at least one source.")
    for name, source in recipe.sources.items():
        where = f"sources.{name}"
        if not name.replace("_", "").isalnum():
            faults.append(f"{where}: a name may hold letters, digits and underscores.")
        if not recipe.inputs(name):
            faults.append(f"{where}.input: no file matches {', '.join(source.input)}. Check the path.")
        faults += [
            f"{where}.catalogue: no file matches {pattern}. Check the path."
            for pattern in source.catalogue
            if not _files([pattern])
        ]
        if not 0 <= source.valid < 1:
            faults.append(f"{where}.valid is {source.valid}: a share of at least 0 and below 1 is needed.")
        if not 0 < source.share <= 1:
            faults.append(f"{where}.share is {source.share}: a share above 0 and at most 1 is needed.")
    if recipe.tokenization is not None:
        unknown = [name for name in recipe.tokenization.tokens if name not in TOKEN_SETS]
        if unknown:
            faults.append(f"tokenization.tokens: there is no set {', '.join(unknown)}: {', '.join(TOKEN_SETS)} exist.")
    for name, questions in recipe.quality.questions.items():
        if not Path(questions.path).is_file():
            faults.append(f"quality.questions.{name}.path: there is no {questions.path}.")
    known = ", ".join(PERSONAL_DATA)
    for kind in recipe.quality.personal_data:
        if kind not in PERSONAL_DATA:
            faults.append(f"quality.personal_data.{kind} is not looked for: {known} are.")
    recipe.quality.personal_data = PERSONAL_DATA | recipe.quality.personal_data
    language = recipe.quality.language
    if language is not None and not (len(language) == 2 and language.islower()):
        faults.append(f"quality.language is '{language}': a code of two letters is needed, such as en.")
    for name in recipe.quality.questions:
        if not name.replace("_", "").isalnum():
            faults.append(f"quality.questions.{name}: a name may hold letters, digits and underscores.")
    if recipe.quality.n_grams < 8:
        faults.append(f"quality.n_grams is {recipe.quality.n_grams}: fewer than 8 words match by chance.")
    if recipe.execution.workers < 1:
        faults.append(f"execution.workers is {recipe.execution.workers}: at least 1 is needed.")
    return faults


def _files(patterns: list[str]) -> list[Path]:
    """In the order of the patterns, sorted within each; a file that two patterns match comes once."""
    found = [Path(name) for pattern in patterns for name in sorted(glob.glob(pattern)) if Path(name).is_file()]
    return list(dict.fromkeys(found))
