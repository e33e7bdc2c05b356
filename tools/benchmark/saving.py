"""How long training stands still for a checkpoint, and how much slower it goes while one is written.

    torchrun --nproc-per-node 2 tools/benchmark/saving.py --preset llama-134m --folder /scratch/stall

Saving at once and in the background take turns in one run. The copy in memory is the least that any stall can be.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from report import Report, add_json_argument
from synthetic import make_config, make_step, random_ids, seconds_of

from megatron_med.checkpoint.folder import CheckpointState, step_folder
from megatron_med.checkpoint.save import CheckpointSaver
from megatron_med.checkpoint.views import state_shards
from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import ParallelConfig
from megatron_med.errors import run_command
from megatron_med.launch.process_group import start_process_group
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import create_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-10m", choices=sorted(PRESETS))
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--repeat", type=int, default=5)
    add_json_argument(parser)
    arguments = parser.parse_args()
    device, _ = start_process_group(timedelta(minutes=10))
    context = create_context(ParallelConfig(), device)
    config = make_config(arguments.preset, arguments.sequence_length, 1, arguments.precision)
    train_module, step = make_step(config, context, random_ids(config, device, seed=context.batch.rank), 2)
    folder = arguments.folder or Path(tempfile.gettempdir()) / "megatron_med-saving"
    savers = {
        "at once": CheckpointSaver(context, asynchronous=False, on_commit=lambda _: None),
        "in the background": CheckpointSaver(context, asynchronous=True, on_commit=lambda _: None),
    }
    state = CheckpointState(model={})

    def slowest(seconds: float) -> float:
        return all_reduce(torch.tensor(seconds, device=device), context.world, dist.ReduceOp.MAX).item()

    shards = state_shards(train_module.optimizer)
    buffers = [torch.empty_like(tensor, device="cpu") for tensor in shards.values()]
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(slowest(seconds))

    step()
    for turn in range(arguments.repeat + 1):
        for name, saver in savers.items():
            note("step", seconds_of(step, device))
            note("copy in memory", seconds_of(lambda: _copy(buffers, list(shards.values())), device))
            start = time.perf_counter()
            saver.save(step_folder(folder, turn), train_module.optimizer, state)
            note(f"stall, saving {name}", time.perf_counter() - start)
            note(f"step after saving {name}", seconds_of(step, device))
            saver.wait()
            note(f"committed after saving {name}", time.perf_counter() - start)
        if turn == 0:
            times.clear()  # the first background save makes its buffers
    if context.world.is_first:
        mine = sum(tensor.numel() * tensor.element_size() for tensor in shards.values())
        named = {"preset": arguments.preset, "ranks": context.world.size, "MB of a rank": round(mine / 1e6)}
        report = Report(f"saving {arguments.preset} {arguments.precision}", named | {"rounds": arguments.repeat})
        report.rows = [{"what": name, "ms": 1e3 * statistics.median(values)} for name, values in times.items()]
        report.show()
        if arguments.json:
            report.write(arguments.json)
        shutil.rmtree(folder, ignore_errors=True)
    dist.destroy_process_group()


def _copy(buffers: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    for buffer, tensor in zip(buffers, tensors, strict=True):
        buffer.copy_(tensor)


if __name__ == "__main__":
    run_command(main)
