"""Attention over the cache in C++: against float64, for every instruction set, size and number of threads."""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_med.kernels import backend, cached_attention
from tests.unit.instruction_sets import is_there, run_with

if not backend._is_installed("_megatron_med_kernels"):
    pytest.skip("csrc/kernels is not built", allow_module_level=True)
native = importlib.import_module("megatron_med.kernels.native")

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, list[int]]

SIZES = [  # rows, heads, groups, head_dim, lengths: every remainder of heads, lanes and tokens
    (3, 8, 8, 64, [5, 0, 19]),
    (2, 6, 1, 80, [16, 31]),
    (1, 9, 3, 7, [40]),
    (4, 5, 5, 128, [1, 2, 3, 300]),
    (2, 8, 2, 48, [63, 64]),
]


def _operands(size: tuple[int, int, int, int, list[int]], dtype: torch.dtype, capacity: int = 310) -> Operands:
    rows, heads, groups, head_dim, lengths = size
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(rows, groups, heads // groups + 2, head_dim, generator=generator).to(dtype)
    query = 3 * joint[:, :, :-2].reshape(rows, heads, head_dim)
    kept = torch.randn(2, rows + 1, groups, capacity, head_dim, generator=generator).to(dtype)
    return query, joint[:, :, -2], joint[:, :, -1], (kept[0], kept[1]), torch.tensor(lengths), lengths


def _in_float64(operands: Operands) -> torch.Tensor:
    query, key, value, kept, _, lengths = operands
    together = query.shape[1] // key.shape[1]
    rows = []
    for row, length in enumerate(lengths):
        keys, values = (
            torch.cat((tensor[row, :, :length], new[row, :, None]), 1).double().repeat_interleave(together, 0)
            for tensor, new in zip(kept, (key, value), strict=True)
        )
        scores = (keys @ query[row].double()[..., None]).squeeze(-1) / query.shape[-1] ** 0.5
        rows.append((scores.softmax(-1)[:, None] @ values).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_attention(size: tuple[int, int, int, int, list[int]], dtype: torch.dtype) -> None:
    operands = _operands(size, dtype)
    exact = _in_float64(operands)
    before = [tensor.clone() for tensor in operands[3]]
    out = native.decode_attention(*operands)
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    for old, kept, new in zip(before, operands[3], operands[1:3], strict=True):
        for row, length in enumerate(operands[5]):
            assert torch.equal(kept[row, :, length], new[row])
            old[row, :, length] = new[row]
        assert torch.equal(old, kept)  # nothing else is written


def test_it_serves_on_a_cpu_and_gives_what_the_reference_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose cache is fp32 where the activations are bf16."""
    monkeypatch.setattr(backend, "_asked", "auto")
    assert backend.serves(backend.NATIVE, "decode_attention", "cpu")
    cpu = torch.device("cpu")
    assert cached_attention.cache_dtype(cpu, torch.bfloat16) == torch.bfloat16
    called: list[int] = []
    real = native.decode_attention
    monkeypatch.setattr(native, "decode_attention", lambda *a: called.append(1) or real(*a))
    ours = cached_attention.decode_attention(*_operands(SIZES[0], torch.float32))
    assert called
    monkeypatch.setattr(backend, "_asked", "reference")
    assert cached_attention.cache_dtype(cpu, torch.bfloat16) == torch.float32
    theirs = cached_attention.decode_attention(*_operands(SIZES[0], torch.float32))
    assert len(called) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_is_the_same_among_others_and_for_any_number_of_threads() -> None:
    size = (6, 8, 4, 64, [200, 3, 90, 250, 17, 309])
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outs.append(native.decode_attention(*_operands(size, torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outs[0], out) for out in outs)
    query, key, value, kept, places, lengths = _operands(size, torch.bfloat16)
    alone = native.decode_attention(
        query[3:4], key[3:4], value[3:4], (kept[0][3:], kept[1][3:]), places[3:4], lengths[3:4]
    )
    assert torch.equal(alone[0], outs[0][3])


def test_extreme_scores_keep_their_order() -> None:
    """One key far above the others takes all; equal ones share; what is far below counts nothing."""
    query = torch.full((1, 1, 16), 30.0)
    kept = torch.zeros(1, 1, 8, 16), torch.arange(8.0)[:, None].expand(8, 16).clone()[None, None]
    kept[0][0, 0, 2] = 30.0
    out = native.decode_attention(query, kept[0][:, :, 7], kept[1][:, :, 7], kept, torch.tensor([7]), [7])
    assert torch.equal(out, torch.full((1, 16), 2.0))
    kept[0][0, 0, 2] = 0.0
    out = native.decode_attention(query, kept[0][:, :, 7], kept[1][:, :, 7], kept, torch.tensor([7]), [7])
    torch.testing.assert_close(out, torch.full((1, 16), 3.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: (*o[:4], torch.tensor([5, 310, 1]), o[5]), "longer than its cache"),
        (lambda o: (*o[:4], torch.tensor([5, -1, 1]), o[5]), "longer than its cache"),
        (lambda o: (*o[:4], torch.tensor([5, 1]), o[5]), "not as many rows"),
        (lambda o: (o[0][:, :, :32], *o[1:]), "head_dim"),
        (lambda o: (o[0][:, :7], *o[1:]), "no multiple"),
        (lambda o: (*o[:3], (o[3][0].transpose(1, 2), o[3][1]), *o[4:]), "no multiple|side by side"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: object, message: str) -> None:
    operands = change(_operands(SIZES[0], torch.float32))  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        native.decode_attention(*operands)


def test_torch_can_trust_it() -> None:
    query, key, value, kept, places, _ = _operands(SIZES[0], torch.float32)
    operation = torch.ops.megatron_med.decode_attention.default
    torch.library.opcheck(operation, (query, key, value, *kept, places), test_utils=("test_schema", "test_faketensor"))


_SCRIPT = """
import torch
from megatron_med.errors import ConfigError
try:
    from megatron_med.kernels import native
except ConfigError as error:
    raise SystemExit(f"error: {error}")
from tests.unit.test_native_attention import SIZES, _operands, _in_float64
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
    for size in SIZES:
        operands = _operands(size, dtype)
        exact = _in_float64(operands)
        torch.testing.assert_close(native.decode_attention(*operands).double(), exact, rtol=tolerance, atol=tolerance)
print(native.cpu_capability())
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512", "sse9"])
def test_every_instruction_set_gives_it(capability: str) -> None:
    best = native.cpu_capability()
    done = run_with(capability, _SCRIPT)
    if is_there(capability, best):
        assert done.stdout.split() == [capability], done.stderr
    else:
        assert done.stderr.splitlines()[-1].startswith(f"error: MEGATRON_MED_CPU_CAPABILITY is {capability}")


def test_without_a_compiler_plain_torch_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "_is_installed", lambda module: not module.startswith("_megatron_med"))
    monkeypatch.setattr(backend, "_asked", "auto")
    backend.say_that_native_is_missing.cache_clear()
    monkeypatch.delattr(native, "decode_attention")
    assert {cached_attention.cache_dtype(torch.device("cpu"), torch.bfloat16) for _ in range(2)} == {torch.float32}
    operands = _operands(SIZES[0], torch.float32)
    exact = _in_float64(operands)
    out = cached_attention.decode_attention(*operands)
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)
    assert [record.message for record in caplog.records] == [
        "The C++ kernels are not installed (pip install --no-build-isolation -e . builds them); plain torch serves."
    ]
