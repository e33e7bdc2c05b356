"""Plans a run without its cluster: memory of every rank, traffic, bubble, step time, tokens/s and MFU. No GPU."""

from __future__ import annotations

import argparse
import json
import sys
import time

from megatron_med.commands.arguments import Parser
from megatron_med.config import load_config
from megatron_med.errors import EXIT_FAILED
from megatron_med.plan.cluster import KINDS, Cluster, check_precision, parse_cluster
from megatron_med.plan.cost_model import KernelAssumptions


def main() -> None:
    parser = Parser(
        description=__doc__,
        epilog="--section.key value changes a field of the configuration, as in training (python -m megatron_med.train "
        "--help lists them). Exit code 1: does not fit.",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--cluster", required=True, help=f"KIND:NODESxGPUS; kinds: {', '.join(KINDS)}")
    parser.add_argument("--nics", type=int, help="network cards of a node (default: as the kind has)")
    parser.add_argument(
        "--elementwise",
        choices=("separate", "fused"),
        default="separate",
        help="separate: one kernel an operation, as plain torch runs (default); fused: neighbours become one",
    )
    parser.add_argument(
        "--attention",
        choices=("flash2", "flash1", "scores"),
        default="flash2",
        help="FlashAttention-2 (default), the first one, or all scores in memory (its time only)",
    )
    parser.add_argument("--search", action="store_true", help="rank the ways to cut this run over the cluster")
    parser.add_argument("--top", type=int, default=10, help="plans that --search shows")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, options = parser.parse_known_args()
    start = time.perf_counter()
    cluster = parse_cluster(arguments.cluster, arguments.nics)
    kernels = KernelAssumptions(arguments.elementwise, arguments.attention)
    if arguments.search:
        _search(arguments, options, cluster, kernels)
    else:
        fits = _plan(arguments, options, cluster, kernels)
        if not fits:
            sys.exit(EXIT_FAILED)
    if not arguments.json:
        print(f"\nplanned in {time.perf_counter() - start:.1f} s")


def _plan(arguments: argparse.Namespace, options: list[str], cluster: Cluster, kernels: KernelAssumptions) -> bool:
    config = load_config([arguments.config, *options], cluster.world_size)
    check_precision(config)
    from megatron_med.plan.predict import plan  # after the configuration was accepted: refusing takes no torch
    from megatron_med.plan.report import as_json, as_text

    result = plan(config, cluster, kernels)
    print(json.dumps(as_json(result), indent=1) if arguments.json else as_text(result))
    return result.fits


_ANY_CUT = {
    "parallel.tensor": "1",
    "parallel.pipeline": "1",
    "parallel.virtual_stages": "1",
    "parallel.schedule": "1f1b",
    "parallel.layers_per_stage": "null",
    "parallel.replicate": "1",
    "train.micro_batch_size": "1",
}
"""The search chooses these itself: the configuration's own need not suit the cluster."""


def _search(arguments: argparse.Namespace, options: list[str], cluster: Cluster, kernels: KernelAssumptions) -> None:
    neutral = [word for name, value in _ANY_CUT.items() for word in (f"--{name}", value)]
    config = load_config([arguments.config, *options, *neutral], 1)
    check_precision(config)
    from megatron_med.plan.report import as_json, search_as_text
    from megatron_med.plan.search import search

    result = search(config, cluster, kernels, arguments.top)
    if arguments.json:
        sizes = [vars(size) for size in result.sizes]
        print(json.dumps({"best": [as_json(plan) for plan in result.best], "sizes": sizes}, indent=1))
    else:
        print(search_as_text(result, cluster))
