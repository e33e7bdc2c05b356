"""The head's product and the loss in one: against the uncut formula in float64, and what it holds in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_med.config import ParallelConfig
from megatron_med.parallel.context import create_context, single_process_context
from megatron_med.parallel.parameters import MainGrad, layout_of
from megatron_med.parallel.tensor_parallel import head_loss
from megatron_med.parallel.tensor_parallel.layers import VocabParallelHead
from megatron_med.tracing.recorder import Recorder
from tests.ranks import run_ranks

SEQ, BATCH, HIDDEN, VOCAB, TRUE = 10, 3, 6, 64, 50
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """Ranks, and what of the head is trained."""

    tensor: int = 1
    sequence_parallel: bool = False
    main_gradients: bool = True
    weight_trained: bool = True
    input_trained: bool = True
    pieces: int = 8
    dtype: torch.dtype = torch.float32


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def _targets() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and factors of the losses, some of them 0."""
    numbers = torch.arange(SEQ * BATCH).view(SEQ, BATCH)
    return numbers * 7 % TRUE, (numbers % 4 != 1).float() * (1 + numbers % 3)


def _on_ranks(case: Case) -> dict[str, np.ndarray]:
    """Loss and gradients of this rank."""
    head_loss.CPU_BLOCK = 1 if case.pieces > 1 else 1 << 30
    head_loss.MOST_PIECES = case.pieces
    grid = ParallelConfig(tensor=case.tensor, sequence_parallel=case.sequence_parallel)
    context = create_context(grid, torch.device("cpu"))
    head = VocabParallelHead((VOCAB, HIDDEN), context, case.dtype, bias=False, init_std=1.0)
    assert head.weight is not None
    with torch.no_grad():
        head.weight.copy_(layout_of(head.weight).cut(_random(VOCAB, HIDDEN, seed=0), context.tp))
    head.weight.requires_grad_(case.weight_trained)
    total, ready = torch.ones(head.weight.shape), []
    if case.main_gradients:  # on top of what an earlier micro-batch has left
        head.weight.main_grad = MainGrad(total, lambda: ready.append(1))  # type: ignore[attr-defined]
    x = _random(SEQ, BATCH, HIDDEN, seed=10).to(case.dtype)
    if case.sequence_parallel:
        x = x.chunk(case.tensor)[context.tp.rank].clone()
    x.requires_grad_(case.input_trained)
    loss = head.loss(x, *_targets(), TRUE, torch.tensor(SCALE))
    assert loss.dtype == torch.float32
    assert not ready, "its reduction may begin in the backward pass"
    loss.backward(torch.tensor(SCALE))
    with torch.no_grad():
        alone = head.loss(x, *_targets(), TRUE, None)
    assert torch.equal(alone, loss.detach()), "a loss without gradients is the same"
    result = {"loss": loss.detach().numpy()}
    if case.main_gradients and case.weight_trained:
        assert len(ready) == 1
        assert head.weight.grad is None
        result["weight"] = total.numpy() - 1
    elif case.weight_trained:
        assert head.weight.grad is not None
        assert head.weight.grad.dtype == case.dtype
        result["weight"] = head.weight.grad.float().numpy()
    else:
        assert not ready
        assert head.weight.grad is None
        assert (total == 1).all()
    if case.input_trained:
        assert x.grad is not None
        result["x"] = x.grad.float().numpy()
    return result


def _exact() -> dict[str, np.ndarray]:
    weight, x = (_random(*shape, seed=seed).double().requires_grad_() for shape, seed in
                 (((VOCAB, HIDDEN), 0), ((SEQ, BATCH, HIDDEN), 10)))  # fmt: skip
    targets, mask = _targets()
    logits = F.linear(x, weight)[..., :TRUE].flatten(0, 1)
    loss = (F.cross_entropy(logits, targets.flatten(), reduction="none") * mask.flatten()).sum()
    (loss * SCALE).backward()
    assert weight.grad is not None
    assert x.grad is not None
    return {"loss": loss.detach().numpy(), "weight": weight.grad.numpy(), "x": x.grad.numpy()}


def _check(case: Case, tolerance: float) -> None:
    exact = _exact()
    ranks = run_ranks(case.tensor, _on_ranks, case)
    for rank in ranks:
        np.testing.assert_allclose(rank["loss"], exact["loss"], rtol=tolerance)
    if case.weight_trained:
        joined = np.concatenate([rank["weight"] for rank in ranks])
        np.testing.assert_allclose(joined, exact["weight"], atol=tolerance * np.abs(exact["weight"]).max())
        assert not joined[TRUE:].any(), "padding has no gradient"
    if case.input_trained:
        pieces = [rank["x"] for rank in ranks]
        for x in [np.concatenate(pieces)] if case.sequence_parallel else pieces:
            np.testing.assert_allclose(x, exact["x"], atol=tolerance * np.abs(exact["x"]).max())


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(pieces=1),
        Case(pieces=7),
        Case(tensor=2),
        Case(tensor=2, sequence_parallel=True, main_gradients=False),
        Case(tensor=4, input_trained=False),  # the fourth rank holds padding only
        Case(main_gradients=False),
        Case(weight_trained=False, tensor=2, main_gradients=False),
        Case(input_trained=False, main_gradients=False),
    ],
    ids=repr,
)
def test_loss_and_gradients_are_those_of_whole_logits(case: Case) -> None:
    _check(case, 2e-6)


@pytest.mark.parametrize("main_gradients", [True, False])
def test_half_precision_adds_its_pieces_in_fp32(main_gradients: bool) -> None:
    _check(Case(dtype=torch.bfloat16, main_gradients=main_gradients), 2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_rises_by_less_than_a_quarter_of_the_logits(dtype: torch.dtype) -> None:
    """Of a vocabulary of 128,256 over two ranks: gradients of the input included, that of the weight is not new."""
    tokens, columns, hidden = 4096, 128_256 // 2, 512
    context = single_process_context()
    with FakeTensorMode(allow_non_fake_inputs=True):
        head = VocabParallelHead((columns, hidden), context, dtype, bias=False, init_std=1.0)
        assert head.weight is not None
        head.weight.main_grad = MainGrad(torch.empty(columns, hidden), lambda: None)  # type: ignore[attr-defined]
        x = torch.empty(tokens, 1, hidden, dtype=dtype, requires_grad=True)
        targets, mask = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        with Recorder() as recorder:
            loss = head.loss(x, targets, mask, columns, torch.ones(()))
            loss.backward(torch.ones(()))
    logits = tokens * columns * dtype.itemsize
    # In half precision on a CPU the weight's gradient is made before it is added in fp32; on a GPU it is not.
    product = 0 if dtype == torch.float32 else columns * hidden * dtype.itemsize
    assert logits / 8 < recorder.peak < logits / 4 + product
