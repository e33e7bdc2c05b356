"""Import and export stream: they hold a few tensors, whatever the size of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from megatron_med.checkpoint.huggingface.files import open_tensors
from tests.cli.processes import real_python
from tests.large_models import write_llama

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=20,
    num_attention_heads=8,
    num_key_value_heads=8,
)
LARGEST = 2 * 2 * CONFIG.hidden_size * max(CONFIG.intermediate_size, CONFIG.vocab_size // 2)
SHARD = 50_000_000
SPARE = 100_000_000

_LIMITED = """
import resource, sys
from pathlib import Path
import megatron_med.checkpoint.huggingface.files as files
from megatron_med.checkpoint.huggingface.convert import export_huggingface, import_huggingface
files.SHARD_BYTES = {shard}
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + {limit}, resource.RLIM_INFINITY))
{call}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """530 MB of bf16, eight times what the conversion may take."""
    folder = tmp_path_factory.mktemp("large")
    write_llama(CONFIG, folder)
    return folder


def test_memory_stays_at_three_tensors_and_a_shard(folder: Path, tmp_path: Path) -> None:
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    for call, limit in (
        (f"import_huggingface(Path('{folder}'), Path('{checkpoint}'))", 3 * LARGEST + SPARE),
        (f"export_huggingface(Path('{checkpoint}'), Path('{back}'))", 3 * LARGEST + SHARD + SPARE),
    ):
        done = real_python("-c", _LIMITED.format(shard=SHARD, limit=limit, call=call))
        assert done.returncode == 0, done.stderr[-3000:]
    before, after = open_tensors(folder), open_tensors(back)
    assert before.names() == after.names()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    shard = sorted(back.glob("model-*.safetensors"))[1]
    save_file(load_file(shard), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert shard.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert len(json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]) == len(before.names())
