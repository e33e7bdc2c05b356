"""A base is quantised while it is read: never more than a few of its tensors are there in 16 bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron_med.checkpoint.huggingface.convert import import_huggingface
from megatron_med.checkpoint.storage import Reader
from tests.cli.processes import real_python
from tests.large_models import write_llama

CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
)
LARGEST = 2 * CONFIG.vocab_size * CONFIG.hidden_size

_MEASURED = """
import re
from pathlib import Path
import torch
import torch.distributed.checkpoint
from megatron_med.checkpoint.load import load_stage
from megatron_med.config.schema import QuantizeConfig
from megatron_med.parallel.context import single_process_context

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

context = single_process_context()
torch.randn(64, 64) @ torch.randn(64, 64)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
stage = load_stage(Path({step!r}), context, torch.bfloat16, quantize=QuantizeConfig(base={base!r}))
held = sum(tensor.numel() * tensor.element_size() for tensor in [*stage.parameters(), *stage.buffers()])
print(resident("VmHWM") - before, held)
"""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """950 MB of bf16, an eighth of it in the largest tensor."""
    folder = tmp_path_factory.mktemp("base")
    write_llama(CONFIG, folder)
    import_huggingface(folder, folder / "checkpoint")
    return folder / "checkpoint" / "step-00000000"


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_the_peak_stays_under_the_quantised_model_and_three_tensors(step: Path, base: str) -> None:
    done = real_python("-c", _MEASURED.format(step=str(step), base=base))
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split())
    dense = 2 * sum(shape.numel() for shape in Reader(step).shapes().values())
    assert held < (0.65 if base == "int8" else 0.5) * dense
    assert peak < held + 3 * LARGEST < dense + LARGEST
