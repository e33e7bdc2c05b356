"""What a run goes on from: its own newest checkpoint, another run's, a base for adapters, or initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_med.checkpoint.adapter import MERGE, base_of, check_settings, describe_adapter, rows_of
from megatron_med.checkpoint.folder import CheckpointState, read_state, resolve_checkpoint
from megatron_med.checkpoint.load import (
    check_model,
    check_tokenizer,
    load_optimizer,
    new_head,
    verify_checkpoint,
)
from megatron_med.checkpoint.quantized import load_quantized
from megatron_med.checkpoint.views import Part
from megatron_med.config import Config
from megatron_med.errors import CheckpointError
from megatron_med.parallel.collectives import on_first_rank
from megatron_med.parallel.context import ParallelContext
from megatron_med.tokenizer import Tokenizer
from megatron_med.train.continuity import Settings, settings_before
from megatron_med.train.run_folder import RunFolder
from megatron_med.train.step import TrainModule

_NAMES_SHOWN = 3
_JINJA = "chat_template"


@dataclass
class Progress:
    """Where the run stands; all that a resume needs besides the tensors."""

    step: int = 0
    consumed_samples: int = 0


@dataclass
class Loaded:
    """Where a run stands, the settings that have brought it there (none for a new one), and what it has learnt from.

    Attributes:
        adapter: ``CheckpointState.adapter`` of the run.
        new_rows: ``CheckpointState.new_rows`` of what was loaded.
    """

    progress: Progress
    settings: Settings
    chat: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    new_rows: list[int] | None = None


@dataclass(frozen=True)
class Source:
    """Checkpoints that a run goes on from.

    Attributes:
        step: whose position, adapters or weights are taken; None: nothing but a base.
        base: frozen weights of adapters; None without adapters.
        everything: optimizer and position, too.
        is_own: ``step`` is the run's own.
    """

    step: Path | None
    base: Path | None
    everything: bool
    is_own: bool

    @property
    def model(self) -> Path:
        """The one that says what the model is."""
        found = self.base or self.step
        assert found is not None, "a source names one of them"
        return found


def find_source(config: Config, own: Path | None) -> Source | None:
    """RUN's own latest checkpoint ``own`` first, then ``checkpoint.load``; None: initial weights.

    Raises:
        CheckpointError: adapters where weights are needed, or the other way round.
    """
    everything = own is not None or config.checkpoint.load_state == "all"
    step = own or (resolve_checkpoint(config.checkpoint.load) if config.checkpoint.load else None)
    state = read_state(step) if step is not None else None
    has_adapters = state is not None and state.adapter is not None
    if not config.lora.rank:
        if step is not None and has_adapters:
            raise CheckpointError(
                f"{step} holds adapters only. Go on training them (lora.rank and its other settings), or merge them "
                f"first: {MERGE.format(adapter=step)}"
            )
        return None if step is None else Source(step, None, everything, own is not None)
    if own is not None and not has_adapters:
        raise CheckpointError(
            f"{own} is of a run that trains all weights: adapters need a run of their own. Set train.output_dir to "
            f"another folder and, to begin with these weights, checkpoint.load to {own.parent.parent}."
        )
    if step is None or state is None or not has_adapters:
        return Source(None, _plain_base(config, step), everything, False)
    check_settings(state, config.lora, config.model, step)
    given = config.lora.base or _moved_base(config, state)
    return Source(step, base_of(step, state, given), everything, own is not None)


def _moved_base(config: Config, state: CheckpointState) -> str | None:
    """``checkpoint.load``, where that is a base and the one that adapters name is gone."""
    recorded, load = (state.adapter or {})["base"]["path"], config.checkpoint.load
    if load is None or Path(recorded).exists() or not Path(load).exists():
        return None
    return load if read_state(resolve_checkpoint(load)).adapter is None else None


def _plain_base(config: Config, step: Path | None) -> Path:
    """The base of adapters that begin here."""
    if config.checkpoint.load_state == "all" and step is not None:
        raise CheckpointError(
            f"checkpoint.load_state is all, and {step} holds no adapters to go on with: set it to weights."
        )
    given = config.lora.base or config.checkpoint.load
    assert given is not None, "validate() asks for one of them"
    base = resolve_checkpoint(given)
    if step is not None and step.resolve() != base.resolve():
        raise CheckpointError(
            f"checkpoint.load names the base {step}, and lora.base {base}: adapters have one base. Leave one out."
        )
    if read_state(base).adapter is not None:
        raise CheckpointError(
            f"lora.base {base} holds adapters itself: name the weights they stand beside, or merge them first: "
            f"{MERGE.format(adapter=base)}"
        )
    return base


def choose_source(config: Config, folder: RunFolder, context: ParallelContext) -> Source | None:
    """What a run goes on from, the same on every rank; see ``find_source``."""
    own = _resume_point(folder, context)
    return on_first_rank(context, lambda: find_source(config, own))


def rows_to_train(
    config: Config, source: Source | None, tokenizer: Tokenizer | None, chat: dict[str, Any] | None
) -> range | None:
    """The tokens that ``lora.train_rows`` means.

    Args:
        config: of the run.
        source: what it goes on from.
        tokenizer: of the model.
        chat: template of the conversations that it is trained on.

    Raises:
        CheckpointError: there are none; or the template holds some whose rows would stay what they are.
    """
    if source is None or source.base is None:
        return None
    rows = rows_of(read_state(source.base))
    if config.lora.train_rows is not None:
        if rows is None:
            raise CheckpointError(
                f"lora.train_rows is new: no token was added to the vocabulary of {source.base} when it was imported. "
                "Leave it out, or import the base with --tokenizer, the one that has them."
            )
        return rows
    special = tokenizer.special_tokens() if tokenizer is not None else {}
    if chat is None:
        return None
    new = {number: special[number] for number in rows or () if number in special}
    used = [name for number, name in new.items() if name in chat[_JINJA] or number == chat["turn_end_id"]]
    if used:
        raise CheckpointError(
            f"{', '.join(used)}: the template {chat['template']} holds them, and their rows in {source.base} "
            "are new and would stay untrained: adapters change no row of the vocabulary. Set lora.train_rows: new, or "
            "make the data with a template without them."
        )
    return None


def load_state(
    config: Config,
    source: Source | None,
    train_module: TrainModule,
    tokenizer: Tokenizer | None,
    trained: set[str],
    frozen: set[str],
) -> Loaded:
    """Fills the model and the optimizer from what ``find_source`` finds.

    ``trained`` and ``frozen`` are the names of all parameters of the model that a checkpoint of the run holds.
    """
    context = train_module.context
    if source is None:
        return Loaded(Progress(), {})
    described = tokenizer.describe() if tokenizer else None
    for step in (source.base, source.step):
        if step is None:
            continue
        if not (source.is_own and step == source.step):
            verify_checkpoint(step, context)
        state = read_state(step)
        check_model(state, config.model, step)
        check_tokenizer(state, described, step)
    loaded = Loaded(Progress(), {})
    if source.base is not None:
        load_optimizer(source.base, train_module.optimizer, context, moments=False, part="base")
        load_quantized(source.base, train_module.chunks, context)
        loaded.chat = read_state(source.base).chat
        _tell(context, f"loaded {source.base} (base, frozen{_in_few_bits(config)})")
    if source.step is not None:
        thawed = _load_step(source, source.step, train_module, trained, frozen, config)
        loaded = _go_on(source, source.step, train_module, trained, thawed)
    train_module.data_parallel.start_param_sync()
    if source.base is not None:
        loaded.adapter = describe_adapter(config.lora, config.model, source.base, config.quantize)
    loaded.new_rows = read_state(source.model).new_rows
    return loaded


def _load_step(
    source: Source, step: Path, train_module: TrainModule, trained: set[str], frozen: set[str], config: Config
) -> list[str]:
    """Weights or adapters of a step and, where asked, their moments; returns what begins with fresh ones."""
    context, optimizer, state = train_module.context, train_module.optimizer, read_state(step)
    thawed = sorted(trained.intersection(state.frozen)) if source.everything else []
    part: Part = "all" if source.base is None else "adapters"
    fresh = None
    if new_head(state, config.model):
        fresh = "score."
        if source.everything:
            raise CheckpointError(
                f"checkpoint.load_state is all, and {step} has no head of the kind {config.model.head}, so no moments "
                "of it: set it to weights."
            )
    told = load_optimizer(step, optimizer, context, moments=source.everything, without=thawed, part=part, fresh=fresh)
    if fresh is not None:
        told = [*told, f"the head ({config.model.head}) is new: its weights are the initial ones"]
    what = {"all": "weights", "adapters": "adapters"}[part]
    for line in [f"loaded {step} ({'all' if source.everything else what})", *told]:
        _tell(context, line)
    if thawed:
        _tell(context, f"trained from here on, with fresh moments: {_in_words(thawed)} (frozen in {step})")
    if source.everything and state.optimizer_steps is not None:
        dropped = sorted(frozen.difference(state.frozen))
        if dropped:
            _tell(
                context,
                f"frozen from here on, stored in {config.precision}, their moments dropped: {_in_words(dropped)}",
            )
    return thawed


def _go_on(source: Source, step: Path, train_module: TrainModule, trained: set[str], thawed: list[str]) -> Loaded:
    """Position, loss scale and what the optimizer counts."""
    state = read_state(step)
    if not source.everything:
        return Loaded(Progress(), {}, state.chat)
    optimizer = train_module.optimizer
    steps = state.optimizer_steps or 0
    began = {name: count for name, count in state.moments_since.items() if name in trained}
    optimizer.resume(steps, began | dict.fromkeys(thawed, steps))
    optimizer.initial_lr = state.initial_lr or optimizer.initial_lr
    if train_module.loss_scaler is not None and state.loss_scaler is not None:
        train_module.loss_scaler.load_state_dict(state.loss_scaler)
    progress = Progress(state.step, state.consumed_samples)
    return Loaded(progress, settings_before(step, state), state.chat, state.best if source.is_own else None)


def _in_few_bits(config: Config) -> str:
    return "" if config.quantize.base is None else f", its matrices in {config.quantize.base}"


def _tell(context: ParallelContext, line: str) -> None:
    if context.world.is_first:
        print(line, flush=True)


def _in_words(names: list[str]) -> str:
    """A few names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _resume_point(folder: RunFolder, context: ParallelContext) -> Path | None:
    """RUN's newest sound checkpoint; damaged ones are named and stepped back from."""
    source = on_first_rank(context, folder.resume_point)
    while source is not None:
        try:
            verify_checkpoint(source, context)
            return source
        except CheckpointError as error:
            fault, damaged = error, source
            source = on_first_rank(context, lambda: folder.step_back(damaged, fault))  # noqa: B023  (called at once)
    return None
