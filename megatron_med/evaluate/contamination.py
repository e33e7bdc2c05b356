"""Which questions stand in training files: the search of the corpus builder, on token files and on text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_med.config.reader import read_yaml
from megatron_med.data.indexed import IndexedDataset, token_paths
from megatron_med.data.jsonl import BadLine, content_of, read_lines
from megatron_med.data.sources import read_side_file, recorded_tokenizer
from megatron_med.errors import ConfigError, DataError
from megatron_med.evaluate.questions import Question
from megatron_med.tokenizer import Tokenizer, describe_difference

N_GRAMS = 13
"""Words in a row that tell a question, as in the corpus builder."""
_TEXTS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass
class Contamination:
    """What was found of one task.

    Attributes:
        found: question -> where it stands, and the words that were found.
        too_short: ids of questions with too few words to be sought.
        questions: how many there are.
        asked: a hash of their ids.
    """

    questions: int
    asked: str = ""
    found: dict[str, dict[str, str]] = field(default_factory=dict)
    too_short: list[str] = field(default_factory=list)

    def described(self, files: TrainingFiles) -> dict[str, Any]:
        """For the results."""
        names = files.named()
        counts = {"questions": self.questions, "too_short_to_be_sought": len(self.too_short)}
        return {"files": names, **counts, "asked": self.asked, "found": self.found}


def hash_of(ids: Iterable[str]) -> str:
    """Names a set of questions."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()


@dataclass(frozen=True)
class TrainingFiles:
    """Files that a model was trained on.

    Attributes:
        prefixes: of token files.
        texts: JSON Lines.
        tokenizer: of the token files.
    """

    prefixes: Sequence[Path]
    texts: Sequence[Path]
    tokenizer: Tokenizer | None

    def named(self) -> list[str]:
        """All files, by whole paths."""
        return [str(path.resolve()) for path in (*self.prefixes, *self.texts)]

    def documents(self) -> Iterator[tuple[Callable[[], str], str]]:
        """Where each document stands, which takes a while to tell, and its text."""
        for prefix in self.prefixes:
            assert self.tokenizer is not None, "checked when the files were found"
            dataset = IndexedDataset(prefix)
            for number in tqdm(range(len(dataset)), desc=f"Searching {prefix.name}", unit=" documents"):
                place = f"{prefix}, document {number}"
                yield partial(str, place), self.tokenizer.decode(dataset.read(number).tolist())
        for line in tqdm(read_lines(self.texts), desc="Searching text", unit=" lines") if self.texts else ():
            try:
                yield partial(getattr, line, "place"), " ".join(_strings(content_of(line)))
            except BadLine as error:
                raise DataError(f"{line.place}: {error}. Correct that line.") from error


def find_training_files(corpus: Path, tokenizer: Tokenizer | None) -> TrainingFiles:
    """A RUN (the files that it was trained on), a prefix of token files, JSON Lines, or a folder with either.

    Args:
        corpus: what ``--contamination`` names.
        tokenizer: of the model.

    Raises:
        UserError: there is nothing of that kind, or token files were made with another tokenizer.
    """
    config = corpus / "config.yaml"
    prefixes: list[Path] = []
    texts: list[Path] = []
    if config.is_file():
        prefixes = _of_run(config)
    elif all(path.is_file() for path in token_paths(corpus)):
        prefixes = [corpus]
    elif corpus.is_dir():
        prefixes = [path.with_suffix("") for path in sorted(corpus.rglob("*.idx")) if not _holds_roles(path)]
        texts = [] if prefixes else [path for path in sorted(corpus.rglob("*")) if _is_text(path)]
    else:
        texts = [corpus] if _is_text(corpus) else []
    if not prefixes and not texts:
        raise ConfigError(
            f"--contamination is {corpus}: it is no RUN, no prefix of token files (.bin, .idx), no JSON Lines, and no "
            "folder with any. Check the path."
        )
    for prefix in prefixes:
        _check_tokenizer(prefix, tokenizer)
    return TrainingFiles(prefixes, texts, tokenizer)


def _of_run(config: Path) -> list[Path]:
    data = read_yaml(config, "configuration").get("data") or {}
    prefixes = [Path(source["path"]) for source in data.get("train") or []]
    for prefix in prefixes:
        if not all(path.is_file() for path in token_paths(prefix)):
            raise DataError(
                f"{config} names the training data {prefix}, which is not there: run this where it was trained, or "
                "name the files' prefix as --contamination."
            )
    return prefixes


def _holds_roles(path: Path) -> bool:
    return path.with_suffix("").suffix in (".roles", ".labels")


def _is_text(path: Path) -> bool:
    return path.is_file() and path.name.endswith(_TEXTS)


def _check_tokenizer(prefix: Path, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        raise ConfigError("--contamination reads token files, and the model has no tokenizer. Name JSON Lines instead.")
    side = read_side_file(prefix)
    if side is None:
        return
    difference = describe_difference(side["tokenizer"], tokenizer.describe())
    if difference and not _begins_with(tokenizer, prefix):
        raise DataError(
            f"{prefix} was made with another tokenizer ({side['tokenizer']['paths'][0]}) than the model's: "
            f"{difference}. Its ids would be read as other text: name files of the model's tokenizer, or text."
        )


def _begins_with(tokenizer: Tokenizer, prefix: Path) -> bool:
    """Whether a tokenizer is that of the token files with further tokens behind it, as tuning adds them."""
    theirs = recorded_tokenizer(prefix)
    if theirs is None or theirs.vocab_size > tokenizer.vocab_size:
        return False
    return all(theirs.decode([number]) == tokenizer.decode([number]) for number in range(theirs.vocab_size))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def search(files: TrainingFiles, questions: Mapping[str, Sequence[Question]]) -> dict[str, Contamination]:
    """Looks for the text of every question, whatever its case, spacing and punctuation.

    Args:
        files: where.
        questions: by task.
    """
    try:
        from megatron_med.corpus.contamination import QuestionSearch, simplified_words, what_tells
    except ImportError as error:
        raise ConfigError(f"--contamination needs {error.name}: pip install 'megatron_med[corpus]'.") from error
    seeker = QuestionSearch()
    results: dict[str, Contamination] = {}
    for task, asked in questions.items():
        sought = what_tells(([question.question] for question in asked), N_GRAMS)
        for gram, numbers in sought.grams.items():
            for number in numbers:
                seeker.seek_gram(task, number, gram, N_GRAMS)
        for text, numbers in sought.whole.items():
            for number in numbers:
                seeker.seek_whole(task, number, text)
        short = [asked[number].id for number in sought.too_short]
        results[task] = Contamination(len(asked), hash_of(question.id for question in asked), too_short=short)
    documents = 0
    for place, text in files.documents():
        documents += 1
        for task, number, words in seeker.hits(simplified_words(text)):
            name = questions[task][number].id
            if name not in results[task].found:
                results[task].found[name] = {"place": place(), "words": words}
    if not documents:
        raise DataError(f"--contamination names {files.named()[0]}, which holds no document: nothing was looked up.")
    return results
