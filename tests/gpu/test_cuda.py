"""What only a GPU can show: fp32 sums inside half-precision products, and training over NCCL."""

from __future__ import annotations

import pytest
import torch

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megatron_med.inference.engine import Engine
from megatron_med.inference.model import InferenceModel
from megatron_med.inference.request import Request
from megatron_med.kernels import backend, blockwise, int8, nf4
from megatron_med.kernels.functional import PackedDocuments, attention
from megatron_med.kernels.linear import DenseLinear
from megatron_med.model.batch import plain_batch
from megatron_med.model.build import build_stage
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import initialise
from megatron_med.train.setup import build_train_module
from megatron_med.train.step import train_step
from megatron_med.train.timers import StepTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 32), (2, 48, 32)])
def test_weight_gradients_are_summed_into_fp32_by_the_product(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel() // 32
    gradient = torch.randn(128, 2, rows, device="cuda", dtype=dtype)
    x = torch.randn(128, 2, 32, device="cuda", dtype=dtype)
    total = torch.full(shape, 4096.0, device="cuda")
    expected = total.double() + (gradient.double().flatten(0, 1).T @ x.double().flatten(0, 1)).view(shape)
    DenseLinear().weight_grad(x, (), gradient, out=total)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-3)  # bf16 sums would be off by 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_over_documents_in_one_call_equals_one_call_a_document(dtype: torch.dtype) -> None:
    """Output and gradients of two rows, with grouped queries, against the CPU's way in fp32."""
    lengths = [50, 1, 77, 128]
    shapes = [(128, 2, heads, 64) for heads in (8, 2, 2)]
    half = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    full = [tensor.detach().float().cpu().requires_grad_() for tensor in half]
    results = []
    for inputs in (half, full):
        out = attention(*inputs, causal=True, documents=PackedDocuments.of(lengths, inputs[0].device))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        distance = torch.dist(ours.float().cpu(), expected) / expected.norm()
        assert distance < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_like_a_cpu(precision: str) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        config = Config(
            model=ModelConfig(**PRESETS["llama-tiny"] | {"vocab_size": 256}),
            data=DataConfig(sequence_length=64),
            train=TrainConfig(steps=10, global_batch_size=4, output_dir="unused", seed=1),
            precision=precision,  # type: ignore[arg-type]
        )
        config.parallel.sharding = "none"
        config.optimizer.initial_loss_scale = 1024.0
        train_module = build_train_module(config, single_process_context(torch.device(device)))
        curves.append([_step(train_module, device) for _ in range(10)])
    assert curves[0][-1] < curves[0][0] - 0.1
    torch.testing.assert_close(
        torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-3 if precision == "fp32" else 2e-2, atol=0
    )


def _step(train_module: object, device: str) -> float:
    ids = (torch.arange(4 * 65).view(4, 65) * 7 % 256).to(device)
    batch = plain_batch(ids[:, :-1], ids[:, 1:])
    return train_step(train_module, [batch], 1e-3, False, StepTimer(torch.device(device))).loss  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_low_bits_are_those_of_the_cpu(rows: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 products of few and odd rows, NF4 weights, and blocks of moments, which no table of steps serves here."""
    monkeypatch.setattr(backend, "_asked", kernels)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(80, 192, generator=generator) * 0.05
    x = torch.randn(rows, 192, generator=generator)
    x[:, 7] *= 8
    codes, scales = torch.empty(80, 192, dtype=torch.int8), int8.row_maxima(weight)
    int8.quantize_weight(weight, scales, codes)
    here = int8.int8_linear(x, codes, scales, 6.0, None, False)
    there = int8.int8_linear(x.cuda(), codes.cuda(), scales.cuda(), 6.0, None, False)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
    packed, largest = torch.empty(weight.numel() // 2, dtype=torch.uint8), torch.empty(nf4.blocks_of(weight.numel()))
    nf4.quantize_nf4(weight, packed, largest)
    dequantized = nf4.nf4_dequantize(packed.cuda(), largest.cuda(), weight.numel(), torch.bfloat16)
    assert torch.equal(dequantized.cpu(), nf4.nf4_dequantize(packed, largest, weight.numel(), torch.bfloat16))
    found = blockwise.dequantize_blocks(*blockwise.quantize_blocks(weight.cuda(), True), True)
    assert (found.cpu() - weight).norm() < 0.02 * weight.norm()


@pytest.mark.parametrize("family", ["llama-tiny", "gpt2-tiny"])
def test_a_gpu_writes_what_a_cpu_writes(family: str) -> None:
    """Rows of unequal length under one mask there, one by one here; in fp32, with large weights: no near ties."""
    config = ModelConfig(**PRESETS[family] | {"vocab_size": 256, "init_std": 0.2})
    requests = [Request(list(range(3, 3 + length)), 24) for length in (3, 40, 17, 1)]
    written = []
    for device in ("cpu", "cuda"):
        context = single_process_context(torch.device(device))
        stage = build_stage(config, context, torch.float32).eval()
        initialise(stage, context, 5)
        answers = Engine(InferenceModel([stage], context, torch.float32), slots=3).answers(requests)
        written.append({answer.request: answer.tokens for answer in answers})
    assert written[0] == written[1]
