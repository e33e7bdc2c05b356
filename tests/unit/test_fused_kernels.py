"""The C++ kernels of training: against float64, for every size, layout, instruction set and number of threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_med.kernels import backend, cross_entropy, functional
from megatron_med.tracing.recorder import Recorder
from tests.unit.instruction_sets import is_there, run_with

if not backend._is_installed("_megatron_med_kernels"):
    pytest.skip("csrc/kernels is not built", allow_module_level=True)
fused = importlib.import_module("megatron_med.kernels.fused")
native = importlib.import_module("megatron_med.kernels.native")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7}
"""Of a result, relative to the largest number in it."""

Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor], tuple[Any, ...]]
"""Kernel, formula in any precision, tensors that have gradients, other arguments."""


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _split(mixed: Tensor, queries: int, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
    heads = mixed[..., :queries, :].flatten(2, 3), mixed[..., queries, :], mixed[..., queries + 1, :]
    if cos is None or sin is None:
        return heads
    turned = (x * cos.to(x.dtype) + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin.to(x.dtype)
              for x in heads[:2])  # fmt: skip
    return (*turned, heads[2])


def _kernel_split(mixed: Tensor, queries: int, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
    rotary = None if cos is None or sin is None else (cos.to(mixed.dtype), sin.to(mixed.dtype))
    return fused.split_qkv(mixed, queries, rotary)


def _angles(seq: int, batch: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = _randn(seq, batch, 1, dim).bfloat16().float()  # the same numbers in every precision
    return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()


CASES: dict[str, Case] = {
    **{f"rms_norm {shape}": (fused.rms_norm, _rms_norm, [_randn(*shape), _randn(shape[-1], seed=1)], (1e-5,))
       for shape in ((7, 3, 37), (130, 2, 64), (1, 1), (5, 1029), (200, 16))},
    **{f"layer_norm {shape}": (fused.layer_norm, _layer_norm,
                               [_randn(*shape) + 3, _randn(shape[-1], seed=1), _randn(shape[-1], seed=2)], (1e-5,))
       for shape in ((7, 3, 37), (130, 2, 64), (5, 1029), (200, 16))},
    **{f"gelu_tanh {shape}": (fused.gelu_tanh, _gelu, [3 * _randn(*shape)], ())
       for shape in ((7, 3, 37), (33, 2, 128), (1, 1), (5, 2066))},
    **{f"swiglu {shape}": (fused.swiglu, _swiglu, [3 * _randn(*shape)], ())
       for shape in ((7, 3, 38), (33, 2, 128), (1, 2), (5, 2066))},
    **{f"split_qkv {shape}": (_kernel_split, _split, [_randn(*shape)],
                              (shape[3] - 2, *_angles(shape[0], shape[1], shape[4])))
       for shape in ((5, 2, 3, 6, 6), (33, 2, 2, 3, 80), (9, 1, 1, 10, 64), (4, 3, 5, 3, 18))},
    "split_qkv without rotary": (_kernel_split, _split, [_randn(6, 2, 3, 4, 7)], (2, None, None)),
}  # fmt: skip


def _run(function: Callable[..., Any], tensors: Sequence[Tensor], rest: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """Results, and the gradients of the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = function(*leaves, *rest)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [_randn(*out.shape, seed=number).bfloat16().to(dtype) for number, out in enumerate(outs)]
    torch.autograd.backward(outs, grads)
    return [*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)]


def _assert_near(ours: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    for mine, true in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == true.shape
        assert not true.numel() or (mine.double() - true).abs().max() <= TOLERANCE[dtype] * true.abs().max().clamp(
            min=1
        )


def _check(case: Case, dtype: torch.dtype) -> None:
    kernel, formula, tensors, rest = case
    given = [tensor.to(dtype) for tensor in tensors]
    _assert_near(
        _run(kernel, given, rest, dtype),
        _run(formula, [tensor.double() for tensor in given], rest, torch.float64),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    _check(CASES[name], dtype)


SMALL = ["rms_norm (7, 3, 37)", "layer_norm (7, 3, 37)", "gelu_tanh (7, 3, 37)", "swiglu (7, 3, 38)"]


@pytest.mark.parametrize("name", [*SMALL, "split_qkv (5, 2, 3, 6, 6)"])
def test_tensors_that_are_not_contiguous_and_empty_ones(name: str) -> None:
    kernel, formula, (x, *others), rest = CASES[name]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    _check((kernel, formula, [turned, *others], rest), torch.float32)
    rest = tuple(part[:0] if isinstance(part, Tensor) else part for part in rest)
    _check((kernel, formula, [x[:0], *others], rest), torch.float32)


@pytest.mark.parametrize("name", [*SMALL, "split_qkv (5, 2, 3, 6, 6)"])
def test_where_no_graph_is_recorded_they_give_the_same(name: str) -> None:
    kernel, _, tensors, rest = CASES[name]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        alone = kernel(*leaves, *rest)
    recorded = kernel(*leaves, *rest)
    alone, recorded = (outs if isinstance(outs, tuple) else (outs,) for outs in (alone, recorded))
    assert all(map(torch.equal, alone, recorded))
    assert [out.requires_grad for out in (*alone, *recorded)] == [False] * len(alone) + [True] * len(recorded)


def test_the_gradients_of_attention_come_in_its_layout() -> None:
    """``[batch, heads, seq, head_dim]`` seen as ``[seq, batch, heads, head_dim]``, and an expanded one."""
    mixed = _randn(6, 2, 3, 4, 8).requires_grad_()
    query, key, value = fused.split_qkv(mixed, 2, None)
    grads = [
        _randn(2, 6, 6, 8).permute(2, 0, 1, 3),
        _randn(2, 3, 6, 8).permute(2, 0, 1, 3),
        _randn(1).expand(6, 2, 3, 8),
    ]
    torch.autograd.backward((query, key, value), grads)
    exact = torch.cat((grads[0].unflatten(2, (3, 2)), grads[1].unsqueeze(3), grads[2].unsqueeze(3)), 3)
    assert torch.equal(mixed.grad, exact)


LOGITS = [(3, 2, 101, 101), (5, 1, 64, 50), (2, 2, 7, 0), (1, 3, 2000, 1999)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOGITS)
def test_cross_entropy_is_that_of_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    seq, batch, columns, true_columns = shape
    logits = (4 * _randn(seq, batch, columns)).to(dtype)
    targets = torch.randint(-1, max(true_columns, 1), (seq, batch), generator=torch.Generator().manual_seed(1))
    targets = targets.clamp(max=true_columns - 1)
    maximum, total, hit = fused.cross_entropy_forward(logits, targets, true_columns)
    z = logits.double()[..., :true_columns]
    share, grad = _randn(seq, batch).sigmoid(), _randn(seq, batch, seed=3)  # of the softmax that lies in these columns
    out = torch.empty_like(logits)
    totals = total / share if true_columns else torch.ones_like(total)
    maxima = maximum if true_columns else torch.zeros_like(total)
    fused.cross_entropy_backward(logits, targets, maxima, totals, grad, true_columns, out)
    assert (out[..., true_columns:] == 0).all()
    if true_columns == 0:
        assert (maximum == -torch.inf).all()
        assert (total == 0).all()
        return
    exact = z.exp().sum(-1).log()
    torch.testing.assert_close((maximum.double() + total.double().log()), exact, rtol=1e-6, atol=1e-6)
    there = targets >= 0
    assert torch.equal(hit[there].double(), z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[there])
    assert (hit[~there] == 0).all()
    in_place = logits.clone()
    fused.cross_entropy_backward(in_place, targets, maxima, totals, grad, true_columns, in_place)
    assert torch.equal(in_place, out)
    one_hot = F.one_hot(targets.clamp(min=0), true_columns) * there.unsqueeze(-1)
    wanted = (z.softmax(-1) * share.unsqueeze(-1) - one_hot) * grad.unsqueeze(-1)
    torch.testing.assert_close(
        out[..., :true_columns].double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10
    )


def test_a_logit_that_is_no_number_makes_a_loss_that_is_none() -> None:
    for bad, place in ((torch.nan, 3), (torch.nan, 50), (torch.inf, 7)):
        logits = _randn(1, 1, 53)
        logits[..., place] = bad
        maximum, total, hit = fused.cross_entropy_forward(logits, torch.zeros(1, 1, dtype=torch.int64), 53)
        assert not (total.log() + maximum - hit).isfinite().any()


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm (130, 2, 64)",
        "layer_norm (130, 2, 64)",
        "gelu_tanh (33, 2, 128)",
        "swiglu (33, 2, 128)",
        "split_qkv (33, 2, 2, 3, 80)",
    ],
)
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    kernel, _, tensors, rest = CASES[name]
    tensors = [tensor.repeat(40, *[1] * (tensor.dim() - 1)) if tensor.dim() > 1 else tensor for tensor in tensors]
    rest = tuple(part.repeat(40, 1, 1, 1) if isinstance(part, Tensor) else part for part in rest)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(_run(kernel, tensors, rest, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_they_serve_on_a_cpu_and_not_where_a_gpu_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_asked", "auto")
    called: list[str] = []
    names = ("rms_norm", "layer_norm", "gelu_tanh", "swiglu", "split_qkv")
    for name in (*names, "cross_entropy_forward", "cross_entropy_backward"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, name=name, real=real: called.append(name) or real(*a))

    def run() -> None:
        functional.rms_norm(_randn(3, 8), _randn(8), 1e-5)
        functional.layer_norm(_randn(3, 8), _randn(8), _randn(8), 1e-5)
        functional.gelu_tanh(_randn(3, 8))
        functional.swiglu(_randn(3, 8))
        functional.split_qkv(_randn(2, 1, 2, 3, 4), 1, None)
        targets = torch.zeros(3, dtype=torch.int64)
        cross_entropy.cross_entropy_forward(_randn(3, 8), targets, 8)
        ones = torch.ones(3)
        cross_entropy.cross_entropy_backward(_randn(3, 8), targets, ones, ones, ones, 8, torch.empty(3, 8))

    run()
    assert len(called) == 7
    with backend.serving_on("cuda"):
        run()
    monkeypatch.setattr(backend, "_asked", "reference")
    run()
    assert len(called) == 7


def _operands() -> dict[str, tuple[Any, ...]]:
    x, scales, targets = _randn(6, 8), torch.ones(6), torch.tensor([0, 7, -1, 3, 2, 1])
    cos, sin = _angles(3, 2, 4)
    heads = _randn(3, 2, 4, 4), _randn(3, 2, 2, 4), _randn(3, 2, 2, 4)
    return {
        "rms_norm_forward": (x, _randn(8), 1e-5),
        "rms_norm_backward": (x, x, _randn(8), scales),
        "layer_norm_forward": (x, _randn(8), _randn(8), 1e-5),
        "layer_norm_backward": (x, x, _randn(8), scales, scales),
        "gelu_forward": (x,),
        "gelu_backward": (x, x),
        "swiglu_forward": (x,),
        "swiglu_backward": (_randn(6, 4), x),
        "split_qkv_forward": (_randn(3, 2, 2, 4, 4), cos, sin, 2),
        "split_qkv_backward": (*heads, cos, sin),
        "cross_entropy_statistics": (x, targets, 8),
        "cross_entropy_gradient": (x, targets, scales, scales, scales, 8, torch.empty(6, 8)),
    }


@pytest.mark.parametrize("name", _operands())
def test_torch_can_trust_them(name: str) -> None:
    operation = getattr(torch.ops.megatron_med, name).default
    torch.library.opcheck(operation, _operands()[name], test_utils=("test_schema", "test_faketensor"))


def test_a_trace_holds_what_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of every input once and of every output once, and the memory of a norm's partial sums."""
    monkeypatch.setattr(backend, "_asked", "auto")
    x, weight = _randn(200, 2, 16).requires_grad_(), _randn(16).requires_grad_()
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder() as recorder:
        out = functional.rms_norm(x, weight, 1e-5)
        out.backward(torch.ones_like(out))
    forward, backward = (kernel for kernel in recorder.trace.kernels if kernel.kind == "opaque")
    assert (forward.name, backward.name) == ("rms_norm_forward", "rms_norm_backward")
    size = 4 * x.numel()
    assert sum([*forward.reads.values(), *forward.writes.values()]) == 2 * size + 4 * 400
    assert sum([*backward.reads.values(), *backward.writes.values()]) == 3 * size + 4 * 400
    partial_sums = 7 * 4 * 16  # of 400 rows, 64 at a time
    assert recorder.peak == 3 * size + 4 * 400 + 4 * 16 + partial_sums


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rms_norm_forward", lambda x, w, eps: (x, w[:7], eps), "weight does not fit"),
        ("rms_norm_forward", lambda x, w, eps: (x.half(), w.half(), eps), "fp32 or bf16"),
        ("rms_norm_forward", lambda x, w, eps: (x.t(), w[:6], eps), "not contiguous"),
        ("rms_norm_backward", lambda g, x, w, s: (g, x, w, s[:5]), "gradient does not fit"),
        ("layer_norm_forward", lambda x, w, b, eps: (x, w, b[:7], eps), "weight does not fit"),
        ("layer_norm_forward", lambda x, w, b, eps: (x.double(), w, b, eps), "fp32 or bf16"),
        ("layer_norm_backward", lambda g, x, w, m, s: (g, x, w, m[:5], s), "gradient does not fit"),
        ("gelu_forward", lambda x: (x.t(),), "not contiguous"),
        ("gelu_backward", lambda g, x: (g[:5], x), "gradient does not fit"),
        ("swiglu_forward", lambda x: (x[:, :7].contiguous(),), "not equally wide"),
        ("swiglu_backward", lambda g, x: (g[:5], x), "gradient does not fit"),
        ("split_qkv_forward", lambda m, c, s, q: (m, c, s, 3), "queries \\+ 2"),
        ("split_qkv_forward", lambda m, c, s, q: (m, c[:2].contiguous(), s, q), "angles do not fit"),
        ("split_qkv_forward", lambda m, c, s, q: (m, c, None, q), "cosines without sines"),
        ("split_qkv_backward", lambda q, k, v, c, s: (q[:, :, :3], k, v, c, s), "do not fit each other"),
        ("cross_entropy_statistics", lambda x, t, n: (x, t + 1, n), "no true column"),
        ("cross_entropy_statistics", lambda x, t, n: (x, t[:5], n), "one int64 target"),
        ("cross_entropy_statistics", lambda x, t, n: (x, t, 9), "more true columns"),
        ("cross_entropy_gradient", lambda x, t, m, s, g, n, o: (x, t, m, s.double(), g, n, o), "one fp32 number"),
        ("cross_entropy_gradient", lambda x, t, m, s, g, n, o: (x, t, m, s, g, n, o[:5]), "does not fit the logits"),
    ],
)
def test_operands_that_do_not_fit_are_refused(name: str, change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.megatron_med, name)(*change(*_operands()[name]))


_SCRIPT = """
from tests.unit.test_fused_kernels import CASES, DTYPES, LOGITS, _check, native, test_cross_entropy_is_that_of_float64
for dtype in DTYPES:
    for case in CASES.values():
        _check(case, dtype)
    for shape in LOGITS:
        test_cross_entropy_is_that_of_float64(shape, dtype)
print(native.cpu_capability())
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_them(capability: str) -> None:
    if not is_there(capability, native.cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    done = run_with(capability, _SCRIPT)
    assert done.stdout.split() == [capability], done.stderr[-2000:]
