"""Checkpoints that no run has trained: imported or merged ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_med.checkpoint import folder as folders
from megatron_med.errors import TargetExistsError
from megatron_med.outputs import output_folder
from megatron_med.tokenizer import Tokenizer


def refuse_overlap(target: Path, *sources: Path) -> None:
    """Replacing what is read, or a folder around it, would destroy it.

    Raises:
        TargetExistsError: ``target`` is or holds one of ``sources``.
    """
    replaced = target.resolve()
    for source in sources:
        read = source.resolve()
        if replaced == read or replaced in read.parents:
            raise TargetExistsError(f"--to {target} holds {source}, which is read: name another target.")


@contextmanager
def new_step(target: Path, overwrite: bool, tokenizer: Tokenizer | None) -> Iterator[Path]:
    """Gives a folder to fill with weights and ``state.json``. At the end it is ``step-00000000`` of the checkpoint
    folder ``target``, and ``latest`` names it.

    Raises:
        TargetExistsError: see ``outputs.refuse_existing``.
    """
    with output_folder(target, overwrite) as checkpoints:
        final = folders.step_folder(checkpoints, 0)
        partial = folders.begin(final)
        if tokenizer is not None:
            tokenizer.copy_to(partial / folders.TOKENIZER)
        yield partial
        folders.commit(final, folders.describe_files(partial, folders.file_names(partial)))
