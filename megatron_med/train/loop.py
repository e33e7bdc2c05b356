"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_med.checkpoint.folder import point_best_to, prune, step_folder, step_of
from megatron_med.checkpoint.save import CheckpointSaver
from megatron_med.data.prefetch import Prefetcher
from megatron_med.errors import EXIT_DONE, EXIT_FAILED, EXIT_SAVED_AFTER_SIGNAL
from megatron_med.model.batch import MicroBatch
from megatron_med.model.flops import training_flops_per_token
from megatron_med.optim.lr_schedule import learning_rate
from megatron_med.parallel.collectives import gather_objects
from megatron_med.train.loading import Progress
from megatron_med.train.metrics import Metrics, memory_bytes, peak_flops
from megatron_med.train.reporters import Reporter, make_reporters
from megatron_med.train.setup import Run
from megatron_med.train.signals import LAUNCHER_GONE, StopRequest
from megatron_med.train.step import StepResult, train_step, validation_loss
from megatron_med.train.timers import StepTimer


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code.
        reason: in words.
        retry: whether a launch script should start again; None: as the code says.
    """

    code: int
    reason: str
    retry: bool | None = None


def train(run: Run, stop: StopRequest) -> Outcome:
    """Trains to ``train.steps`` or until somebody asks for a save."""
    config, progress, folder = run.config, run.progress, run.folder
    start = replace(progress)
    why = _why_stopped(run, stop)
    if why:
        return stopped(f"stopped before step {progress.step + 1}", why)
    reporters: list[Reporter] = []
    if run.context.world.is_first:
        folder.cut_metrics(progress.step)
        reporters = make_reporters(config, folder, progress.step)
    saver = make_saver(run)
    with Prefetcher(lambda step: _read_step(run, start, step), config.train.steps) as prefetcher:
        outcome = _steps(run, stop, prefetcher, saver, reporters)
    saver.wait()
    for reporter in reporters:
        reporter.close()
    return outcome


def _read_step(run: Run, start: Progress, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step; which samples those are depends on its number alone."""
    batch_size = run.config.train.global_batch_size
    consumed = start.consumed_samples + (step - 1 - start.step) * batch_size
    return run.train_data.load(consumed, batch_size, step)


def _steps(
    run: Run,
    stop: StopRequest,
    prefetcher: Prefetcher[list[MicroBatch]],
    saver: CheckpointSaver,
    reporters: list[Reporter],
) -> Outcome:
    config, progress = run.config, run.progress
    skipped_in_a_row = usable = 0
    first = progress.step + 1
    stall = 0.0
    while progress.step < config.train.steps:
        timer = StepTimer(run.context.device)
        lr = learning_rate(config.lr_schedule, config.optimizer.lr, progress.step + 1, run.horizon)
        with timer.phase("data"):
            batches = prefetcher.take(progress.step + 1)
        result = train_step(run.train_module, batches, lr, stop.asked or saver.has_failed, timer)
        progress.step += 1
        progress.consumed_samples += config.train.global_batch_size

        metrics = _metrics(run, result, lr, timer) | {"checkpoint_seconds": stall}
        stall = 0.0
        is_best = False
        if run.valid_data is not None and _due(run, config.train.valid_interval):
            metrics["valid_loss"] = _validate(run)
            is_best = _note_best(run, metrics["valid_loss"])
        for reporter in reporters:
            reporter.report(metrics)
        if run.samples is not None and "valid_loss" in metrics:
            samples = run.samples.answer(run.train_module.chunks, run.context)
            for reporter in reporters:
                reporter.show(progress.step, samples)

        usable += not result.skipped and math.isfinite(result.loss)
        skipped_in_a_row = skipped_in_a_row + 1 if result.bad else 0
        if skipped_in_a_row >= config.train.max_skipped_steps:
            reason = f"gradients were not finite for {skipped_in_a_row} steps: {_first_bad_gradient(run)}"
            return Outcome(EXIT_FAILED, reason, retry=False)
        if result.stop_asked:
            saver.wait()  # raises on all ranks where one has failed to save
        if result.stop_asked or is_best or _due(run, config.checkpoint.interval):
            stall = _save(run, saver)
        if result.stop_asked and progress.step < config.train.steps:
            return stopped(f"saved step {progress.step}", _why_stopped(run, stop))
    if progress.step >= first and not usable:
        reason = f"no step from {first} to {progress.step} had a finite loss and gradient: nothing was learnt"
        return Outcome(EXIT_FAILED, reason, retry=False)
    return Outcome(EXIT_DONE, f"trained to step {max(progress.step, config.train.steps)}")


def stopped(what: str, why: str) -> Outcome:
    """The outcome of a run that was asked to stop. A launcher that is gone is no wish to stop: the run may go on."""
    return Outcome(
        EXIT_SAVED_AFTER_SIGNAL, f"{what} ({why}); start again to go on", True if why == LAUNCHER_GONE else None
    )


def _why_stopped(run: Run, stop: StopRequest) -> str:
    """Why some rank has been asked to stop, the same on all of them; empty where none has been."""
    reasons = sorted({reason for reason in gather_objects(stop.reason, run.context.world) if reason})
    return next((reason for reason in reasons if reason != LAUNCHER_GONE), reasons[0] if reasons else "")


def _due(run: Run, interval: int) -> bool:
    """At every ``interval`` steps and at the last one."""
    step = run.progress.step
    return step == run.config.train.steps or (interval > 0 and step % interval == 0)


def make_saver(run: Run) -> CheckpointSaver:
    """Writes checkpoints of a run, and prunes them as the configuration says."""
    options = run.config.checkpoint

    def committed(target: Path) -> None:
        run.folder.record_commit(step_of(target))
        best = run.best["step"] if run.best else None
        if best == step_of(target):
            point_best_to(target)
        prune(run.folder.checkpoints, options.keep, options.keep_every, step_of(target), best)
        print(f"saved {target}", flush=True)

    return CheckpointSaver(run.context, options.asynchronous, committed)


def _save(run: Run, saver: CheckpointSaver) -> float:
    """Returns the seconds that training stood still: the metrics of the next step tell them."""
    start = time.perf_counter()
    target = step_folder(run.folder.checkpoints, run.progress.step)
    saver.save(target, run.train_module.optimizer, run.checkpoint_state(), run.tokenizer)
    return time.perf_counter() - start


def _note_best(run: Run, loss: float) -> bool:
    """Whether the model is the best one so far, and the run keeps that."""
    best = run.best
    if run.config.checkpoint.keep_best is None or not (best is None or loss < best["valid_loss"]):
        return False
    run.best = {"step": run.progress.step, "valid_loss": loss}
    return True


def _validate(run: Run) -> float:
    assert run.valid_data is not None, "only asked for with validation data"
    batches = run.valid_data.load(0, len(run.valid_data.dataset), 0)
    return validation_loss(run.train_module, batches)


def _metrics(run: Run, result: StepResult, lr: float, timer: StepTimer) -> Metrics:
    config, progress = run.config, run.progress
    seconds = timer.total()
    length = config.data.sequence_length
    tokens = config.train.global_batch_size * length
    flops = tokens * training_flops_per_token(config.model, length, config.lora) / seconds / run.context.world.size
    peak = peak_flops(run.context.device)
    return {
        "step": progress.step,
        "time": time.time(),
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.gradient_norm,
        "tokens_per_second": tokens / seconds,
        "tflops_per_device": flops / 1e12,
        "mfu": flops / peak if peak else None,
        "step_seconds": seconds,
        **{f"{name}_seconds": spent for name, spent in timer.seconds().items()},
        "memory_bytes": memory_bytes(run.context.device),
        "consumed_samples": progress.consumed_samples,
        "consumed_tokens": progress.consumed_samples * length,
        "eta_seconds": seconds * (config.train.steps - progress.step),
        "skipped": result.skipped,
        "loss_scale": result.loss_scale,
    }


def _first_bad_gradient(run: Run) -> str:
    """Name of the first parameter with such a gradient, over all ranks."""
    names = [item.layout.name for item in run.train_module.optimizer.owned if not item.gradient.isfinite().all()]
    found = gather_objects(names[0] if names else None, run.context.world)
    bad = [f"{name} (rank {rank})" for rank, name in enumerate(found) if name is not None]
    return f"the first is of {bad[0]}" if bad else "the loss itself"
