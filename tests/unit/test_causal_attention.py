"""Attention of training in C++: against float64, for every size, grouping, cut into documents and instruction set."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_med.kernels import backend, functional
from megatron_med.kernels.functional import PackedDocuments
from megatron_med.tracing.recorder import Recorder
from tests.unit.instruction_sets import is_there, run_with

if not backend._is_installed("_megatron_med_kernels"):
    pytest.skip("csrc/kernels is not built", allow_module_level=True)
causal_attention = importlib.import_module("megatron_med.kernels.causal_attention")
native = importlib.import_module("megatron_med.kernels.native")

Size = tuple[int, int, int, int, int, tuple[int, ...] | None]
SIZES: list[Size] = [  # seq, batch, groups, heads of a group, head_dim, documents: every remainder of blocks and tiles
    (1, 1, 1, 1, 1, None),
    (7, 2, 1, 1, 8, None),
    (96, 1, 2, 1, 16, (96,)),
    (97, 2, 2, 2, 64, (1, 96, 50, 47)),
    (193, 1, 1, 4, 80, None),
    (384, 1, 1, 2, 64, (100, 284)),
    (577, 1, 2, 2, 128, None),
    (200, 2, 3, 1, 13, (200, 0, 7, 190, 3)),
]


def _operands(size: Size, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and a gradient of the output."""
    seq, batch, groups, queries, head_dim, _ = size
    generator = torch.Generator().manual_seed(0)
    shapes = [(seq, batch, heads, head_dim) for heads in (groups * queries, groups, groups)]
    parts = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    return [part.to(dtype) for part in (*parts, torch.randn(shapes[0], generator=generator).flatten(2))]


def _documents(size: Size) -> PackedDocuments | None:
    return None if size[5] is None else PackedDocuments.of(size[5], torch.device("cpu"))


def _run(attention: Callable[..., Tensor], operands: list[Tensor], documents: PackedDocuments | None) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    *parts, grad = (tensor.detach().requires_grad_() for tensor in operands)
    out = attention(*parts, causal=True, documents=documents)
    return [out.detach(), *torch.autograd.grad(out, parts, grad.detach())]


def _formula(query: Tensor, key: Tensor, value: Tensor, causal: bool, documents: PackedDocuments | None) -> Tensor:
    seq, batch, heads, head_dim = query.shape
    lengths = (seq,) * batch if documents is None else documents.lengths
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(batch, 1, seq)
    seen = (of[..., None] == of[..., None, :]).tril()
    q, k, v = (x.permute(1, 2, 0, 3).repeat_interleave(heads // x.shape[2], 1) for x in (query, key, value))
    scores = (q @ k.mT / head_dim**0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def _check(size: Size) -> None:
    operands, documents = _operands(size), _documents(size)
    ours = _run(causal_attention.attention, operands, documents)
    exact = _run(_formula, [tensor.double() for tensor in operands], documents)
    for mine, true in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == true.shape
        assert (mine.double() - true).abs().max() <= 4e-6 * true.abs().max().clamp(min=1)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_attention_with_its_gradients(size: Size) -> None:
    _check(size)


def test_operands_that_are_not_contiguous_and_empty_ones() -> None:
    operands = _operands((40, 3, 2, 2, 8, None))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands]
    assert not turned[0].is_contiguous()
    plain = _run(causal_attention.attention, operands, None)
    assert all(map(torch.equal, plain, _run(causal_attention.attention, turned, None)))
    expanded = [*operands[:3], torch.ones(()).expand(operands[3].shape)]
    assert all(torch.isfinite(x).all() for x in _run(causal_attention.attention, expanded, None))
    nothing = _run(causal_attention.attention, [x[:, :0] for x in operands], None)
    assert [x.shape[:2] for x in nothing] == [(40, 0)] * 4


def test_a_sample_is_the_same_among_others_and_for_any_number_of_threads() -> None:
    size = (300, 3, 2, 2, 32, (300, 120, 180, 1, 299))
    operands, threads = _operands(size), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(_run(causal_attention.attention, operands, _documents(size)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
    alone = _run(causal_attention.attention, [x[:, :1] for x in operands], None)
    assert all(torch.equal(one, many[:, :1]) for one, many in zip(alone, results[0], strict=True))


def test_extreme_scores_and_what_is_not_a_number() -> None:
    """One key far above the others takes all, in whatever block it lies; a bad number shows where it is seen."""
    query, key, value, _ = _operands((500, 1, 1, 1, 16, None))
    query[:], key[:, :, :, :] = 30.0, 0.0
    key[250] = 300.0
    out = causal_attention.attention(query, key, value)
    assert torch.equal(out[250:], value[250].flatten(1).expand(250, 1, 16))
    torch.testing.assert_close(out[249, 0], value[:250].mean(0).flatten(), rtol=1e-4, atol=1e-5)
    for bad in (torch.nan, torch.inf):
        key[250] = bad
        out = causal_attention.attention(query, key, value)
        assert out[:250].isfinite().all()
        assert not out[250:].isfinite().any()


def test_it_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on a CPU, of tokens that all see those before them, without dropout; all else is plain torch's."""
    monkeypatch.setattr(backend, "_asked", "auto")
    called: list[int] = []
    real = causal_attention.attention
    monkeypatch.setattr(causal_attention, "attention", lambda *a, **o: called.append(1) or real(*a, **o))
    query, key, value, _ = _operands((20, 2, 2, 2, 8, None))
    ours = functional.attention(query, key, value, causal=True)
    assert len(called) == 1
    whole = functional.attention(query, key, value, causal=False)
    functional.attention(query[:1], key, value, causal=True)
    functional.attention(query, key, value, causal=True, dropout=0.5, seed=1)
    functional.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), causal=True)
    with backend.serving_on("cuda"):
        functional.attention(query, key, value, causal=True)
    monkeypatch.setattr(backend, "_asked", "reference")
    torch.testing.assert_close(functional.attention(query, key, value, causal=True), ours)
    assert len(called) == 1
    assert not torch.allclose(whole, ours)


def test_a_trace_holds_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of half of all pairs; and no scores in memory."""
    monkeypatch.setattr(backend, "_asked", "auto")
    with FakeTensorMode(), Recorder() as recorder:
        query, key, value = (torch.randn(512, 2, heads, 64).requires_grad_() for heads in (8, 2, 2))
        before = recorder.live
        out = functional.attention(query, key, value, causal=True)
        out.backward(torch.ones_like(out))
    forward, backward = (kernel for kernel in recorder.trace.kernels if kernel.kind.startswith("attention"))
    assert forward.flops == 4 * 2 * 8 * 512 * 512 * 64 / 2
    assert backward.flops == 2.5 * forward.flops
    assert forward.shape == backward.shape == (16, 512, 512, 64)
    tensors = 4 * (query.numel() * 4 + key.numel() * 2)  # output, its gradient, gradients of the three
    assert recorder.peak - before < 1.5 * tensors


CALLS: list[tuple[Callable[..., Any], str]] = [
    (lambda q, k, v: (q[:, :, :3], k, v, None), "no multiple"),
    (lambda q, k, v: (q, k[:5], v[:5], None), "not the same tokens"),
    (lambda q, k, v: (q, k, v[..., :4].contiguous(), None), "not the same tokens and head_dim"),
    (lambda q, k, v: (q.double(), k.double(), v.double(), None), "fp32"),
    (lambda q, k, v: (q.mT, k.mT, v.mT, None), "lies side by side"),
    (lambda q, k, v: (q, k, v, torch.tensor([0, 6, 11], dtype=torch.int32)), "add up"),
    (lambda q, k, v: (q, k, v, torch.tensor([0, 7, 12], dtype=torch.int32)), "in which it begins"),
    (lambda q, k, v: (q, k, v, torch.tensor([0, 6, 4, 12], dtype=torch.int32)), "in which it begins"),
    (lambda q, k, v: (q, k, v, torch.tensor([0, 6, 12])), "int32"),
]


@pytest.mark.parametrize(("change", "message"), CALLS)
def test_operands_that_do_not_fit_are_refused(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.OPERATIONS.causal_attention_forward(*change(*_operands((6, 2, 2, 2, 8, None))[:3]))


@pytest.mark.parametrize("borders", [None, torch.tensor([0, 6, 12], dtype=torch.int32)])
def test_torch_can_trust_it(borders: Tensor | None) -> None:
    query, key, value, grad = _operands((6, 2, 2, 2, 8, None))
    operations, tests = torch.ops.megatron_med, ("test_schema", "test_faketensor")
    torch.library.opcheck(operations.causal_attention_forward.default, (query, key, value, borders), test_utils=tests)
    out, logsumexp = operations.causal_attention_forward(query, key, value, borders)
    given = (grad.view_as(out), query, key, value, out, logsumexp, borders)
    torch.library.opcheck(operations.causal_attention_backward.default, given, test_utils=tests)
    with pytest.raises(RuntimeError, match="of one shape"):
        operations.causal_attention_backward(grad, *given[1:])
    with pytest.raises(RuntimeError, match="one logsumexp"):
        operations.causal_attention_backward(*given[:5], logsumexp[:1], borders)


_SCRIPT = """
from tests.unit.test_causal_attention import SIZES, _check, native
for size in SIZES:
    _check(size)
print(native.cpu_capability())
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_it(capability: str) -> None:
    if not is_there(capability, native.cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    done = run_with(capability, _SCRIPT)
    assert done.stdout.split() == [capability], done.stderr[-2000:]
