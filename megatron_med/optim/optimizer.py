"""AdamW on the slices that this rank owns, and the global gradient norm."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_med.config.schema import OptimizerConfig
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.data_parallel import DataParallel, OwnedParameter

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, each shaped like the slice."""


class Optimizer:
    """torch's AdamW (Loshchilov and Hutter 2019) over fp32 master slices in two groups: with weight decay, and
    without (norms and biases).

    Args:
        data_parallel: owns slices, masters and reduced gradients.
        context: the grid.
        config: hyperparameters.
    """

    def __init__(self, data_parallel: DataParallel, context: ParallelContext, config: OptimizerConfig) -> None:
        self._data_parallel = data_parallel
        self._context = context
        self._clip = config.clip_grad
        self._masters = {item.layout.name: torch.nn.Parameter(item.master) for item in data_parallel.owned}
        for item in data_parallel.owned:
            self._masters[item.layout.name].grad = item.gradient
        groups = [
            {"params": self._group(decay=True), "weight_decay": config.weight_decay},
            {"params": self._group(decay=False), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for master in self._masters.values():
            state = self._adamw.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master)

    def _group(self, decay: bool) -> list[torch.nn.Parameter]:
        owned = self._data_parallel.owned
        return [self._masters[item.layout.name] for item in owned if item.layout.weight_decay == decay]

    @property
    def owned(self) -> list[OwnedParameter]:
        return self._data_parallel.owned

    @property
    def steps(self) -> int:
        """Updates done so far; skipped steps do not count."""
        return int(max((self._adamw.state[master]["step"].item() for master in self._masters.values()), default=0))

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self._masters.values():
            self._adamw.state[master]["step"].fill_(value)

    def moment(self, item: OwnedParameter, name: str) -> Tensor:
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
    def step(self, norm: Tensor, lr: float) -> None:
        """Clips to the largest norm, updates the masters and copies them into the model."""
        if self._clip:
            factor = torch.clamp(self._clip / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([item.gradient for item in self.owned], factor)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._data_parallel.publish()
