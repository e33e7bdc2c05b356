"""Operations are served by one implementation each, which is told; opaque ones declare what they cost."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from megatron_med.errors import ConfigError
from megatron_med.kernels import backend, blockwise, cached_attention, cross_entropy, functional, int8, nf4
from megatron_med.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from megatron_med.tracing.recorder import Recorder
from tests.cli.processes import train, write_config


def test_every_operation_is_listed_and_has_a_reference() -> None:
    own = {
        name: function.__module__
        for module in (functional, cross_entropy, int8, nf4, blockwise, cached_attention)
        for name, function in vars(module).items()
        if getattr(function, "__module__", "").startswith("megatron_med.kernels.")
    }
    assert backend.OPERATIONS.keys() <= own.keys()
    by_bitsandbytes = {name for name, choice in backend.choices().items() if choice == "bitsandbytes"}
    assert by_bitsandbytes == {"int8_matmul", "nf4_dequantize", "quantize_blocks", "dequantize_blocks"}


def test_bitsandbytes_serves_where_it_is_asked_for_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(97 * 192, generator=generator)
    x, weight = (torch.randint(-127, 128, (rows, 192), generator=generator, dtype=torch.int8) for rows in (33, 80))
    codes, maxima = blockwise.quantize_blocks(values, True)
    packed, largest = torch.empty(values.numel() // 2, dtype=torch.uint8), torch.empty(nf4.blocks_of(values.numel()))
    nf4.quantize_nf4(values, packed, largest)

    def results() -> list[torch.Tensor]:
        return [
            int8.int8_matmul(x, weight),
            *blockwise.quantize_blocks(values, True),
            blockwise.dequantize_blocks(codes, maxima, True),
            nf4.nf4_dequantize(packed, largest, values.numel(), torch.bfloat16),
        ]

    monkeypatch.setattr(backend, "_asked", "auto")
    plain = results()
    called: list[str] = []
    theirs = importlib.import_module("megatron_med.kernels.bitsandbytes")
    for name in ("int8_matmul", "nf4_dequantize", "quantize_blocks", "dequantize_blocks"):
        real = getattr(theirs, name)
        monkeypatch.setattr(theirs, name, lambda *a, real=real, name=name: called.append(name) or real(*a))
    assert all(map(torch.equal, plain, results()))
    assert not called
    backend.ask_for("bitsandbytes")
    assert all(map(torch.equal, plain, results()))
    assert len(called) == 4
    assert "bitsandbytes (int8_matmul" in backend.describe()


def test_bitsandbytes_that_is_asked_for_and_missing_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_is_installed", lambda module: not module.startswith(("bitsandbytes", "_megatron")))
    monkeypatch.setattr(backend, "_asked", "auto")
    assert set(backend.choices().values()) == {"reference"}
    with pytest.raises(ConfigError, match=r"pip install 'megatron_med\[bitsandbytes\]'.*plain torch serves"):
        backend.ask_for("bitsandbytes")


def test_native_that_is_asked_for_and_not_built_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_asked", "auto")
    with pytest.raises(ConfigError, match="serves on a CPU, and this run is on cuda"):
        backend.ask_for("native", "cuda")
    monkeypatch.setattr(backend, "_is_installed", lambda module: not module.startswith("_megatron_med"))
    with pytest.raises(ConfigError, match=r"not built: pip install --no-build-isolation -e .*plain torch serves"):
        backend.ask_for("native", "cpu")
    backend.ask_for("auto", "cpu")
    assert set(backend.choices().values()) <= {"reference", "bitsandbytes"}


def test_kernels_of_another_torch_or_of_older_sources_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native = importlib.import_module("megatron_med.kernels.native")
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    with pytest.raises(ConfigError, match=rf"are of version {native.VERSION - 1}, .* needs {native.VERSION}: pip"):
        native._load()
    strange = tmp_path / "_megatron_med_kernels.so"
    strange.write_bytes(b"no shared object")
    spec = importlib.machinery.ModuleSpec("_megatron_med_kernels", None, origin=str(strange))
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=rf"cannot be loaded by torch {re.escape(torch.__version__)}: file too short"):
        native._load()


def test_the_first_implementation_that_is_installed_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ModuleType("fused_norms")
    installed.__spec__ = sys.__spec__
    installed.rms_norm = lambda *_: "fused"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fused_norms", installed)
    listed = (("transformer_engine", "not_installed.here"), ("quack", "fused_norms"), ("apex", "json"))
    monkeypatch.setitem(backend.OPERATIONS, "rms_norm", listed)

    def rms_norm(x: object) -> object:
        return x

    assert backend.operation(rms_norm)(1) == "fused"
    assert backend.choices()["rms_norm"] == "quack"
    assert "quack (rms_norm)" in backend.describe()
    monkeypatch.setitem(backend.OPERATIONS, "rms_norm", listed[:1])
    assert backend.operation(rms_norm)(1) == 1


def test_who_serves_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every call, of which a small one takes ten microseconds."""
    monkeypatch.setattr(backend, "_asked", "auto")
    asked: list[str] = []
    monkeypatch.setattr(backend, "_is_installed", lambda module: asked.append(module) or False)
    for _ in range(3):
        functional.swiglu(torch.ones(2, 4))
    assert asked == ["megatron_med.kernels.fused"]


def test_the_choice_is_told_by_print_config_and_at_the_start(tmp_path: Path, sample_data: Path) -> None:
    config = write_config(
        tmp_path,
        sample_data,
        model={"preset": "llama-tiny", "vocab_size": 512},
        data={"sequence_length": 32},
        train={"steps": 1},
    )
    line = backend.describe()
    assert "decode_attention" in line
    assert "bitsandbytes on a GPU, else reference (int8_matmul" in line
    printed = train(config, "--print_config")
    assert printed.returncode == 0
    assert printed.stdout.splitlines()[-1].startswith(f"# {line}")
    assert yaml.safe_load(printed.stdout)["train"]["steps"] == 1
    assert any(told.startswith(line) for told in train(config).stdout.splitlines())


ROWS, COLUMNS, TRUE, BLOCK_ROWS = 600, 40, 37, 256


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few rows, the last one not full."""
    monkeypatch.setattr(cross_entropy, "CPU_BLOCK", BLOCK_ROWS * COLUMNS + 1)


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    return logits, torch.randint(-1, TRUE, (ROWS,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_opaque_operation_is_recorded_by_what_it_declares(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of its inside; plain torch around it as it runs."""
    monkeypatch.setattr(backend, "_asked", "reference")
    logits, targets = _operands(dtype)
    with Recorder() as recorder:
        doubled = logits * 2
        maximum, total, hit = cross_entropy_forward(doubled, targets, TRUE)
        cross_entropy_backward(doubled, targets, maximum, total, torch.ones_like(hit), TRUE, doubled)
    names = [kernel.name for kernel in recorder.trace.kernels]
    assert names == ["mul", "cross_entropy_forward", "ones_like", "cross_entropy_backward"]
    forward, backward = (kernel for kernel in recorder.trace.kernels if kernel.kind == "opaque")
    count, itemsize = ROWS * COLUMNS, dtype.itemsize
    assert sum([*forward.reads.values(), *forward.writes.values()]) == count * (2 * itemsize + 8)
    assert sum([*backward.reads.values(), *backward.writes.values()]) == count * (2 * itemsize + 28)
    assert forward.flops == backward.flops == 4 * count
    block = BLOCK_ROWS * (4 * COLUMNS + (12 if dtype == torch.float32 else 4 * COLUMNS))
    of_gradient = ROWS * 4 + BLOCK_ROWS * (4 * COLUMNS + 12)  # what goes out of the loss, a block of rows in fp32
    assert recorder.peak == count * itemsize + ROWS * 3 * 4 + max(block, of_gradient)  # three statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_cross_entropy_is_an_operation_that_torch_can_trust(dtype: torch.dtype) -> None:
    logits, targets = _operands(dtype)
    operations = torch.ops.megatron_med
    torch.library.opcheck(operations.cross_entropy_forward.default, (logits, targets, TRUE))
    rows = torch.ones(ROWS)
    torch.library.opcheck(operations.cross_entropy_backward.default, (logits, targets, rows, rows, rows, TRUE, logits))


def test_local_cross_entropy_in_float64() -> None:
    """More rows than are taken at a time, targets on other ranks, padding."""
    logits, targets = _operands(torch.float32)
    maximum, total, hit = cross_entropy_forward(logits, targets, TRUE)
    exact = logits.double()[:, :TRUE].requires_grad_()
    log_total = exact.logsumexp(-1)
    torch.testing.assert_close((total.log() + maximum).double(), log_total, rtol=1e-6, atol=1e-6)
    here = targets >= 0
    torch.testing.assert_close(hit[here], logits[here, targets[here]])
    assert not hit[~here].any()
    (log_total - torch.where(here, exact.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1), 0)).sum().backward()
    grad = torch.empty_like(logits)
    cross_entropy_backward(logits, targets, maximum, total, torch.ones(ROWS), TRUE, grad)
    assert exact.grad is not None
    torch.testing.assert_close(grad[:, :TRUE].double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert not grad[:, TRUE:].any()
    cross_entropy_backward(logits, targets, maximum, total, torch.ones(ROWS), TRUE, logits)
    assert torch.equal(logits, grad), "in place of the logits"
