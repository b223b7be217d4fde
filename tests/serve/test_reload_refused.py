"""Versions that must not be served: the old one serves on, whatever dies or hangs meanwhile, and the next is taken."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from hang import Hang
from reloading import SOON, checks, load, replace_worker, version
from service import wait

from models.bundle import write_sums
from models.store import Store

# Even root reads no file that is closed to it.
BOUND = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []


def spoiled(store, how: str) -> None:
    """A version 2 that must not be served; `latest` points to it."""
    path = tiny.write(store, promote=False)
    if how == "changed":
        (path / "model.onnx").write_bytes((path / "model.onnx").read_bytes() + b"\0")
    elif how == "no graph":
        (path / "model.onnx").write_bytes(b"not a graph")
        write_sums(path)
    elif how == "other answers":
        expected = dict(np.load(path / "samples" / "expected.npz"))
        expected["probabilities"] = expected["probabilities"][:, ::-1]
        np.savez(path / "samples" / "expected.npz", **expected)
        write_sums(path)
    elif how == "no such class":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["samples"][0]["label"] = 99
        (path / "manifest.json").write_text(json.dumps(manifest))
        write_sums(path)
    elif how == "a graph that fails":
        tiny.break_where_bright(path, 0.1)
    elif how == "a graph that hangs":
        tiny.hang(path)
    elif how == "closed to us":
        (path / "model.onnx").chmod(0)
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    os.symlink("2", store / "colours" / "next")
    os.replace(store / "colours" / "next", store / "colours" / "latest")


@pytest.mark.parametrize(
    "how",
    ["changed", "no graph", "other answers", "no such class", "no manifest", "a graph that fails"],
)
def test_a_bad_version_is_refused_and_the_old_serves_on(start, tmp_path, how):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    with load(service, clients=1) as answers:
        spoiled(tmp_path, how)
        wait(lambda: service.metric("imago_reloads_total", outcome="refused") == 1)
        time.sleep(1)
    assert set(answers) == {(200, "1")}
    assert service.is_ready()
    assert service.metric("imago_reloads_total", outcome="refused") == 1, (
        "it is not tried again and again"
    )
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if "refused" in line]
    assert len(lines) == 1
    assert (lines[0]["level"], lines[0]["from"], lines[0]["to"]) == ("error", 1, 2)


@pytest.mark.parametrize("how", ["changed", "a graph that fails", "closed to us"])
def test_a_worker_that_dies_while_latest_is_bad_comes_back_with_the_old(start, tmp_path, how):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path, command=[*BOUND, sys.executable, "-m", "serve"])
    spoiled(tmp_path, how)
    wait(lambda: service.metric("imago_reloads_total", outcome="refused") == 1)
    replace_worker(service)
    assert version(service) == "1"
    wait(
        lambda: service.metric("imago_reloads_total", outcome="refused") == 2
    )  # it looked by itself
    assert service.metric("imago_restarts_total", process="worker", reason="crash") == 1


def test_a_worker_that_dies_while_latest_hangs_comes_back_with_the_old(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    spoiled(tmp_path, "a graph that hangs")
    wait(lambda: checks(tmp_path))
    (first,) = checks(tmp_path)
    replace_worker(service)
    assert version(service) == "1"
    wait(
        lambda: checks(tmp_path) and first not in checks(tmp_path)
    )  # a check does not outlive its worker
    assert service.stop() == 0
    wait(lambda: not checks(tmp_path))


def test_a_version_that_can_not_be_read_for_a_moment_is_tried_again(start, tmp_path):
    store = tmp_path / "store"
    tiny.write(store)
    away = Hang(tmp_path / "away", store / "colours" / "2", error=errno.EIO)
    service = start(*SOON, store=store, env=away.env)
    with away.hangs():
        tiny.write(store)
        wait(lambda: service.log.read_text().count("tried again: version 2") > 1)
        assert version(service) == "1"
    wait(lambda: version(service) == "2")
    assert service.metric("imago_reloads_total", outcome="refused") == 0
    assert service.metric("imago_reloads_total", outcome="ok") == 1


def test_a_version_that_was_changed_since_it_was_checked_is_refused(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    second = tiny.write(tmp_path)
    wait(lambda: version(service) == "2")
    Store(tmp_path).promote("colours", 1)
    wait(lambda: version(service) == "1")
    graph = onnx.load(second / "model.onnx")
    graph.producer_name = "another"  # it answers the samples as before
    onnx.save(graph, second / "model.onnx")
    Store(tmp_path).promote("colours", 2)
    wait(lambda: service.metric("imago_reloads_total", outcome="refused") == 1)
    assert "model.onnx: changed since it was written" in service.log.read_text()
    assert version(service) == "1"
    Store(tmp_path).promote("colours", 1)
    tiny.reseal(second)
    wait(lambda: not checks(tmp_path))
    time.sleep(0.5)  # so that it has looked at `latest`
    Store(tmp_path).promote("colours", 2)
    wait(lambda: version(service) == "2")


def test_a_worker_that_dies_before_latest_was_checked_moves_on_by_itself(start, tmp_path):
    tiny.write(tmp_path)
    service = start("--reload-seconds", "3", store=tmp_path)
    tiny.write(tmp_path)
    replace_worker(service)
    wait(lambda: version(service) == "2")
    assert service.metric("imago_reloads_total", outcome="ok") == 1


def test_a_worker_that_dies_when_the_old_is_gone_takes_the_new(start, tmp_path):
    tiny.write(tmp_path)
    service = start("--reload-seconds", "1000", store=tmp_path)
    tiny.write(tmp_path)
    shutil.rmtree(tmp_path / "colours" / "1")
    replace_worker(service)
    assert version(service) == "2"


def test_a_version_withdrawn_while_it_is_checked_is_not_served(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--threads", "1", store=tmp_path)
    tiny.write(tmp_path)
    wait(lambda: checks(tmp_path))
    (pid,) = checks(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    assert b"--threads\x001\0" in Path(f"/proc/{pid}/cmdline").read_bytes(), (
        "it takes no more cores than we may"
    )
    Store(tmp_path).promote("colours", 1)
    os.kill(pid, signal.SIGCONT)
    wait(lambda: not checks(tmp_path))
    tiny.write(tmp_path)
    wait(lambda: version(service) == "3")
    assert service.metric("imago_reloads_total", outcome="ok") == 1
