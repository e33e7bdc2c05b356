"""AdamW on the shards that this rank owns, and the global gradient norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_med.config.schema import OptimizerConfig
from megatron_med.optim.adamw8bit import AdamW8bit, in_8_bit
from megatron_med.optim.groups import group_of
from megatron_med.parallel.collectives import all_reduce
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.data_parallel.base import DataParallel, FrozenShard, ParameterShard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, each shaped like the shard."""


class Optimizer:
    """torch's AdamW (Loshchilov and Hutter 2019) over fp32 master shards, in groups of equal hyperparameters.

    ``decoupled_adamw`` decays the weights by ``weight_decay * lr / initial_lr`` a step instead of
    ``weight_decay * lr`` (MosaicML's DecoupledAdamW, with which BioMedLM was trained). ``adamw8bit`` holds moments in
    8 bit, except of embeddings and small parameters.

    Args:
        data_parallel: owns shards, masters and reduced gradients.
        context: the grid.
        config: hyperparameters.

    Attributes:
        initial_lr: the peak learning rate that the run began with; a resumed run keeps it.
        steps: updates done so far; skipped steps do not count.
        moments_since: parameter -> updates done when its moments began, where that was not at the start: it was
            frozen before. Of all parameters of the model, equal on every rank.
    """

    def __init__(self, data_parallel: DataParallel, context: ParallelContext, config: OptimizerConfig) -> None:
        self._data_parallel = data_parallel
        self._context = context
        self._config = config
        self.initial_lr = config.lr
        self.steps = 0
        self.moments_since: dict[str, int] = {}
        self._masters = {item.layout.name: torch.nn.Parameter(item.master) for item in data_parallel.owned}
        common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        # A stage that is frozen as a whole has no parameters, which torch's optimizers refuse.
        self._updates: list[torch.optim.Optimizer] = []
        if groups := self._groups(in_8_bit=False):
            self._updates.append(adamw := torch.optim.AdamW(groups, fused=True, **common))
            for master in (master for group in groups for master in group["params"]):
                adamw.state[master] = {"step": torch.zeros((), dtype=torch.float32, device=master.device)}
                adamw.state[master] |= {moment: torch.zeros_like(master) for moment in MOMENTS}
        if groups := self._groups(in_8_bit=True):
            self._updates.append(AdamW8bit(groups, **common))

    def _groups(self, in_8_bit: bool) -> list[dict[str, Any]]:
        """Parameters of equal hyperparameters together."""
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for item in self.owned:
            if self.is_8_bit(item) == in_8_bit:
                groups.setdefault(self._hyperparameters(item), []).append(self._masters[item.layout.name])
        return [{"params": group, "lr_scale": scale, "decay": decay} for (scale, decay), group in groups.items()]

    def is_8_bit(self, item: ParameterShard) -> bool:
        """Whether the moments of a parameter are held in 8 bit."""
        return in_8_bit(item.layout, self._config)

    def _hyperparameters(self, item: ParameterShard) -> tuple[float, float]:
        """Factor of the learning rate, and weight decay."""
        decay = self._config.weight_decay if item.layout.weight_decay else 0.0
        group = group_of(item.layout.name, self._config.groups)
        if group is None:
            return item.layout.lr_scale, decay
        return item.layout.lr_scale * group.lr_scale, decay if group.weight_decay is None else group.weight_decay

    def _state(self, master: torch.nn.Parameter) -> dict[str, Tensor]:
        return next(update.state[master] for update in self._updates if master in update.state)

    @property
    def owned(self) -> list[ParameterShard]:
        return self._data_parallel.owned

    @property
    def frozen(self) -> list[FrozenShard]:
        """Parameters that are not trained."""
        return self._data_parallel.frozen

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel ranks own different shards."""
        return self._data_parallel.is_sharded

    def resume(self, steps: int, moments_since: Mapping[str, int]) -> None:
        """Goes on after ``steps`` updates; see ``moments_since``. The bias correction of each parameter counts the
        updates since its own moments began."""
        self.steps = steps
        self.moments_since = dict(moments_since)
        for name, master in self._masters.items():
            self._state(master)["step"].fill_(steps - self.moments_since.get(name, 0))

    def states(self, item: ParameterShard) -> dict[str, Tensor]:
        """The moments of a shard, ``exp_avg`` and ``exp_avg_sq``, shaped like it; in 8 bit with the maxima of their
        blocks."""
        state = self._state(self._masters[item.layout.name])
        return {name: tensor for name, tensor in state.items() if name != "step"}

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
        self.steps += 1
        self._update(norm, lr, loss_scale)
        self._data_parallel.start_param_sync()

    def _update(self, norm: Tensor, lr: float, loss_scale: float) -> None:
        for item in self.owned:
            self._masters[item.layout.name].grad = item.gradient
        factor = torch.ones_like(norm) / loss_scale
        if self._config.clip_grad:
            factor = factor * torch.clamp(self._config.clip_grad / (norm + 1e-6), max=1.0)
        if self.owned and (self._config.clip_grad or loss_scale != 1):
            torch._foreach_mul_([item.gradient for item in self.owned], factor)
        for update in self._updates:
            for group in update.param_groups:
                group["lr"] = lr * group["lr_scale"]
                group["weight_decay"] = group["decay"]
                if self._config.name == "decoupled_adamw":  # AdamW multiplies by 1 - lr * weight_decay
                    group["weight_decay"] /= self.initial_lr * group["lr_scale"]
            update.step()
            update.zero_grad()
