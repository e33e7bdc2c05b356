"""The autograd function of every tensor-parallel linear: collective, local product, collective.

It knows groups and order, and nothing of a weight's format: the products are a ``LocalLinear``'s. Three things meet
here, so that each is written once: communication during a product, weight gradients that go straight into the
fp32 main gradient, and weight gradients that a zero-bubble schedule defers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.autograd import Function

from megatron_med.kernels.linear import LocalLinear
from megatron_med.parallel.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import MainGrad, main_grad_of
from megatron_med.parallel.pipeline_parallel.weight_grad_store import WeightGradStore

InputMode = Literal["local", "copy", "gather"]
"""What happens to the input: nothing (row-parallel), Megatron's f (every rank holds it whole), or an all-gather of
the sequence."""


@dataclass(frozen=True)
class LinearPlan:
    """How one linear layer runs.

    Attributes:
        local: its products.
        mode: of its input.
        context: the grid.
        weight_grads: takes the weight gradients that are deferred.
    """

    local: LocalLinear
    mode: InputMode
    context: ParallelContext
    weight_grads: WeightGradStore


def parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan) -> Tensor:
    """``[seq(/tp), batch, in] -> [seq, batch, out]`` with this rank's shard of the weight.

    ========  ===================  ============================  ===============================
    mode      forward              gradient of the input         gradient of the weight
    ========  ===================  ============================  ===============================
    local     Y = X W^T            dX = dY W                     dW = dY^T X
    copy      Y = X W^T            dX = all_reduce(dY W)         dW = dY^T X
    gather    Y = gather(X) W^T    dX = reduce_scatter(dY W)     dW = dY^T gather(X)
    ========  ===================  ============================  ===============================

    In the backward pass ``gather(X)`` runs during ``dY W``, and the reduction of ``dX`` during ``dY^T X``
    (Korthikanti et al. 2022, section 4.2.2).
    """
    main_grad = main_grad_of(weight) if weight.requires_grad else None
    needs_input_grad = x.requires_grad
    if main_grad is not None:
        weight = weight.detach()  # its gradient goes past autograd, which would count a contribution of its own
        if not needs_input_grad:  # frozen layers below: the graph still has to come by here
            x = x.detach().requires_grad_()
    return _ParallelLinear.apply(x, weight, bias, main_grad, needs_input_grad, plan)


class _ParallelLinear(Function):
    """Forward: Y = gather(X) W^T + b. Backward: dX = reduce_scatter(dY W) during dW = dY^T gather(X)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        main_grad: MainGrad | None,
        needs_input_grad: bool,
        plan: LinearPlan,
    ) -> Tensor:
        x_gathered = x
        if plan.mode == "gather":
            x_gathered = start_all_gather(x, plan.context.tp).wait()
        out, saved = plan.local.forward(x_gathered, weight, bias)
        ctx.needs_weight_grad = main_grad is not None or ctx.needs_input_grad[1]
        # The input is kept cut, and only where the weight is trained.
        ctx.save_for_backward(*([x] if ctx.needs_weight_grad else []), *saved)
        ctx.weight = weight  # not among the saved tensors: nothing has to be recomputed for it
        ctx.main_grad, ctx.plan, ctx.x_needs_grad = main_grad, plan, needs_input_grad
        ctx.bias_shape = None if bias is None else bias.shape
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: LinearPlan = ctx.plan
        main_grad: MainGrad | None = ctx.main_grad
        (grad,) = gradients
        saved = ctx.saved_tensors
        deferred = ctx.needs_weight_grad and plan.weight_grads.is_deferring
        gathering = None
        if ctx.needs_weight_grad:
            x, *saved = saved
            if not deferred:
                gathering = _start_gather(x, plan)
        reducing = None
        if ctx.x_needs_grad:
            input_grad = plan.local.input_grad(ctx.weight, tuple(saved), grad)
            if gathering is not None:
                gathering.wait()
            reducing = _start_reduction(input_grad, plan)
        weight_grad = None
        if deferred:
            assert main_grad is not None, "only a gradient that goes past autograd can be deferred"
            plan.weight_grads.put(partial(_accumulate_later, main_grad, x, tuple(saved), grad, plan))
        elif gathering is not None and main_grad is not None:
            _accumulate(main_grad, gathering.wait(), tuple(saved), grad, plan)
        elif gathering is not None:
            product = plan.local.weight_grad(gathering.wait(), tuple(saved), grad)
            assert product is not None, "without a main gradient the product is returned"
            weight_grad = product.view(ctx.weight.shape)
        bias_grad = None
        if ctx.needs_input_grad[2]:
            bias_grad = grad.flatten(0, -2).sum(0).view(ctx.bias_shape)
        return (None if reducing is None else reducing.wait()), weight_grad, bias_grad, None, None, None


def _start_gather(x: Tensor, plan: LinearPlan) -> Pending:
    if plan.mode != "gather":
        return Pending(x)
    return _started(start_all_gather(x, plan.context.tp), plan)


def _start_reduction(grad: Tensor, plan: LinearPlan) -> Pending:
    if plan.mode == "local":
        return Pending(grad)
    start = start_reduce_scatter if plan.mode == "gather" else start_all_reduce
    return _started(start(grad.contiguous(), plan.context.tp), plan)


def _started(pending: Pending, plan: LinearPlan) -> Pending:
    """Without overlap the collective ends here."""
    if not plan.context.overlap.tensor:
        pending.wait()
    return pending


def _accumulate(
    main_grad: MainGrad, x_gathered: Tensor, saved: tuple[Tensor, ...], grad: Tensor, plan: LinearPlan
) -> None:
    plan.local.weight_grad(x_gathered, saved, grad, out=main_grad.total)
    main_grad.register_grad_ready()


def _accumulate_later(
    main_grad: MainGrad, x: Tensor, saved: tuple[Tensor, ...], grad: Tensor, plan: LinearPlan
) -> None:
    """The sequence is kept cut until now, so that a product that waits holds no more than its share."""
    _accumulate(main_grad, _start_gather(x, plan).wait(), saved, grad, plan)
