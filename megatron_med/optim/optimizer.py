"""AdamW on the slices that this rank owns, and the global gradient norm."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_med.config.schema import OptimizerConfig
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.data_parallel.base import DataParallel, ParameterShard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, each shaped like the slice."""


class Optimizer:
    """torch's AdamW (Loshchilov and Hutter 2019) over fp32 master slices, in groups of equal hyperparameters.

    ``decoupled_adamw`` decays the weights by ``weight_decay * lr / initial_lr`` a step instead of
    ``weight_decay * lr`` (MosaicML's DecoupledAdamW, with which BioMedLM was trained).

    Args:
        data_parallel: owns slices, masters and reduced gradients.
        context: the grid.
        config: hyperparameters.

    Attributes:
        initial_lr: the peak learning rate that the run began with; a resumed run keeps it.
    """

    def __init__(self, data_parallel: DataParallel, context: ParallelContext, config: OptimizerConfig) -> None:
        self._data_parallel = data_parallel
        self._context = context
        self._config = config
        self.initial_lr = config.lr
        self._masters = {item.layout.name: torch.nn.Parameter(item.master) for item in data_parallel.owned}
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for item in data_parallel.owned:
            groups.setdefault(self._hyperparameters(item), []).append(self._masters[item.layout.name])
        self._adamw = torch.optim.AdamW(
            [{"params": group, "lr_scale": scale, "decay": decay} for (scale, decay), group in groups.items()],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for master in self._masters.values():
            state = self._adamw.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master)

    def _hyperparameters(self, item: ParameterShard) -> tuple[float, float]:
        """Factor of the learning rate, and weight decay: of the first group that matches."""
        decay = self._config.weight_decay if item.layout.weight_decay else 0.0
        for group in self._config.groups:
            if fnmatchcase(item.layout.name, group.match):
                return group.lr_scale, decay if group.weight_decay is None else group.weight_decay
        return 1.0, decay

    @property
    def owned(self) -> list[ParameterShard]:
        return self._data_parallel.owned

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel ranks own different slices."""
        return self._data_parallel.is_sharded

    @property
    def steps(self) -> int:
        """Updates done so far; skipped steps do not count."""
        counts = [self._adamw.state[master]["step"] for master in self._masters.values()]
        return int(torch.stack(counts).max().item()) if counts else 0

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self._masters.values():
            self._adamw.state[master]["step"].fill_(value)

    def moment(self, item: ParameterShard, name: str) -> Tensor:
        """One state tensor of a slice: ``exp_avg`` or ``exp_avg_sq``."""
        return self._adamw.state[self._masters[item.layout.name]][name]

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all parameters of the model, each counted once; a scalar, equal on every rank."""
        counted = [item.gradient for item in self.owned if self._data_parallel.counts_in_norm(item)]
        counted = [gradient for gradient in counted if gradient.numel()]
        square = torch.zeros((), dtype=torch.float64, device=self._context.device)
        if counted:
            square += torch.stack(torch._foreach_norm(counted)).double().square().sum()
        return all_reduce(square, self._context.world, dist.ReduceOp.SUM).sqrt().float()

    @torch.no_grad()
    def step(self, norm: Tensor, lr: float, loss_scale: float = 1.0) -> None:
        """Clips to the largest norm, updates the masters and begins to copy them into the model.

        Args:
            norm: of the gradients without the loss scale.
            lr: learning rate.
            loss_scale: that the gradients carry.
        """
        for item in self.owned:
            self._masters[item.layout.name].grad = item.gradient
        factor = torch.ones_like(norm) / loss_scale
        if self._config.clip_grad:
            factor = factor * torch.clamp(self._config.clip_grad / (norm + 1e-6), max=1.0)
        if self._config.clip_grad or loss_scale != 1:
            torch._foreach_mul_([item.gradient for item in self.owned], factor)
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = group["decay"]
            if self._config.name == "decoupled_adamw":  # AdamW multiplies by 1 - lr * weight_decay
                group["weight_decay"] /= self.initial_lr * group["lr_scale"]
        self._adamw.step()
        self._adamw.zero_grad()
        self._data_parallel.start_param_sync()
