"""Imports are not collected and never walked through again; questions about tensors without data end at the top."""

from __future__ import annotations

import gc
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_med.launch.collection import uncollected
from megatron_med.tracing.recorder import Recorder

_STARTS = """
import gc, sys
passes = [0]
gc.callbacks.append(lambda phase, _: passes.__setitem__(0, passes[0] + (phase == "start")))
sys.argv = ["megatron-med", "import", "--help"]
from megatron_med.commands.__main__ import run
try:
    run(sys.argv[1:])
finally:
    print("passes", passes[0], "frozen", gc.get_freeze_count(), gc.isenabled(), "torch" in sys.modules)
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_within_and_the_collector_is_as_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(ValueError), uncollected():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_command_does_not_collect_while_it_imports_torch() -> None:
    """Some hundred passes without it."""
    done = subprocess.run([sys.executable, "-c", _STARTS], capture_output=True, text=True, timeout=120)
    words = done.stdout.splitlines()[-1].split()
    assert words[0::2][:2] == ["passes", "frozen"], done.stderr
    assert int(words[1]) < 60
    assert int(words[3]) > 100_000
    assert words[4:] == ["True", "True"]


class _Counts(TorchDispatchMode):
    """How many questions for a device come so far down."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.questions += function.namespace == "prim"
        return function(*args, **(kwargs or {}))


def test_a_recorder_answers_for_the_device_of_a_tensor_without_data() -> None:
    with FakeTensorMode(), _Counts() as below, Recorder():
        weight = torch.empty(3, 3, requires_grad=True)
        torch.nn.functional.linear(weight, weight).sum().backward()
        assert weight.grad is not None
        assert weight.grad.device.type == "cpu"
    assert below.questions == 0
