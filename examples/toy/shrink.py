"""A recipe at toy size: the model of a toy base or a small shape, few steps, small batches; everything else stays.

python examples/toy/shrink.py RECIPE.yaml OUT.yaml --name NAME --train PREFIX ... [--base CHECKPOINT] --steps N
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_med.checkpoint.folder import read_state, resolve_checkpoint

SHAPES = {
    "llama": {"family": "llama", "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 384},
    "gpt2": {"family": "gpt2", "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4},
}
HEAD = ("head", "num_labels")


def main() -> None:
    arguments = _parser().parse_args()
    tree = yaml.safe_load(Path(arguments.recipe).read_text(encoding="utf-8"))
    published = json.loads(json.dumps(tree))
    _model(tree, arguments)
    _parallel(tree, arguments)
    _data(tree, arguments)
    _training(tree, arguments)
    Path(arguments.output).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    was, now = published["train"], tree["train"]
    length = f"{was['steps']} steps" if "steps" in was else f"{was['epochs']} epochs"
    print(
        f"{arguments.name}: {'/'.join(Path(arguments.recipe).parts[-2:])} with {now['steps']} steps (there {length}) "
        f"of {now['global_batch_size']} ({was['global_batch_size']}), lr {tree['optimizer']['lr']:g} "
        f"({published['optimizer']['lr']:g})"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("output")
    parser.add_argument("--name", required=True, help="of the run, below runs/")
    parser.add_argument("--train", nargs="+", required=True, metavar="PREFIX[=REPEAT]", help="token files, in order")
    parser.add_argument("--valid", nargs="+", default=[], metavar="PREFIX", help="default: those of --train")
    parser.add_argument(
        "--base", help="checkpoint that gives the model and the weights; else a small shape from scratch"
    )
    parser.add_argument("--vocab-size", type=int, help="without a base")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--replicate", type=int, default=1)
    return parser


def _model(tree: dict[str, Any], arguments: argparse.Namespace) -> None:
    recipe = tree["model"]
    head = {name: recipe[name] for name in HEAD if name in recipe}
    if arguments.base is not None:
        stored = read_state(resolve_checkpoint(arguments.base)).model
        shape = {name: value for name, value in stored.items() if name not in ("preset", *HEAD)}
    elif arguments.vocab_size is not None:
        family = "gpt2" if str(recipe.get("preset", "")).startswith(("biomedlm", "gpt2")) else "llama"
        shape = SHAPES[family] | {"vocab_size": arguments.vocab_size, "max_position_embeddings": 1024}
    else:
        shape = recipe
    tree["model"] = shape | head


def _parallel(tree: dict[str, Any], arguments: argparse.Namespace) -> None:
    sizes = {name: getattr(arguments, name) for name in ("tensor", "pipeline", "replicate")}
    tree["parallel"] = tree.get("parallel", {}) | {name: size for name, size in sizes.items() if size > 1}
    for name, size in sizes.items():
        if size == 1:
            tree["parallel"].pop(name, None)
    tree["precision"] = "fp32"


def _data(tree: dict[str, Any], arguments: argparse.Namespace) -> None:
    data = tree["data"]
    given = [prefix.partition("=") for prefix in arguments.train]
    recipe = data.get("train", [])
    sources = []
    for number, (prefix, _, repeat) in enumerate(given):
        mixed = (
            {name: value for name, value in recipe[number].items() if name != "path"} if number < len(recipe) else {}
        )
        sources.append({"path": prefix, **mixed, **({"repeat": float(repeat)} if repeat else {})})
    data |= {"train": sources, "sequence_length": arguments.length, "cache_dir": "cache"}
    data["valid"] = [{"path": prefix} for prefix in arguments.valid or [prefix for prefix, _, _ in given]]
    data.pop("tokenizer", None)
    if data.get("samples_per_epoch") is not None:
        data["samples_per_epoch"] = 100


def _training(tree: dict[str, Any], arguments: argparse.Namespace) -> None:
    train, schedule, optimizer = tree["train"], tree["lr_schedule"], tree["optimizer"]
    steps = arguments.steps
    if schedule.get("warmup_steps"):  # the same share of the run, of which there are at least a step
        share = min(0.5, schedule["warmup_steps"] / train["steps"]) if "steps" in train else 0.1
        schedule["warmup_steps"] = max(1, round(share * steps))
    schedule.pop("decay_steps", None)
    if schedule.get("min_lr"):
        schedule["min_lr"] *= arguments.lr / optimizer["lr"]
    if optimizer["name"] == "decoupled_adamw":  # its weight decay is not multiplied by the learning rate
        pass
    optimizer["lr"] = arguments.lr
    train.pop("epochs", None)
    train |= {
        "steps": steps,
        "global_batch_size": arguments.batch,
        "micro_batch_size": 2,
        "output_dir": f"runs/{arguments.name}",
        "valid_interval": max(1, steps // 2),
        "valid_samples": 8,
    }
    checkpoint = tree.setdefault("checkpoint", {})
    checkpoint |= {"interval": steps}
    checkpoint.pop("keep_every", None)
    checkpoint.pop("load", None)
    if arguments.base is not None:
        checkpoint["load"] = arguments.base
    tree["logging"] = {"interval": 10}


if __name__ == "__main__":
    main()
