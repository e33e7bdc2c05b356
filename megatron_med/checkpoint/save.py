"""Saves training state of any topology: commit protocol over all ranks, at once or while training goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.checkpoint.storage import first_cause, make_writer
from megatron_med.checkpoint.views import Part, state_shards, state_views
from megatron_med.errors import CheckpointError
from megatron_med.optim.optimizer import Optimizer
from megatron_med.parallel.collectives import gather_objects
from megatron_med.parallel.context import Axis, ParallelContext
from megatron_med.tokenizer import Tokenizer


def save_checkpoint(
    target: Path,
    optimizer: Optimizer,
    context: ParallelContext,
    *,
    state: CheckpointState,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes one step and moves ``latest``; all ranks call it.

    Args:
        target: ``RUN/checkpoints/step-...``.
        optimizer: masters and moments, and the frozen weights; of adapters without those of their base.
        context: the grid.
        state: what ``state.json`` says.
        tokenizer: its files are copied beside the weights.

    Raises:
        CheckpointError: it could not be written, e.g. the disk is full; earlier checkpoints are untouched.
    """
    entries = state_views(state_shards(optimizer, part=_saved_part(state)), optimizer, context)
    _write(target, entries, context.world, state, tokenizer)


class CheckpointSaver:
    """Saves while training goes on: training waits for a copy in memory, a thread writes it.

    The thread has a process group of its own, so that its messages never mix with those of training. One save is
    under way at a time; the next one waits for it.

    Args:
        context: the grid.
        asynchronous: else ``save`` returns when the step is committed.
        on_commit: called on rank 0 with the folder once a step is committed.
    """

    def __init__(self, context: ParallelContext, asynchronous: bool, on_commit: Callable[[Path], None]) -> None:
        self._context = context
        self._asynchronous = asynchronous
        self._on_commit = on_commit
        self._world = context.world
        if asynchronous and context.world.group is not None:
            world = context.world
            own_group = dist.new_group(backend="gloo", timeout=context.timeout)
            self._world = Axis(world.size, world.rank, world.ranks, own_group)
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed; ``wait`` raises it."""
        return self._failure is not None

    def save(
        self, target: Path, optimizer: Optimizer, state: CheckpointState, tokenizer: Tokenizer | None = None
    ) -> None:
        """Copies the state, and begins to write it once the save before is done; see ``save_checkpoint``."""
        self.wait()
        shards = state_shards(optimizer, part=_saved_part(state))
        if not self._asynchronous:
            self._write(target, shards, optimizer, state, tokenizer)
            return
        frozen = {item.layout.name for item in optimizer.frozen}
        arguments = target, self._stage(shards, frozen), optimizer, state, tokenizer
        self._thread = threading.Thread(target=self._write_and_remember, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is under way.

        Raises:
            CheckpointError: the last save failed; on all ranks alike.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _stage(self, shards: dict[str, Tensor], frozen: set[str]) -> dict[str, Tensor]:
        """Copies in host memory, pinned where the tensors are on a GPU. The buffers serve every save. Frozen weights
        never change, so they are written from where they lie."""
        staged = {name: tensor for name, tensor in shards.items() if name in frozen}
        for name, tensor in shards.items():
            if name in frozen:
                continue
            buffer = self._staged.get(name)
            if buffer is None:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._staged[name] = buffer
            buffer.copy_(tensor, non_blocking=True)
        if self._context.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return self._staged | staged

    def _write_and_remember(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self._failure = error

    def _write(
        self,
        target: Path,
        shards: dict[str, Tensor],
        optimizer: Optimizer,
        state: CheckpointState,
        tokenizer: Tokenizer | None,
    ) -> None:
        _write(target, state_views(shards, optimizer, self._context), self._world, state, tokenizer)
        if self._world.is_first:
            self._on_commit(target)


def _saved_part(state: CheckpointState) -> Part:
    return "all" if state.adapter is None else "adapters"


def _write(
    target: Path, entries: dict[str, Tensor], world: Axis, state: CheckpointState, tokenizer: Tokenizer | None
) -> None:
    """The commit protocol; ``world`` is all ranks, with the group to talk in."""
    partial = folders.partial_folder(target)
    failure = _attempt(lambda: folders.begin(target)) if world.is_first else None
    _raise_together(failure, target, world)
    try:
        dcp.save(entries, storage_writer=make_writer(partial), process_group=world.group)
        failure = None
    except (CheckpointException, OSError, RuntimeError) as error:
        cause = first_cause(error)
        failure = str(cause) if isinstance(cause, OSError) else str(cause).splitlines()[0]
    if failure is None and world.is_first:
        failure = _attempt(lambda: _write_companions(partial, state, tokenizer))
    _raise_together(failure, target, world)

    mine: dict[str, Any] = {}
    failure = _attempt(lambda: mine.update(folders.describe_files(partial, _share(partial, world))))
    _raise_together(failure, target, world)
    described = gather_objects(mine, world)
    failure = None
    if world.is_first:
        files = {name: entry for part in described for name, entry in part.items()}
        failure = _attempt(lambda: folders.commit(target, dict(sorted(files.items()))))
    _raise_together(failure, target, world)


def _share(partial: Path, world: Axis) -> list[str]:
    """The files that this rank hashes: its own data files; the writer also takes the rest."""
    names = folders.file_names(partial)
    mine = [name for name in names if name.startswith(f"__{world.rank}_")]
    if world.is_first:
        mine += [name for name in names if not name.startswith("__")]
    return mine


def _write_companions(partial: Path, state: CheckpointState, tokenizer: Tokenizer | None) -> None:
    folders.write_state(partial, state)
    if tokenizer is not None:
        tokenizer.copy_to(partial / folders.TOKENIZER)


def _attempt(action: Any) -> str | None:
    """Runs an action; the text of its OSError instead of raising it, so that all ranks can stop together."""
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _raise_together(failure: str | None, target: Path, world: Axis) -> None:
    """All ranks raise the first rank's failure, after the partial folder is gone."""
    failures = [text for text in gather_objects(failure, world) if text is not None]
    if not failures:
        return
    if world.is_first:
        shutil.rmtree(folders.partial_folder(target), ignore_errors=True)
    gather_objects(None, world)  # no rank leaves before the folder is gone
    latest = target.parent / folders.LATEST
    stays = f"The last good checkpoint stays: {latest.read_text().strip()}." if latest.is_file() else ""
    free = shutil.disk_usage(target.parent).free
    raise CheckpointError(
        f"The checkpoint {target} could not be written: {failures[0]} ({free / 1e6:,.0f} MB are free there). "
        f"Make room and start again. {stays}"
    )
