"""Adapters as PEFT keeps them: ``adapter_config.json`` and ``adapter_model.safetensors``, in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_med.checkpoint import folder as folders
from megatron_med.checkpoint.adapter import MERGE, base_of, describe_adapter, lora_of
from megatron_med.checkpoint.create import new_step, refuse_overlap
from megatron_med.checkpoint.folder import CheckpointState
from megatron_med.checkpoint.huggingface.card import CARD, model_card
from megatron_med.checkpoint.huggingface.config import read_settings
from megatron_med.checkpoint.huggingface.files import open_tensors
from megatron_med.checkpoint.huggingface.mapping import tensor_maps
from megatron_med.checkpoint.huggingface.tokenizer import write_tokenizer
from megatron_med.checkpoint.load import verify_checkpoint
from megatron_med.checkpoint.storage import Reader, write_streaming
from megatron_med.config import ModelConfig, model_from_dict
from megatron_med.config.lora import LORA_TARGETS, targets_of
from megatron_med.config.schema import LoRAConfig
from megatron_med.errors import CheckpointError
from megatron_med.files import write_json, write_text
from megatron_med.model.build import build_stage
from megatron_med.model.lora import add_adapters
from megatron_med.outputs import output_folder, refuse_existing
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import ParameterLayout, parameters_with_layout
from megatron_med.tokenizer import Tokenizer, load_tokenizer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_LAYER = {"llama": "model.layers.", "gpt2": "transformer.h."}
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
}
"""Settings of PEFT that change what an adapter computes, and the value that leaves it plain LoRA."""
_UNCHANGED = (True, False, None, "gaussian", "orthogonal")
"""``init_lora_weights`` that leave the base as it was; others (PiSSA, OLoRA, ...) take a part out of its weights."""
_SHOWN = 4


@dataclass(frozen=True)
class AdapterTensor:
    """One factor of ours and PEFT's name of it."""

    layout: ParameterLayout
    name: str

    def to_peft(self, tensor: Tensor) -> Tensor:
        """In the order of PEFT's rows: GPT-2's joint q, k and v one after the other."""
        return tensor.index_select(0, self._order()) if self.layout.parts else tensor

    def to_canonical(self, tensor: Tensor) -> Tensor:
        """In the order of ours."""
        return torch.empty_like(tensor).index_copy_(0, self._order(), tensor) if self.layout.parts else tensor

    def _order(self) -> Tensor:
        return torch.cat(list(self.layout.parts.values()))


def adapter_tensors(model: ModelConfig, lora: LoRAConfig) -> list[AdapterTensor]:
    """Every factor of a model's adapters."""
    stage = build_stage(model, single_process_context(torch.device("meta")), torch.float32)
    add_adapters([stage], model, lora)
    modules = {(target.linear, target.name): target.module for target in targets_of(model, lora)}
    found = []
    for layout, _ in parameters_with_layout(stage):
        if layout.adapter and ".lora." in layout.name:
            path, _, last = layout.name.partition(".lora.")
            _, layer, linear = path.split(".", 2)
            target, _, factor = last.rpartition("_")
            module = modules[linear, target]
            found.append(AdapterTensor(layout, f"{_PREFIX}{_LAYER[model.family]}{layer}.{module}.lora_{factor}.weight"))
    return found


def export_adapter(
    source: Path,
    target: Path,
    *,
    base_model: str | None = None,
    base: Path | None = None,
    overwrite: bool = False,
    results: Sequence[Path] = (),
) -> None:
    """Writes the adapters of a checkpoint as a PEFT folder, with the tokenizer, its chat template and a model card.

    Args:
        source: RUN, RUN/checkpoints or one step, of adapters.
        target: the new folder.
        base_model: Hugging Face's name or folder of the base; None: the path of ours.
        base: where the base is; None: where it was.
        overwrite: replace ``target``.
        results: folders of ``megatron-med evaluate`` whose scores the card tells.
    """
    step, state = open_adapter(source)
    refuse_overlap(target, step)
    refuse_existing(target, overwrite)
    if state.new_rows is not None and lora_of(state).train_rows is not None:
        raise CheckpointError(
            f"{step} also holds trained rows of the vocabulary (lora.train_rows), which servers refuse in an adapter. "
            f"Merge it, and export that: {MERGE.format(adapter=step)}, then megatron-med export."
        )
    model, lora = model_from_dict(state.model), lora_of(state)
    named = base_of(step, state, base) if base is not None or base_model is None else None
    recorded = base_model or str(named)
    if base_model is None:
        print(
            f"{CONFIG} names {recorded} as the base, a checkpoint that PEFT cannot read: with --base-model it names "
            "the Hugging Face folder or model that the adapters are loaded beside"
        )
    stored = step / folders.TOKENIZER
    tokenizer = load_tokenizer(stored) if stored.is_dir() else None
    with output_folder(target, overwrite) as partial:
        reader = Reader(step)
        tensors = {
            one.name: one.to_peft(reader.read(one.layout.name)).contiguous() for one in adapter_tensors(model, lora)
        }
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, _to_peft(model, lora, recorded))
        if tokenizer is not None:
            write_tokenizer(partial, tokenizer, model.max_position_embeddings, state.chat)
        card = model_card(target.resolve().name, step, model, state, results, base_model=recorded)
        write_text(partial / CARD, card)


def open_adapter(source: Path) -> tuple[Path, CheckpointState]:
    """The step folder of adapters and its state, checked.

    Raises:
        CheckpointError: it is damaged, or holds whole weights.
    """
    step = folders.resolve_checkpoint(source)
    verify_checkpoint(step, single_process_context())
    state = folders.read_state(step)
    if state.adapter is None:
        raise CheckpointError(f"{step} holds a whole model, no adapters: megatron-med export writes it as one.")
    return step, state


def _to_peft(model: ModelConfig, lora: LoRAConfig, base_model: str) -> dict[str, Any]:
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(dict.fromkeys(_peft_targets(model, lora))),
        "bias": "none",
        "fan_in_fan_out": model.family == "gpt2",
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _peft_targets(model: ModelConfig, lora: LoRAConfig) -> Iterator[str]:
    """Names that mean the adapted matrices and no others: the last word, or more where that has another meaning."""
    chosen = targets_of(model, lora)
    for target in chosen:
        alike = [other for other in LORA_TARGETS[model.family] if other.name == target.name]
        yield target.name if all(other in chosen for other in alike) else target.module


def import_adapter(source: Path, target: Path, base: Path, *, overwrite: bool = False) -> Path:
    """Turns a PEFT folder into a checkpoint of adapters that any topology loads.

    Args:
        source: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        target: checkpoint folder; gets ``step-00000000`` and ``latest``.
        base: checkpoint of the weights that it belongs to.
        overwrite: replace what is in ``target``.

    Returns:
        The step folder.

    Raises:
        CheckpointError: another kind of adapter, or one that does not fit the base.
    """
    config = _read_config(source)
    weights = folders.resolve_checkpoint(base)
    refuse_overlap(target, source, weights)
    verify_checkpoint(weights, single_process_context())
    state = folders.read_state(weights)
    if state.adapter is not None:
        raise CheckpointError(f"--base {weights} holds adapters itself: give the weights that they stand beside.")
    model = model_from_dict(state.model)
    tensors = _read_tensors(source)
    lora = _from_peft(config, model, tensors)
    known = adapter_tensors(model, lora)
    _check_fit(tensors, known, source)
    _check_named_base(config, model, weights)
    stored = weights / folders.TOKENIZER
    tokenizer: Tokenizer | None = load_tokenizer(stored) if stored.is_dir() else None
    with new_step(target, overwrite, tokenizer) as partial:
        specs = {one.layout.name: (one.layout.global_shape, torch.float32) for one in known}
        make = {one.layout.name: (lambda one=one: one.to_canonical(tensors[one.name].float())) for one in known}
        write_streaming(partial, specs, make)
        adapter = describe_adapter(lora, model, weights)
        run = {"precision": state.run.get("precision", "fp32"), "imported": True}
        described = CheckpointState(
            model=asdict(model),
            tokenizer=state.tokenizer,
            chat=state.chat,
            adapter=adapter,
            new_rows=state.new_rows,
            run=run,
        )
        folders.write_state(partial, described)
    return folders.step_folder(target, 0)


def _read_config(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{source} is no PEFT folder: it has no {CONFIG}. Check --from.")
    config = read_settings(path, "an adapter")
    odd = [name for name, plain in _PLAIN.items() if config.get(name, plain) not in (plain, None)]
    start = config.get("init_lora_weights", True)
    if start not in _UNCHANGED:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's weights: such an adapter does not "
            "belong to the base itself. Convert it to plain LoRA with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it there."
        )
    if odd:
        raise CheckpointError(
            [f"{path}: {name} is {config[name]!r}: only {_PLAIN[name]!r} can be imported." for name in odd]
        )
    return config


def _check_named_base(config: dict[str, Any], model: ModelConfig, base: Path) -> None:
    """Compares the first layer and the last norm of the base with those of the folder that the adapter names. Where
    that is none, nobody can tell, and both are told.

    Raises:
        CheckpointError: the weights differ.
    """
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
        print(f"the adapter was made for {name}; it stands beside {base} now")
        return
    files, reader = open_tensors(Path(name)), Reader(base)
    compared = [m for m in tensor_maps(model) if m.layout.name.startswith(("layers.0.", "final_norm."))]
    for one in compared:
        mine = reader.read(one.layout.name)
        fits = all(hf in files and files.shape(hf) == shape for hf, shape in one.hf_shapes(model.vocab_size).items())
        if not fits or not torch.equal(one.to_canonical(files.read, mine.dtype), mine):
            raise CheckpointError(
                f"The adapter was made for {name}, whose {one.hf_names[0]} is not that of {base}: give the base that "
                "was imported from there."
            )


def _read_tensors(source: Path) -> dict[str, Tensor]:
    path = source / WEIGHTS
    if not path.is_file():
        hint = (
            f" It holds {_PICKLED}, which can run code and is never read: save it with safe_serialization=True."
            if (source / _PICKLED).is_file()
            else ""
        )
        raise CheckpointError(f"{source} holds no {WEIGHTS}.{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not an intact safetensors file: {error}.") from error


def _from_peft(config: dict[str, Any], model: ModelConfig, tensors: dict[str, Tensor]) -> LoRAConfig:
    """Settings of an adapter. What it adapts is read from its tensors: ``target_modules`` may be a pattern."""
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        raise CheckpointError(f"{CONFIG}: r is {rank!r}: a whole number of at least 1 is needed.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{CONFIG}: lora_alpha is {alpha!r}: a number above 0 is needed.")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(f"{CONFIG}: lora_dropout is {dropout!r}: a probability below 1 is needed.")
    targets = [
        target.module
        for target in LORA_TARGETS[model.family]
        if any(f".{target.module}.lora_" in name for name in tensors)
    ]
    if not targets:
        raise CheckpointError(
            f"The adapter has no factors for a {model.family} model, which the base is. Its tensors are such as "
            f"{', '.join(sorted(tensors)[:2]) or 'none'}."
        )
    return LoRAConfig(
        rank=rank, alpha=float(alpha), dropout=float(dropout), targets=targets, rslora=bool(config.get("use_rslora"))
    )


def _check_fit(tensors: dict[str, Tensor], known: list[AdapterTensor], source: Path) -> None:
    """Every factor of the base's layers is there, in its shape, and nothing else."""
    faults = list(_misfits(tensors, known))
    if len(faults) > _SHOWN:
        faults[_SHOWN:] = [f"{len(faults) - _SHOWN} more of its tensors do not fit either."]
    if faults:
        raise CheckpointError([f"The adapter {source} does not fit the base: {faults[0]}", *faults[1:]])


def _misfits(tensors: dict[str, Tensor], known: list[AdapterTensor]) -> Iterator[str]:
    for one in known:
        shape = one.layout.global_shape
        if one.name not in tensors:
            yield f"it has no {one.name}, which the base would have as {list(shape)}."
        elif tuple(tensors[one.name].shape) != shape:
            yield f"{one.name} has the shape {list(tensors[one.name].shape)}, the base's layer makes it {list(shape)}."
        elif not tensors[one.name].is_floating_point():
            yield f"{one.name} is stored as {tensors[one.name].dtype}: floating-point numbers are needed."
        elif not tensors[one.name].isfinite().all():
            yield f"{one.name} holds values that are not finite (NaN or infinity)."
    names = {one.name for one in known}
    for name in sorted(tensors.keys() - names):
        yield f"it also has {name} {list(tensors[name].shape)}, for which the base has no place."
