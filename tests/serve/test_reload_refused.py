"""Hot reload of bad versions: the old version keeps serving, and the next good one is loaded."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.bundle import write_checksums
from models.store import Store
from support import tiny_bundle
from support.blocked_path import BlockedPath
from support.hot_reload import FAST_RELOAD, check_processes, replace_worker, served_version
from support.load_generator import LoadGenerator
from support.server import wait_until

# Runs a command without root's right to ignore file modes.
WITHOUT_CAPABILITIES = (
    ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
)


def publish_bad_version(store: Path, how: str) -> None:
    """Write a version 2 that must not be served, and promote it as `latest`."""
    path = tiny_bundle.publish(store, promote=False)
    if how == "changed":
        (path / "model.onnx").write_bytes((path / "model.onnx").read_bytes() + b"\0")
    elif how == "no graph":
        (path / "model.onnx").write_bytes(b"not a graph")
        write_checksums(path)
    elif how == "other outputs":
        expected = dict(np.load(path / "samples" / "expected.npz"))
        expected["probabilities"] = expected["probabilities"][:, ::-1]
        np.savez(path / "samples" / "expected.npz", **expected)
        write_checksums(path)
    elif how == "no such class":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["samples"][0]["label"] = 99
        (path / "manifest.json").write_text(json.dumps(manifest))
        write_checksums(path)
    elif how == "a graph that fails":
        tiny_bundle.fail_on_bright_pixels(path, 0.1)
    elif how == "a graph that hangs":
        tiny_bundle.loop_forever(path)
    elif how == "no permission":
        (path / "model.onnx").chmod(0)
    elif how == "a link":
        shutil.rmtree(path)
        os.symlink("1", path)
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    os.symlink("2", store / "colours" / "next")
    os.replace(store / "colours" / "next", store / "colours" / "latest")


@pytest.mark.parametrize(
    "how",
    [
        "changed",
        pytest.param("no graph", marks=pytest.mark.slow),
        pytest.param("other outputs", marks=pytest.mark.slow),
        pytest.param("no such class", marks=pytest.mark.slow),
        pytest.param("no manifest", marks=pytest.mark.slow),
        "a graph that fails",
        pytest.param("a link", marks=pytest.mark.slow),
    ],
)
def test_bad_version_is_refused_and_the_old_one_keeps_serving(start, tmp_path, how):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, store=tmp_path)
    with LoadGenerator(server.port, tiny_bundle.make_image("red"), clients=1, pause=0.05) as load:
        publish_bad_version(tmp_path, how)
        wait_until(lambda: server.metric("imago_reloads_total", outcome="refused") == 1)
        # Twenty more responses take at least a second, in which `latest` is checked several times.
        responses = len(load.responses)
        wait_until(lambda: len(load.responses) >= responses + 20)
    assert set(load.statuses) == {200}
    assert set(load.versions) == {"1"}
    assert server.is_ready()
    assert server.metric("imago_reloads_total", outcome="ok") == 0
    # A refused version is not tried again.
    assert server.metric("imago_reloads_total", outcome="refused") == 1
    (line,) = [line for line in server.log.read_text().splitlines() if "refused" in line]
    entry = json.loads(line)
    assert entry["level"] == "error"
    assert entry["from"] == 1
    assert entry["to"] == 2
    if how == "changed":  # mended in place, it is checked again although `latest` does not move
        graph = tmp_path / "colours/2/model.onnx"
        graph.write_bytes((tmp_path / "colours/1/model.onnx").read_bytes())
        wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == 1)
        assert served_version(server) == "2"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["changed", "a graph that fails", "no permission"])
def test_worker_killed_while_latest_is_bad_loads_the_old_version(start, tmp_path, how):
    tiny_bundle.publish(tmp_path)
    command = [*WITHOUT_CAPABILITIES, sys.executable, "-m", "serve"]
    server = start(*FAST_RELOAD, store=tmp_path, command=command)
    publish_bad_version(tmp_path, how)
    wait_until(lambda: server.metric("imago_reloads_total", outcome="refused") == 1)
    replace_worker(server)
    assert served_version(server) == "1"
    # The new worker checks the version again and refuses it too.
    wait_until(lambda: server.metric("imago_reloads_total", outcome="refused") == 2)
    assert server.metric("imago_restarts_total", process="worker", reason="crash") == 1


@pytest.mark.slow
def test_worker_killed_while_the_check_hangs_loads_the_old_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, store=tmp_path)
    publish_bad_version(tmp_path, "a graph that hangs")
    wait_until(lambda: check_processes(tmp_path))
    (first,) = check_processes(tmp_path)
    replace_worker(server)
    assert served_version(server) == "1"
    # A check does not outlive its worker. The new worker starts another.
    wait_until(lambda: check_processes(tmp_path) and first not in check_processes(tmp_path))
    assert server.stop() == 0
    wait_until(lambda: not check_processes(tmp_path))


@pytest.mark.slow
def test_a_version_that_is_temporarily_unreadable_is_tried_again(start, tmp_path):
    store = tmp_path / "store"
    tiny_bundle.publish(store)
    blocked_path = BlockedPath(tmp_path / "fail", store / "colours" / "2", error=errno.EIO)
    server = start(*FAST_RELOAD, store=store, env=blocked_path.env)
    with blocked_path.blocked():
        tiny_bundle.publish(store)
        wait_until(lambda: server.log.read_text().count("tried again: version 2") > 1)
        assert served_version(server) == "1"
    wait_until(lambda: served_version(server) == "2")
    assert server.metric("imago_reloads_total", outcome="refused") == 0
    assert server.metric("imago_reloads_total", outcome="ok") == 1


def test_version_changed_after_its_check_is_refused(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, store=tmp_path)
    second = tiny_bundle.publish(tmp_path)
    wait_until(lambda: served_version(server) == "2")
    Store(tmp_path).promote("colours", 1)
    wait_until(lambda: served_version(server) == "1")
    graph = onnx.load(second / "model.onnx")
    graph.producer_name = "another"  # the outputs stay the same
    onnx.save(graph, second / "model.onnx")
    Store(tmp_path).promote("colours", 2)
    wait_until(lambda: server.metric("imago_reloads_total", outcome="refused") == 1)
    assert "model.onnx: changed since it was written" in server.log.read_text()
    assert served_version(server) == "1"

    # It is tried again once `latest` has pointed to another version: to the served one,
    Store(tmp_path).promote("colours", 1)
    wait_until(lambda: "refused version rolled back: version 2" in server.log.read_text())
    Store(tmp_path).promote("colours", 2)
    wait_until(lambda: server.metric("imago_reloads_total", outcome="refused") == 2)
    assert served_version(server) == "1"

    # or to one that is refused.
    tiny_bundle.update_checksums(second)
    third = tiny_bundle.publish(tmp_path, promote=False)
    (third / "manifest.json").unlink()
    Store(tmp_path).promote("colours", 3)
    wait_until(lambda: server.metric("imago_reloads_total", outcome="refused") == 3)
    Store(tmp_path).promote("colours", 2)
    wait_until(lambda: served_version(server) == "2")


@pytest.mark.slow
def test_worker_killed_before_the_check_reloads_later(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--reload-seconds", "3", store=tmp_path)
    tiny_bundle.publish(tmp_path)
    replace_worker(server)
    wait_until(lambda: served_version(server) == "2")
    assert server.metric("imago_reloads_total", outcome="ok") == 1


def test_worker_killed_after_the_old_version_was_deleted_loads_the_new_one(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--reload-seconds", "1000", store=tmp_path)
    tiny_bundle.publish(tmp_path)
    shutil.rmtree(tmp_path / "colours" / "1")
    replace_worker(server)
    assert served_version(server) == "2"


@pytest.mark.slow
def test_version_withdrawn_during_its_check_is_not_served(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, "--threads", "1", store=tmp_path)
    tiny_bundle.publish(tmp_path)
    wait_until(lambda: check_processes(tmp_path))
    (pid,) = check_processes(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    # The check takes no more cores than the worker.
    assert b"--threads\x001\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    Store(tmp_path).promote("colours", 1)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not check_processes(tmp_path))
    tiny_bundle.publish(tmp_path)
    wait_until(lambda: served_version(server) == "3")
    assert server.metric("imago_reloads_total", outcome="ok") == 1
