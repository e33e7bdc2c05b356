"""Groups of parameters with hyperparameters of their own, told by patterns of canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from megatron_med.config.schema import ParameterGroupConfig
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


def group_faults(names: set[str], groups: Sequence[ParameterGroupConfig]) -> list[str]:
    """Groups that no parameter of the model belongs to, and groups that leave nothing to train.

    Args:
        names: of all parameters of the model, frozen ones included.
        groups: of the optimizer.
    """
    faults = [
        f"optimizer.groups: {group.match} matches no parameter. Names are such as {', '.join(sorted(names)[:3])}."
        for group in groups
        if not any(fnmatchcase(name, group.match) for name in names)
    ]
    own = [group_of(name, groups) for name in names]
    if all(group is not None and group.frozen for group in own):
        faults.append("optimizer.groups freezes every parameter: nothing is left to train. Leave some out.")
    return faults
