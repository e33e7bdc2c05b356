"""lm-eval's command line with our model registered as ``megatron_med``.

    python -m megatron_med.evaluate --model megatron_med --model_args checkpoint=RUN --tasks local_medqa_4options \
        --metadata '{"data": "DIR"}'
    torchrun --nproc-per-node 8 -m megatron_med.evaluate --model megatron_med \
        --model_args checkpoint=RUN,tensor=2,pipeline=2 --tasks ...

Our own tasks (``local_...``, evaluate/tasks) are found without --include_path. Rank 0 alone writes and prints.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch.distributed as dist

from megatron_med.errors import ConfigError, run_command
from megatron_med.evaluate.catalogue import FOLDER

_WRITES = ("--output_path", "--wandb_args", "--hf_hub_log_args")


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError("lm-eval is not installed: pip install 'megatron_med[evaluate]'.") from error
    from megatron_med.evaluate.language_model import MegatronMedLM

    register_model("megatron_med")(MegatronMedLM)
    arguments = sys.argv[1:]
    if arguments[:1] not in (["ls"], ["validate"]) and "--include_path" not in arguments and arguments:
        arguments += ["--include_path", str(FOLDER)]
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            arguments = _without(arguments, _WRITES)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        sys.argv = [sys.argv[0], *arguments]
        try:
            cli_evaluate()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _without(arguments: list[str], options: tuple[str, ...]) -> list[str]:
    """The command line without options that take a value."""
    kept = []
    skip = False
    for word in arguments:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = word in options
        if not skip and not word.startswith(tuple(f"{option}=" for option in options)) and word != "--log_samples":
            kept.append(word)
    return kept


if __name__ == "__main__":
    run_command(main)
