"""Groups of parameters with hyperparameters of their own, told by patterns of canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from megatron_med.config.schema import LoRAConfig, ModelConfig, ParameterGroupConfig
from megatron_med.errors import ConfigError
from megatron_med.model.build import build_stage
from megatron_med.model.lora import add_adapters
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import freeze, parameters_with_layout


def group_of(name: str, groups: Sequence[ParameterGroupConfig]) -> ParameterGroupConfig | None:
    """The first group that a parameter belongs to."""
    return next((group for group in groups if fnmatchcase(name, group.match)), None)


def freeze_groups(modules: Iterable[nn.Module], groups: Sequence[ParameterGroupConfig]) -> None:
    """Freezes every parameter whose group is frozen; before gradients get their buckets."""
    for module in modules:
        for layout, parameter in parameters_with_layout(module):
            group = group_of(layout.name, groups)
            if group is not None and group.frozen:
                freeze(parameter)


def check_groups(model: ModelConfig, groups: Sequence[ParameterGroupConfig], lora: LoRAConfig) -> None:
    """Refuses groups that cannot be meant, before anything of the model is made; see ``group_faults``. With adapters
    they are groups of these.

    Raises:
        ConfigError: with every fault.
    """
    if not groups:
        return
    stage = build_stage(model, single_process_context(torch.device("meta")), torch.float32)
    add_adapters([stage], model, lora, range(1))
    faults = group_faults({layout.name for layout, _ in parameters_with_layout(stage) if layout.trained}, groups)
    if faults and lora.rank:
        faults.append("With lora.rank only adapters are trained, and groups are groups of them.")
    if faults:
        raise ConfigError(faults)


def group_faults(names: set[str], groups: Sequence[ParameterGroupConfig]) -> list[str]:
    """Groups that no parameter of the model belongs to, since none matches or an earlier group has them all; and groups
    that leave nothing to train.

    Args:
        names: of all parameters of the model, frozen ones included.
        groups: of the optimizer.
    """
    own = [group_of(name, groups) for name in names]
    faults = []
    for group in groups:
        if not any(fnmatchcase(name, group.match) for name in names):
            such = ", ".join(sorted(names)[:3])
            faults.append(f"optimizer.groups: {group.match} matches no parameter. Names are such as {such}.")
        elif not any(taken is group for taken in own):
            faults.append(
                f"optimizer.groups: every parameter of {group.match} belongs to an earlier group, and the first "
                "one that matches counts. Move it up, or leave it out."
            )
    if all(group is not None and group.frozen for group in own):
        faults.append("optimizer.groups freezes every parameter: nothing is left to train. Leave some out.")
    return faults
