"""``megatron-med COMMAND ...``: every command under one name. ``tools/*.py`` are the same, one by one."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass
from typing import NoReturn

from megatron_med import __version__
from megatron_med.errors import EXIT_BAD_INPUT, EXIT_DONE, run_command
from megatron_med.launch.collection import uncollected
from megatron_med.launch.torchrun import is_rank, launch

TRAIN = "megatron_med.train"


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: of ``megatron_med.commands``; it has ``main``.
        help: in a line.
        words: its name is the first word that the module reads itself.
        on_ranks: ``--nproc-per-node N --`` in front of its options starts it on several processes.
    """

    module: str
    help: str
    words: bool = False
    on_ranks: bool = False


COMMANDS = {
    "train": Command("", "train a model: CONFIG.yaml [--section.key value ...]", on_ranks=True),
    "plan": Command("plan", "memory and speed of a run on a cluster that is not there"),
    "train-tokenizer": Command("train_tokenizer", "text -> byte-level BPE"),
    "extend-tokenizer": Command("extend_tokenizer", "add tokens to a tokenizer"),
    "preprocess": Command("preprocess_data", "text -> token files"),
    "preprocess-instructions": Command("preprocess_instructions", "conversations -> token files with their roles"),
    "preprocess-questions": Command("preprocess_questions", "question sets -> token files with labels, for heads"),
    "merge": Command("merge_datasets", "join token files"),
    "inspect": Command("inspect_data", "what token files hold"),
    "corpus build": Command("build_corpus", "raw records -> clean text and token files"),
    "corpus report": Command("corpus_report", "a page about a corpus"),
    "import": Command("convert_checkpoint", "Hugging Face folder -> checkpoint", words=True),
    "export": Command("convert_checkpoint", "checkpoint -> Hugging Face folder", words=True),
    "adapter": Command("convert_adapter", "LoRA adapters: export to PEFT, import, merge"),
    "generate": Command("generate", "let a model write", on_ranks=True),
    "evaluate": Command("evaluate", "score a model on medical question sets", on_ranks=True),
    "compare": Command("compare_results", "results side by side, with the published tables"),
    "draw-schedule": Command("draw_schedule", "the timeline of a pipeline schedule"),
}

_OF_TORCHRUN = ("--nproc", "--nnodes", "--standalone", "--rdzv")
"""Begins of options that tell of ranks."""


def main() -> NoReturn:
    """The console script ``megatron-med``."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Finds the command, and runs it here or on several processes.

    Args:
        arguments: name of the command and what follows.

    Returns:
        Exit code.
    """
    if len(arguments) > 1 and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return EXIT_DONE if arguments else EXIT_BAD_INPUT
    if arguments[0] == "--version":
        print(f"megatron_med {__version__}")
        return EXIT_DONE
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in COMMANDS else arguments[0]
    if name not in COMMANDS:
        print(f"error: {_unknown(arguments)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    command, rest = COMMANDS[name], arguments[len(name.split()) :]
    if command.on_ranks and is_rank() and "--" in rest:
        told = "RANK is set: this process is a rank of a launcher, and starts no others. Unset RANK, or leave out what "
        print(f"error: {told}stands before --, and -- itself.", file=sys.stderr)
        return EXIT_BAD_INPUT
    if command.on_ranks and not is_rank():
        ranks = next((word for word in rest if word.startswith(_OF_TORCHRUN)), None)
        if ranks and "--" not in rest:
            told = f"{ranks} is torchrun's: megatron-med {name} {ranks} ... -- what {name} takes. The -- is missing."
            print(f"error: {told}", file=sys.stderr)
            return EXIT_BAD_INPUT
    if command.on_ranks and not is_rank() and "--" in rest:
        split = rest.index("--")
        ranks_run = [TRAIN] if name == "train" else ["megatron_med.commands", name]
        return launch(rest[:split], [*ranks_run, *rest[split + 1 :]])
    if name == "train":
        from megatron_med.train.__main__ import main as train

        return train(rest)
    sys.argv = ["megatron-med", name, *rest] if command.words else [f"megatron-med {name}", *rest]
    with uncollected():
        module = importlib.import_module(f"megatron_med.commands.{command.module}")
    return run_command(module.main)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    ranks = ", ".join(name for name, command in COMMANDS.items() if command.on_ranks)
    return "\n".join(
        [
            "usage: megatron-med COMMAND ...    megatron-med COMMAND --help    megatron-med --version",
            "",
            *lines,
            "",
            f"{ranks} run on several processes with torchrun's options before --:",
            "  megatron-med train --nproc-per-node 8 -- CONFIG.yaml --train.steps 100",
        ]
    )


def _unknown(arguments: list[str]) -> str:
    families = sorted({name.split()[0] for name in COMMANDS if " " in name})
    if arguments[0] in families:
        names = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
        near = difflib.get_close_matches(" ".join(arguments[:2]), names, n=1)
        if near and len(arguments) > 1:
            return f"megatron-med has no command {' '.join(arguments[:2])!r}. Did you mean {near[0]}?"
        return f"megatron-med {arguments[0]} is one of: {', '.join(f'megatron-med {name}' for name in names)}."
    near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"megatron-med has no command {arguments[0]!r}.{meant} megatron-med --help lists all."


if __name__ == "__main__":
    main()
