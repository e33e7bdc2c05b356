"""The product of a parallel linear layer: collective, local product, collective, with its backward pass.

Three things meet here, so that each is written once: communication hidden behind a product, weight gradients that go
straight into the fp32 main gradient, and weight gradients that a zero-bubble schedule puts off.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_med.kernels.linear import accumulate_weight_gradient, input_gradient, linear, weight_gradient
from megatron_med.parallel.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron_med.parallel.context import ParallelContext
from megatron_med.parallel.parameters import GradientSink, gradient_sink

Entry = Literal["none", "copy", "gather"]
"""What happens to the input: nothing (row-parallel), Megatron's f (every rank holds it whole), or an all-gather of
the sequence. Backward: nothing, all-reduce, reduce-scatter."""


def parallel_product(x: Tensor, weight: Tensor, bias: Tensor | None, context: ParallelContext, entry: Entry) -> Tensor:
    """``[seq(/tp), batch, in] -> [seq, batch, out]`` with this rank's piece of the weight; see ``Entry``."""
    sink = gradient_sink(weight)
    if sink is not None:  # its gradient goes past autograd, which would count an arrival of its own
        assert x.requires_grad or not torch.is_grad_enabled(), "the input's graph carries the weight's gradient"
        weight = weight.detach()
    return _ParallelProduct.apply(x, weight, bias, sink, context, entry if context.tp.size > 1 else "none")


class _ParallelProduct(Function):
    """Forward: the entry's collective, then x @ weight.T + bias.
    Backward: the sequence is gathered again beside the input gradient; the input gradient is summed over the ranks
    beside the weight gradient (Korthikanti et al. 2022, section 4.2.2)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sink: GradientSink | None,
        context: ParallelContext,
        entry: Entry,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # not among the saved tensors: nothing has to be recomputed for it
        ctx.sink = sink
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.context, ctx.entry = context, entry
        whole = start_all_gather(x, context.tp).wait() if entry == "gather" else x
        return linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (gradient,) = gradients
        weight: Tensor = ctx.weight
        sink: GradientSink | None = ctx.sink
        wants_x = ctx.needs_input_grad[0]
        wants_weight = sink is not None or ctx.needs_input_grad[1]
        put_off = wants_weight and ctx.context.weight_products.are_put_off
        gathering = None
        if wants_weight and not put_off:
            gathering = _gather(x, ctx.context, ctx.entry)
        reducing = None
        if wants_x:
            input_grad = input_gradient(gradient, weight)
            if gathering is not None:
                gathering.wait()
            reducing = _reduce(input_grad, ctx.context, ctx.entry)
        weight_grad = None
        if put_off:
            assert sink is not None, "only a gradient that goes past autograd can be put off"
            ctx.context.weight_products.submit(partial(_put_off_product, sink, gradient, x, ctx.context, ctx.entry))
        elif gathering is not None and sink is not None:
            _into_sink(sink, gradient, gathering.wait())
        elif gathering is not None:
            weight_grad = weight_gradient(gradient, gathering.wait(), weight)
        bias_grad = None
        if ctx.bias_shape is not None:
            bias_grad = gradient.flatten(0, -2).sum(0).view(ctx.bias_shape)
        return (None if reducing is None else reducing.wait()), weight_grad, bias_grad, None, None, None


def _gather(x: Tensor, context: ParallelContext, entry: Entry) -> Pending:
    if entry != "gather":
        return Pending(x)
    return _started(start_all_gather(x, context.tp), context)


def _reduce(gradient: Tensor, context: ParallelContext, entry: Entry) -> Pending:
    if entry == "none":
        return Pending(gradient)
    start = start_reduce_scatter if entry == "gather" else start_all_reduce
    return _started(start(gradient.contiguous(), context.tp), context)


def _started(pending: Pending, context: ParallelContext) -> Pending:
    """Without overlap the collective ends here."""
    if not context.overlap.tensor:
        pending.wait()
    return pending


def _into_sink(sink: GradientSink, gradient: Tensor, x: Tensor) -> None:
    accumulate_weight_gradient(gradient, x, sink.main_grad)
    sink.arrived()


def _put_off_product(sink: GradientSink, gradient: Tensor, x: Tensor, context: ParallelContext, entry: Entry) -> None:
    """The sequence is kept cut until now, so that a product that waits holds no more than its share."""
    _into_sink(sink, gradient, _gather(x, context, entry).wait())
