"""What the commands do, to be called from Python.

    from megatron_med.api import export_huggingface, generate, load_config, train

    config = load_config("config.yaml", {"train.steps": 100, "train.output_dir": "runs/first"})
    train(config)
    print(generate("runs/first", ["Patients with heart failure"], max_new_tokens=40))
    export_huggingface("runs/first", "out/hf", verify=True)

A script runs on one process, or under torchrun on as many as it starts: every rank calls the same functions. Whatever a
user can mend is raised as ``megatron_med.errors.UserError``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_med import config as configuration
from megatron_med.checkpoint.huggingface import convert
from megatron_med.config import Config
from megatron_med.config.validate import validate
from megatron_med.errors import ConfigError
from megatron_med.inference.answers import encode_prompt
from megatron_med.inference.engine import Engine
from megatron_med.inference.grid import join_grid
from megatron_med.inference.load import Settings, load_model
from megatron_med.inference.request import Request, row_seed
from megatron_med.inference.sampling import Sampling
from megatron_med.launch.environment import read_ranks
from megatron_med.launch.process_group import start_process_group
from megatron_med.model.build import DTYPES
from megatron_med.plan import predict
from megatron_med.plan.cluster import check_precision, parse_cluster
from megatron_med.plan.predict import Plan
from megatron_med.train import loop
from megatron_med.train.loop import Outcome
from megatron_med.train.run_folder import RunFolder
from megatron_med.train.setup import set_up
from megatron_med.train.signals import StopRequest

__all__ = ["export_huggingface", "generate", "import_huggingface", "load_config", "plan", "train"]


def load_config(path: str | Path, changes: Mapping[str, Any] | None = None, *, world_size: int | None = None) -> Config:
    """Reads a configuration and checks every rule.

    Args:
        path: YAML file.
        changes: ``section.key`` to value (a text stays a text), in the place of the file's.
        world_size: ranks that it is for; None: those that torchrun has started, or 1.

    Raises:
        ConfigError: with every fault.
    """
    given = [word for name, value in (changes or {}).items() for word in (f"--{name}", json.dumps(value, default=str))]
    return configuration.load_config([str(path), *given], read_ranks()[1] if world_size is None else world_size)


def train(config: Config) -> Outcome:
    """Trains to the end of the configuration, from the run's own newest checkpoint where there is one. Signals are left
    to the caller; what is not saved at ``checkpoint.interval`` is lost with one.

    Returns:
        Exit code (0 done, 1 failed) and its reason.

    Raises:
        UserError: data, run folder or checkpoint do not fit the configuration.
    """
    _check_is_read(config)
    _check_world(config, read_ranks()[1])
    stop = StopRequest()
    folder = RunFolder(config.train.output_dir)
    with _leaving_no_group():
        device, _ = start_process_group(timedelta(minutes=config.train.timeout_minutes), lambda: stop.asked)
        try:
            outcome = loop.train(set_up(config, folder, device), stop)
            if dist.get_rank() == 0:
                folder.write_exit(outcome.code, outcome.reason, outcome.retry)
        finally:
            folder.release()
    return outcome


def _check_is_read(config: Config) -> None:
    if not isinstance(config, Config):
        raise ConfigError(f"{config!r} is no configuration: give what load_config returns.")


def _check_world(config: Config, world_size: int) -> None:
    """A configuration may have been read for another number of ranks."""
    faults = validate(config, world_size)
    if faults:
        raise ConfigError(faults)


@contextmanager
def _leaving_no_group() -> Iterator[None]:
    """The process group is gone afterwards, and so is the mark of the rank that torch puts on tracebacks."""
    hook = sys.excepthook
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.excepthook = hook


def plan(config: Config, cluster: str, *, nics: int | None = None) -> Plan:
    """Memory, traffic and time of a run on a cluster that is not there.

    Args:
        config: read with the cluster's ``world_size``; in bf16 or fp16.
        cluster: ``KIND:NODESxGPUS``, such as ``a100-80g:16x8``.
        nics: network cards of a node; None: as the kind has.

    Raises:
        ConfigError: there is no such kind, or the configuration does not suit it.
    """
    _check_is_read(config)
    if not isinstance(cluster, str):
        raise ConfigError(f"cluster is {cluster!r}: give KIND:NODESxGPUS, such as a100-80g:16x8.")
    found = parse_cluster(cluster, nics)
    check_precision(config)
    _check_world(config, found.world_size)
    return predict.plan(config, found)


def import_huggingface(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> Path:
    """A Hugging Face folder as a checkpoint that any grid loads; see ``checkpoint.huggingface.convert``.

    Returns:
        The step folder.
    """
    return convert.import_huggingface(
        Path(source), Path(target), tokenizer=tokenizer, verify=verify, overwrite=overwrite
    )


def export_huggingface(
    source: str | Path, target: str | Path, *, dtype: str | None = None, verify: bool = False, overwrite: bool = False
) -> None:
    """A run or checkpoint as a Hugging Face folder; see ``checkpoint.huggingface.convert``."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype}: it can be {', '.join(DTYPES)}.")
    convert.export_huggingface(Path(source), Path(target), dtype=dtype, verify=verify, overwrite=overwrite)


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 16,
    tensor: int = 1,
    pipeline: int = 1,
    precision: str = "fp32",
    **sampling: Any,
) -> list[str]:
    """What a model goes on with.

    Args:
        checkpoint: RUN, RUN/checkpoints, one step, or a Hugging Face folder.
        prompts: texts, in a list.
        max_new_tokens: of each answer, at most.
        stop: texts that end an answer.
        seed: of what is drawn.
        batch_size: answers that are written at the same time.
        tensor, pipeline: ranks that the model is cut over, under torchrun.
        precision: fp32 or bf16.
        sampling: fields of ``inference.sampling.Sampling``: ``temperature``, ``top_p``, ...; greedy without.

    Returns:
        An answer for each prompt, without the prompt, on every rank.

    Raises:
        UserError: the checkpoint or an option cannot be used, a prompt is too long.
    """
    _check_generate(prompts, max_new_tokens, stop, batch_size, precision, sampling)
    with _leaving_no_group():
        context = join_grid(tensor, pipeline, replicas=False, timeout=timedelta(hours=2))
        loaded = load_model(str(checkpoint), context, Settings(DTYPES[precision]))
        given = (encode_prompt(text, loaded, False) for text in prompts)
        requests = [Request(ids, max_new_tokens, row_seed(seed, number)) for number, ids in enumerate(given)]
        for number, request in enumerate(requests):
            loaded.check(request, f"Prompt {number}")
        engine = Engine(loaded.model, Sampling(**sampling), loaded.stopping(stop), batch_size)
        found = {answer.request: answer.text for answer in engine.answers(requests)}
        return [found[number] for number in range(len(requests))]


def _check_generate(
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    precision: str,
    sampling: Mapping[str, Any],
) -> None:
    faults = [
        f"{name} is no list of texts: give [{value!r}] for a single one."
        for name, value in (("prompts", prompts), ("stop", stop))
        if isinstance(value, str) or not all(isinstance(text, str) for text in value)
    ]
    numbers = (("max_new_tokens", max_new_tokens), ("batch_size", batch_size))
    faults += [f"{name} is {value}: it must be at least 1." for name, value in numbers if value < 1]
    if precision not in ("fp32", "bf16"):
        faults.append(f"precision is {precision}: it can be fp32 or bf16.")
    known = [field.name for field in dataclasses.fields(Sampling)]
    faults += [
        f"generate takes no {name}; of how tokens are chosen there are {', '.join(known)}."
        for name in sampling
        if name not in known
    ]
    if faults:
        raise ConfigError(faults)
