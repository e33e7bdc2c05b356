"""Two hosts on one machine: network namespaces joined by a cable that is cut in mid-run and mended."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_med.checkpoint.folder import complete_steps
from tests.cli.processes import (
    TIMEOUT,
    environment,
    python_path,
    read_metrics,
    started,
    torchrun_command,
    wait_for_step,
    write_dropout_config,
)
from tests.conftest import REPOSITORY

TIMEOUT_MINUTES = 0.1
STEPS = 120
NETWORK = "10.213.77"


class Cable:
    """Two namespaces and the pair of interfaces between them."""

    def __init__(self) -> None:
        self.hosts = [f"mm{os.getpid()}{end}" for end in "ab"]
        self.ends = [f"v{os.getpid()}{end}" for end in "ab"]
        self.addresses = [f"{NETWORK}.{number}" for number in (1, 2)]

    def lay(self) -> None:
        for host in self.hosts:
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
        first, second = self.ends
        _ip(
            "link", "add", first, "netns", self.hosts[0], "type", "veth", "peer", "name", second, "netns", self.hosts[1]
        )
        for host, end, address in zip(self.hosts, self.ends, self.addresses, strict=True):
            _ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", host, "link", "set", end, "up")

    def cut(self) -> None:
        _ip("-n", self.hosts[1], "link", "set", self.ends[1], "down")

    def mend(self) -> None:
        _ip("-n", self.hosts[1], "link", "set", self.ends[1], "up")

    def remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, timeout=30, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable()
    try:
        cable.lay()
    except (OSError, subprocess.CalledProcessError) as error:
        cable.remove()
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"this machine forbids network namespaces: {str(reason).strip()}")
    yield cable
    cable.remove()


@pytest.fixture
def config(tmp_path: Path, sample_data: Path) -> Path:
    return write_dropout_config(tmp_path, sample_data, interval=10, steps=STEPS, timeout_minutes=TIMEOUT_MINUTES)


def _ranks(host: str) -> int:
    """Ranks that are alive in a namespace."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, timeout=30, check=True)
    found = 0
    for pid in pids.stdout.split():
        try:
            found += b"-u\0-m\0megatron_med.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cut_link_ends_both_hosts_and_the_run_resumes_when_it_is_back(
    config: Path, tmp_path: Path, cable: Cable
) -> None:
    run = tmp_path / "run"
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    with ExitStack() as stack:
        first, second = [
            stack.enter_context(started(_launch(cable, number, config), logs[number], _environment(cable, number)))
            for number in (0, 1)
        ]
        wait_for_step(run, 25, first, logs[0])
        assert [_ranks(host) for host in cable.hosts] == [1, 1]
        cable.cut()
        cut = time.monotonic()
        while any(_ranks(host) for host in cable.hosts):
            # The collective's timeout, and twice the patience with which the survivors look for each other.
            assert time.monotonic() - cut < 60 * TIMEOUT_MINUTES * 3 + 15, "a rank hangs behind the cut link"
            time.sleep(0.2)
        stopped_at = read_metrics(run)[-1]["step"]
        time.sleep(3)
        cable.mend()
        assert first.wait(timeout=TIMEOUT) == 0, logs[0].read_text()[-3000:]
        assert second.wait(timeout=TIMEOUT) == 0, logs[1].read_text()[-3000:]
    assert stopped_at < STEPS
    assert "did not answer" in logs[0].read_text() + logs[1].read_text()
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    assert complete_steps(run / "checkpoints")[-1] == STEPS

    alone = tmp_path / "alone"
    command = torchrun_command(2, "-m", "megatron_med.train", config, "--train.output_dir", alone)
    subprocess.run(command, env=environment(), cwd=REPOSITORY, timeout=TIMEOUT, check=True, capture_output=True)
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(alone)]


def _launch(cable: Cable, number: int, config: Path) -> list[str]:
    torchrun = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two-hosts"]
    torchrun += ["--rdzv-endpoint", f"{cable.addresses[0]}:29511", "--local-addr", cable.addresses[number]]
    torchrun += ["--rdzv-conf", f"read_timeout=10,is_host={'true' if number == 0 else 'false'}"]
    script = str(REPOSITORY / "tools" / "launch.sh")
    return ["ip", "netns", "exec", cable.hosts[number], "bash", script, *torchrun, "--", str(config)]


def _environment(cable: Cable, number: int) -> dict[str, str]:
    return {
        "GLOO_SOCKET_IFNAME": cable.ends[number],
        "MEGATRON_MED_PYTHON": python_path(),
        "MEGATRON_MED_RESTART_DELAY": "1",
        "MEGATRON_MED_STUCK_SECONDS": "5",
    }
