"""The model card of an exported folder: what the model was made of, and what it is not for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_med.checkpoint.adapter import weights_digest
from megatron_med.checkpoint.folder import CheckpointState, step_of
from megatron_med.config import ModelConfig
from megatron_med.config.schema import CLASSIFICATION
from megatron_med.errors import DataError

CARD = "README.md"

_USE = """\
For research on medical language models, and as a base for tuning. **Not medical advice**: its text may be wrong, out of
date, incomplete or made up, however sure it sounds. It has not been tested for the care of patients and must not be
used for diagnosis, treatment or triage. What it says follows its training text, with the gaps and the bias of that.
Whoever builds on it has to test it for that use, with people who know the field.
"""


def model_card(
    name: str,
    step: Path,
    config: ModelConfig,
    state: CheckpointState,
    results: Sequence[Path] = (),
    *,
    base_model: str | None = None,
) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        name: of the model.
        step: folder of the checkpoint; what its run tells is read from the folders above it.
        config, state: of the checkpoint.
        results: folders of ``megatron-med evaluate`` whose scores are told.
        base_model: what adapters are loaded beside; None for whole weights.

    Raises:
        DataError: a folder holds no results, or those of another model.
    """
    written_by = Path(state.run["merged"]["adapter"]) if "merged" in state.run else step
    run = _run_of(written_by)
    task = "text-classification" if config.head == CLASSIFICATION else "text-generation"
    front = {
        "library_name": "transformers" if base_model is None else "peft",
        "pipeline_tag": task,
        "tags": ["medical", "megatron_med", config.family],
    }
    if base_model is not None:
        front["base_model"] = base_model
    kind = "A" if base_model is None else "Adapters (LoRA) of a"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{kind} {config.family} model of {config.num_layers} layers, {config.hidden_size} wide, with "
        f"{config.vocab_size:,} tokens and a context of {config.max_position_embeddings:,}, trained with "
        "megatron_med.\n",
        "## Intended use, and its limits\n\n" + _USE,
        "## Base\n\n" + _base(run, state, base_model),
        "## Data\n\n" + "\n".join(_data(run, written_by)) + "\n",
        "## Recipe\n\n" + _recipe(run, written_by),
    ]
    if state.chat is not None:
        parts.append(f"Conversations are in the template `{state.chat['template']}` (`tokenizer_config.json`).\n")
    if state.head is not None and state.head["labels"]:
        separator = state.head["separator"]
        form = f"context{separator}question{separator}"
        classes = ", ".join(state.head["labels"])
        parts.append(
            f"Classes: {classes}, at the last token of `{form}` of at most {state.head['max_length']} tokens.\n"
        )
    parts.append("## Scores\n\n" + ("\n".join(_scores(results, weights_digest(step))) or "None are recorded.") + "\n")
    return "\n".join(parts)


def _run_of(step: Path) -> dict[str, Any]:
    """The configuration of the run that has written a checkpoint; empty where there is none."""
    path = step.parent.parent / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _base(run: dict[str, Any], state: CheckpointState, base_model: str | None) -> str:
    if base_model is not None:
        return f"To be loaded beside `{base_model}`. The licence of that base holds for these adapters, too.\n"
    if "merged" in state.run:
        base = state.run["merged"]["base"]
        return f"Adapters (LoRA) were merged into the weights of `{base}`. The licence of that base holds here, too.\n"
    load = (run.get("checkpoint") or {}).get("load")
    if load:
        return f"The weights of `{load}` were trained on. The licence of that base holds for this model, too.\n"
    if state.run.get("imported"):
        return "Imported from a Hugging Face folder and not trained here: its own card and licence hold.\n"
    return "None: trained from random weights.\n" if run else "Not recorded in this checkpoint.\n"


def _data(run: dict[str, Any], step: Path) -> Iterator[str]:
    sources = (run.get("data") or {}).get("train") or []
    if not sources:
        yield "Not recorded."
    for source in sources:
        prefix = Path(source["path"])
        licences = _licences(prefix, step)
        share = f", weight {source['weight']:g}" if source.get("weight", 1) != 1 else ""
        yield f"- `{prefix.name}`{share}: {licences or 'licence not recorded: see where it comes from'}"


def _licences(prefix: Path, step: Path) -> str:
    """What the manifest of the corpus says of a source; the token files are called SOURCE-train. A path that is not
    whole begins where the run was started: here, or somewhere above the checkpoint."""
    places = (folder / prefix.parent / "manifest.json" for folder in (Path(), *step.resolve().parents))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return ""
    sources = json.loads(path.read_text(encoding="utf-8")).get("sources", {})
    source = sources.get(prefix.name) or sources.get(prefix.name.rpartition("-")[0]) or {}
    return str(source.get("license", ""))


def _recipe(run: dict[str, Any], step: Path) -> str:
    steps = step_of(step)
    if not run:
        return f"Step {steps:,}.\n"
    train, optimizer = run["train"], run.get("optimizer") or {}
    lora = run.get("lora") or {}
    facts = {
        "steps": f"{steps:,}",
        "global batch": f"{train['global_batch_size']:,} samples of {run['data']['sequence_length']:,} tokens",
        "optimizer": f"{optimizer.get('name')}, lr {optimizer.get('lr')}, weight decay {optimizer.get('weight_decay')}",
        "precision": run.get("precision"),
    }
    if lora.get("rank"):
        facts["adapters"] = f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}"
    return "".join(f"- {name}: {value}\n" for name, value in facts.items())


def _scores(results: Sequence[Path], weights: str) -> Iterator[str]:
    if results:
        yield "| task | way | value | 95 % interval | questions |\n|---|---|---|---|---|"
    for folder in results:
        try:
            content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            rows = list(_rows(content["tasks"]))
            other = content["settings"]["weights"] != weights
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder} holds no results.json of megatron-med evaluate: name its --output folder."
            ) from error
        if other:
            raise DataError(
                f"{folder} holds the scores of other weights ({content['settings'].get('checkpoint')}): a card tells "
                "those of its own model."
            )
        yield from rows


def _rows(tasks: dict[str, Any]) -> Iterator[str]:
    for task, metrics in tasks.items():
        for metric, found in metrics.items():
            if "@" not in metric:
                low, high = found["interval"]
                yield f"| {task} | {metric} | {found['value']:.4f} | {low:.4f} to {high:.4f} | {found['count']} |"
