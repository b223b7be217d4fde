"""`train launch` ends with the exit status by which Kubernetes decides. Real launchers run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import ROOT
from support.server import find_free_ports, wait_until

WORKER = """
import os, signal, sys, time
match sys.argv[1:]:
    case ["exit", status]:
        sys.exit(int(status))
    case ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
    case ["meet", directory]:
        import torch
        from torch import distributed
        launcher = os.getppid()
        distributed.init_process_group("gloo")
        open(f"{directory}/met-{launcher}-{os.environ['RANK']}", "w").close()
        while os.getppid() == launcher:
            is_over = torch.tensor(os.path.exists(f"{directory}/over"), dtype=torch.int)
            distributed.all_reduce(is_over)
            if is_over:
                sys.exit()
            time.sleep(0.05)
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function that starts a launcher of WORKER. Launchers that still run end with the test."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
    }
    launchers: list[subprocess.Popen] = []

    def run(*words: object) -> subprocess.Popen:
        with open(tmp_path / f"log-{len(launchers)}", "wb") as log:
            launchers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "train", "launch", *map(str, words)],
                    cwd=tmp_path,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return launchers[-1]

    yield run
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.kill()
    for log in sorted(tmp_path.glob("log-*")):  # shown where the test failed
        print(log.name, log.read_text()[-2000:])


@pytest.fixture
def node(start: Start, tmp_path: Path) -> Start:
    """A function that starts one of the two nodes of a run; the `first` one hosts the meeting."""
    flags = (
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-id=imago",
        f"--rdzv-endpoint=127.0.0.1:{find_free_ports(1)[0]}",
    )
    return lambda first=False: start(
        *flags, f"--rdzv-conf=is_host={first}", "-m", "worker", "meet", tmp_path
    )


def wait_until_met(directory: Path, *nodes: subprocess.Popen) -> None:
    """Wait until the processes of these nodes have met."""

    def have_met() -> bool:
        assert [node.poll() for node in nodes] == [None] * len(nodes), "a launcher has ended"
        return all(any(directory.glob(f"met-{node.pid}-*")) for node in nodes)

    wait_until(have_met)


@pytest.mark.slow
def test_the_status_is_that_of_the_process(start, tmp_path):
    programs = {
        ("worker", "exit", "0"): 0,
        ("worker", "exit", "143"): 143,
        ("worker", "killed"): 137,
        ("train", "run", tmp_path / "no-such-folder"): 2,
    }
    launchers = {start("--standalone", "-m", *words): status for words, status in programs.items()}
    assert [launcher.wait(240) for launcher in launchers] == list(launchers.values())


def test_sigterm_ends_it_before_the_nodes_have_met(node):
    alone = node(first=True)
    wait_until(lambda: "libtorch" in Path(f"/proc/{alone.pid}/maps").read_text())  # it imports
    alone.terminate()
    assert alone.wait(60) == 143


@pytest.mark.slow
@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGKILL])
def test_nodes_end_as_interrupted_when_the_first_one_is_lost(notice, node, tmp_path):
    first = node(first=True)
    other = node()
    wait_until_met(tmp_path, first, other)
    first.send_signal(notice)
    assert first.wait(60) == (143 if notice == signal.SIGTERM else -9)
    assert other.wait(100) == 143


@pytest.mark.slow
def test_another_node_replaces_a_lost_one(node, tmp_path):
    first = node(first=True)
    other = node()
    wait_until_met(tmp_path, first, other)
    other.terminate()
    assert other.wait(60) == 143
    for file in tmp_path.glob("met-*"):
        file.unlink()
    replacement = node()
    wait_until_met(tmp_path, first, replacement)
    (tmp_path / "over").touch()
    assert first.wait(60) == 0
    assert replacement.wait(60) == 0
