"""Our generation against ``transformers.generate``: one prompt, and several prompts of unequal length.

Both models have the same random weights (a 58M Llama), threads and prompts, write the same number of tokens, and take
turns. transformers gets several prompts as one batch, padded on the left, and also one after the other.

    python tools/benchmark/generation.py --precision bf16
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch
from report import Ratio, Report, add_json_argument
from synthetic import seconds_in_turns

from megatron_med.errors import run_command
from megatron_med.inference.engine import Engine
from megatron_med.inference.load import Settings, load_model
from megatron_med.inference.request import Request
from megatron_med.model.build import DTYPES
from megatron_med.parallel.context import single_process_context

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1376,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="of the second comparison")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of one prompt; several have 1/4 to 7/4 of it")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_json_argument(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[arguments.precision]
    generator = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]

    middle = arguments.prompt_tokens
    one = [prompt(middle)]
    several = [prompt(generator.randint(max(1, middle // 4), middle * 7 // 4)) for _ in range(arguments.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        theirs = _their_model(Path(folder), dtype, device)
        ours = load_model(folder, single_process_context(device), Settings(dtype)).model

    def run_ours(prompts: list[list[int]]) -> None:
        requests = [Request(ids, arguments.new_tokens) for ids in prompts]
        written = sum(len(answer.tokens) for answer in Engine(ours, slots=len(prompts)).answers(requests))
        assert written == arguments.new_tokens * len(prompts)

    def run_theirs(prompts: list[list[int]]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
        out = theirs.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            pad_token_id=0,
        )
        assert out.shape[1] == longest + arguments.new_tokens

    lengths = sorted(map(len, several))
    settings = {
        "model": "58M Llama",
        "precision": arguments.precision,
        "device": device.type,
        "threads": arguments.threads,
        "new tokens": arguments.new_tokens,
        "one prompt": middle,
        "several prompts": f"{len(several)} of {lengths[0]} to {lengths[-1]} tokens",
    }
    contestants = {
        "one prompt, transformers": lambda: run_theirs(one),
        "one prompt, ours": lambda: run_ours(one),
        "several, transformers, padded": lambda: run_theirs(several),
        "several, transformers, one by one": lambda: [run_theirs([ids]) for ids in several],
        "several, ours": lambda: run_ours(several),
    }
    report = Report(f"generation {arguments.precision}", settings)
    seconds = seconds_in_turns(contestants, arguments.rounds, device)
    for name, times in seconds.items():
        one_alone = name.startswith("one")
        ratio = Ratio.of(seconds["one prompt, ours" if one_alone else "several, ours"], times)
        tokens = arguments.new_tokens * (1 if one_alone else len(several))
        row = {"contestant": name, "tokens/s": tokens / statistics.median(times)}
        report.rows.append(row | {"ours is": ratio.median, "spread": ratio.spread})
    report.show()
    if arguments.json:
        report.write(arguments.json)


def _their_model(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Writes the model into ``folder``, where ours is loaded from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None, tie_word_embeddings=False)).to(dtype)
    model.save_pretrained(folder)
    return model.to(device).eval()


if __name__ == "__main__":
    run_command(main)
