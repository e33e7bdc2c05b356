"""The training step of one process against the same step in other frameworks: same model, batch and threads.

All take turns, step by step, in one process; medians, ratios of pairs, and the share of the machine's own rate of
matrix products. Peak memory is that of a process of its own for each, above what is taken before the model is made.

    python tools/benchmark/throughput.py --preset llama-58m --sequence-length 512 --micro-batch-size 4 --precision bf16
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peers import NEEDS, make_peer, missing
from report import Report, add_json_argument, in_own_process
from synthetic import make_config, make_step, random_ids, seconds_in_turns, step_parser

from megatron_med.config.schema import Config
from megatron_med.errors import run_command
from megatron_med.model.build import DTYPES
from megatron_med.model.flops import training_flops_per_token
from megatron_med.parallel.context import single_process_context

OURS, PRODUCT = "megatron_med", "a product of 2,048^3"


def main() -> None:
    parser = step_parser(__doc__, steps=9)
    parser.add_argument("--peers", nargs="*", choices=list(NEEDS), default=list(NEEDS), help="against which")
    parser.add_argument(
        "--memory-of", choices=[OURS, *NEEDS], help="measures one contestant's peak memory, and no time"
    )
    parser.add_argument("--no-memory", action="store_true", help="leaves the peak memory out")
    add_json_argument(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config(arguments.preset, arguments.sequence_length, arguments.micro_batch_size, arguments.precision)
    if arguments.memory_of:
        print(json.dumps({"gigabytes": _peak_memory(arguments.memory_of, config, device) / 1e9}))
        return
    report = Report(
        f"step {arguments.preset} {arguments.precision}",
        {
            "preset": arguments.preset,
            "precision": arguments.precision,
            "batch": f"{arguments.micro_batch_size} x {arguments.sequence_length}",
            "threads": arguments.threads,
            "rounds": arguments.steps,
        },
    )
    contestants = {OURS: _make(OURS, config, device)}
    for name in _taking_part(arguments.peers, arguments.precision, report):
        try:
            contestants[name] = _make(name, config, device)
            contestants[name]()
        except Exception as error:  # a peer's own fault must not end the comparison
            contestants.pop(name, None)
            report.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    contestants[PRODUCT] = _product(DTYPES[arguments.precision], device)
    _report_turns(report, seconds_in_turns(contestants, arguments.steps, device, warm_up=2), config)
    if not arguments.no_memory:
        for row in report.rows[:-1]:
            measured = in_own_process([__file__, *_without_json(sys.argv[1:]), "--memory-of", row["contestant"]])
            row["peak GB"] = measured.get("gigabytes", measured.get("error"))
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _taking_part(names: list[str], precision: str, report: Report) -> list[str]:
    """Those that are installed and mean something in this precision; the others are named."""
    found = []
    for name in names:
        if missing(name):
            report.left_out[name] = "not installed: pip install 'megatron_med[peers]'"
        elif not (name.endswith("autocast") and precision == "fp32"):
            found.append(name)
    return found


def _make(name: str, config: Config, device: torch.device) -> Callable[[], object]:
    ids = random_ids(config, device)
    if name == OURS:
        return make_step(config, single_process_context(device), ids)[1]
    return make_peer(name, config.model, ids, config.precision)


def _product(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right


def _report_turns(report: Report, seconds: dict[str, list[float]], config: Config) -> None:
    """Rows with tokens per second and the share of the product's rate."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    flops = tokens * training_flops_per_token(config.model, config.data.sequence_length)
    rate = 2.0 * 2048**3 / statistics.median(seconds[PRODUCT])
    report.add_turns(seconds)
    for row in report.rows:
        if row["contestant"] != PRODUCT:
            row["tokens/s"] = 1e3 * tokens / row["ms"]
            row["share of products"] = flops / (row["ms"] / 1e3) / rate
    report.rows[-1] |= {"ratio": None, "spread": 0.0}


def _peak_memory(name: str, config: Config, device: torch.device) -> int:
    """Bytes at the peak of three steps, above the level before the model is made."""
    if device.type == "cuda":
        _run_steps(name, config, device)
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest level begins again here (Linux)
    before = _status("VmRSS")
    _run_steps(name, config, device)
    return _status("VmHWM") - before


def _run_steps(name: str, config: Config, device: torch.device) -> None:
    step = _make(name, config, device)
    gc.collect()
    for _ in range(3):
        step()


def _status(name: str) -> int:
    """Bytes of an entry of this process' status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _without_json(arguments: list[str]) -> list[str]:
    if "--json" not in arguments:
        return arguments
    place = arguments.index("--json")
    return arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    run_command(main)
