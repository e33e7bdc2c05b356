"""Small parts of training: learning rate, weight decay groups, FLOPs, the run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from megatron_med.config.presets import PRESETS
from megatron_med.config.schema import LoRAConfig, LRScheduleConfig, ModelConfig
from megatron_med.errors import ConfigError
from megatron_med.launch.failure_report import is_connection_failure
from megatron_med.model.batch import plain_batch
from megatron_med.model.build import build_stage
from megatron_med.model.flops import parameter_count, training_flops_per_token
from megatron_med.model.lora import add_adapters
from megatron_med.optim.lr_schedule import learning_rate
from megatron_med.parallel.context import single_process_context
from megatron_med.parallel.parameters import initialise, parameters_with_layout
from megatron_med.tracing.recorder import Recorder
from megatron_med.tracing.trace import Kernel
from megatron_med.train.run_folder import RunFolder
from megatron_med.train.setup import tell_of_repetition
from tests.training import MODELS, make_config


def test_cosine_equals_transformers() -> None:
    config = LRScheduleConfig("cosine", warmup_steps=10, min_lr=1e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 100, min_lr=1e-4)
    for step in range(1, 101):
        optimizer.step()
        theirs.step()
        assert learning_rate(config, 1e-3, step, 100) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
    assert learning_rate(config, 1e-3, 150, 100) == pytest.approx(1e-4)


def test_other_schedules() -> None:
    linear = LRScheduleConfig("linear", warmup_steps=2, decay_steps=12, min_lr=0.0)
    assert [learning_rate(linear, 1.0, step, 99) for step in (1, 2, 7, 12, 50)] == pytest.approx([0.5, 1, 0.5, 0, 0])
    constant = LRScheduleConfig("constant", warmup_steps=4)
    assert [learning_rate(constant, 1.0, step, 10) for step in (1, 4, 10)] == [0.25, 1.0, 1.0]


def test_meditron_lr_ends_near_half_when_the_schedule_spans_two_epochs() -> None:
    config = LRScheduleConfig("cosine", warmup_steps=2000, decay_steps=46000, min_lr=1e-6)
    assert learning_rate(config, 3e-4, 23000, 23000) == pytest.approx(1.6e-4, rel=0.06)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("biomedlm-2.7b", 2_594_247_680),
        ("gpt2-124m", 124_439_808),
    ],
)
def test_published_parameter_counts(preset: str, count: int) -> None:
    assert parameter_count(ModelConfig(**PRESETS[preset])) == count


def test_flops_of_meditron_70b_are_near_six_per_parameter() -> None:
    model = ModelConfig(**PRESETS["llama2-70b"])
    six = 6 * parameter_count(model)
    assert six < training_flops_per_token(model, 4096) < 1.15 * six


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [0, 8])
def test_flops_are_those_of_the_products_that_run(family: str, rank: int) -> None:
    """Of frozen weights no gradient is computed. Attention, whose products are counted otherwise, is left out."""
    shape = MODELS[family] | {"hidden_size": 128, "num_attention_heads": 8, "num_layers": 12}
    model, lora = ModelConfig(**shape), LoRAConfig(rank=rank)
    stage = build_stage(model, single_process_context(), torch.float32)
    add_adapters([stage], model, lora)
    initialise(stage, single_process_context(), 1)
    batch = plain_batch(torch.arange(64).view(1, 64))
    with Recorder() as recorder:
        stage.train().loss(stage(None, batch), batch).backward()
    kernels = [event for event in recorder.trace.events if isinstance(event, Kernel)]
    products = sum(kernel.flops for kernel in kernels if kernel.kind == "product")
    assert products / 64 == pytest.approx(training_flops_per_token(model, 0, lora), rel=0.02)


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny"])
def test_norms_and_biases_do_not_decay_and_names_are_unique(preset: str) -> None:
    stage = build_stage(ModelConfig(**PRESETS[preset]), single_process_context(torch.device("meta")), torch.float32)
    layouts = [layout for layout, _ in parameters_with_layout(stage)]
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        assert layout.weight_decay == (len(layout.global_shape) > 1), layout.name
    assert sum(math.prod(layout.global_shape) for layout in layouts) == parameter_count(ModelConfig(**PRESETS[preset]))


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}) for step in range(1, 8)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    folder.cut_metrics(5)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    identity = {"model": {"layers": 2}, "data": [{"path": "a", "content": "x"}]}
    folder.check_identity(identity)
    assert not list(tmp_path.iterdir()), "nothing is recorded before the start has succeeded"
    folder.write_exit(0, "an earlier end")
    folder.begin(identity, "a: 1\n", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run.json"]
    folder.check_identity({"model": {"layers": 2}, "data": [{"path": "moved", "content": "x"}]})
    with pytest.raises(ConfigError) as caught:
        folder.check_identity({"model": {"layers": 3}, "data": [{"path": "a", "content": "y"}]})
    assert len(caught.value.faults) == 2
    assert "model.layers is 3" in "".join(caught.value.faults)


def test_a_cut_record_of_the_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"run.json cannot be read"):
        RunFolder(tmp_path).check_identity({"model": {}})


def test_a_run_from_before_a_switch_existed_goes_on_with_it_off(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"data": {"sequence_length": 32}}')
    RunFolder(tmp_path).check_identity({"data": {"sequence_length": 32, "isolate_documents": False}})
    with pytest.raises(ConfigError, match="isolate_documents is True"):
        RunFolder(tmp_path).check_identity({"data": {"sequence_length": 32, "isolate_documents": True}})


def test_second_claim_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim()
    with pytest.raises(ConfigError, match="another run is alive"):
        second.claim()
    first.release()
    second.claim()
    second.release()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer", True),
        ("Application timeout caused pair closure", True),  # another collective of the group timed out first
        ("NCCL communicator was aborted on rank 3", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_failed_collective_is_told_from_a_fault_of_this_rank(message: str, expected: bool) -> None:
    assert is_connection_failure(RuntimeError(message)) == expected
    wrapped = ValueError("while saving")
    wrapped.__cause__ = RuntimeError(message)
    assert is_connection_failure(wrapped) == expected


def test_a_corpus_that_repeats_within_a_step_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(Path("none"), MODELS["llama"], batch=8)
    tell_of_repetition(config, single_process_context(), one_pass=8)
    assert capsys.readouterr().err == ""
    tell_of_repetition(config, single_process_context(), one_pass=7)
    assert capsys.readouterr().err == (
        "warning: a corpus of data.train repeats after 7 samples, and a step takes train.global_batch_size = 8: texts "
        "come more than once in a step.\n"
    )
