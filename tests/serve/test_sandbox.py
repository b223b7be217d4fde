"""Strict containers: PID 1, read-only root, no capabilities, a network of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT, tiny_bundle

SETUP = (
    "mount --make-rprivate / && mount -o remount,ro,bind / "
    "&& (mount -o remount,ro,bind /tmp 2>/dev/null || true) "
    '&& ip link set lo up && exec setpriv --no-new-privs --bounding-set=-all "$@"'
)
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
needs_namespaces = pytest.mark.skipif(
    not all(map(shutil.which, ("unshare", "nsenter", "setpriv", "ip")))
    or subprocess.run([*UNSHARE, "sh", "-c", SETUP, "sh", "true"], capture_output=True).returncode
    != 0,
    reason="this user can't make namespaces",
)

IPV6 = ["sh", "-c", "ip link set lo up && ip -6 address show dev lo | grep -q ::1"]
needs_ipv6 = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*UNSHARE, *IPV6], capture_output=True).returncode != 0,
    reason="this machine has no IPv6",
)


def ask(pid: int, path: str, data: bytes | None = None, at: str = "127.0.0.1:8000") -> int:
    """Send a request from the server's network namespace and return the status."""
    code = (
        "import sys, httpx; data = sys.stdin.buffer.read() or None; "
        "print(httpx.request('POST' if data else 'GET', 'http://' + sys.argv[1], content=data, "
        "headers={'Content-Type': 'image/png'}).status_code)"
    )
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", sys.executable, "-c", code, at + path],
        input=data or b"",
        capture_output=True,
    )
    return int(done.stdout or 0)


@contextlib.contextmanager
def sandboxed(store: Path, log: Path, host: str) -> Iterator[int]:
    """Run a service; give its process id outside the namespace, and end it by SIGTERM."""
    command = [sys.executable, "-m", "serve", "--store", str(store), "--host", host]
    with log.open("wb") as file:
        outer = subprocess.Popen(
            [*UNSHARE, "sh", "-c", SETUP, "sh", *command],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
        )
    try:
        end = time.monotonic() + 60
        while True:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            if children and ask(int(children[0]), "/health/ready") == 200:
                break
            assert outer.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
        yield int(children[0])
        os.kill(int(children[0]), signal.SIGTERM)
        assert outer.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            outer.kill()
        outer.wait()


@needs_namespaces
def test_pid_1_on_a_read_only_root_without_capabilities(tmp_path):
    tiny_bundle.publish(tmp_path / "store")
    with sandboxed(tmp_path / "store", tmp_path / "log", "127.0.0.1") as inner:
        assert (
            Path(f"/proc/{inner}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1]
            == "1"
        )
        assert ask(inner, "/predict", tiny_bundle.make_image("red")) == 200
        rows = [
            line.split()
            for kind in ("tcp", "tcp6")
            for line in Path(f"/proc/{inner}/net/{kind}").read_text().splitlines()[1:]
        ]
        assert {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"} == {
            8000,
            9090,
        }, "listening"
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    assert "telemetry" not in text


@needs_namespaces
def test_pid_1_handles_sigterm_during_imports(bundle_store, tmp_path):
    """The kernel drops signals that PID 1 has no handler for; imports take a second."""
    command = [sys.executable, "-m", "serve", "--store", str(bundle_store), "--host", "127.0.0.1"]
    with (tmp_path / "log").open("wb") as file:
        outer = subprocess.Popen(
            [*UNSHARE, "sh", "-c", SETUP, "sh", *command], cwd=ROOT, stdout=file, stderr=file
        )
    try:
        end = time.monotonic() + 60
        handled = False
        while not handled:
            assert time.monotonic() < end
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            if (
                children
                and b"serve" in Path(f"/proc/{children[0]}/cmdline").read_bytes().split(b"\0")[:4]
            ):
                assert "numpy" not in Path(f"/proc/{children[0]}/maps").read_text(), (
                    "a signal before the handler is set would be lost"
                )
                caught = (
                    Path(f"/proc/{children[0]}/status").read_text().split("SigCgt:")[1].split()[0]
                )
                handled = bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
        os.kill(int(children[0]), signal.SIGTERM)
        assert outer.wait(60) == 128 + signal.SIGTERM
    finally:
        outer.kill()
        outer.wait()


# The capability lets the user read the interpreter and the temporary directory, and write nothing.
OTHER_USER = [
    "setpriv",
    "--reuid",
    "12345",
    "--regid",
    "0",
    "--clear-groups",
    "--bounding-set=-all,+dac_read_search",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
]


@pytest.mark.skipif(
    os.getuid() != 0
    or shutil.which("setpriv") is None
    or subprocess.run([*OTHER_USER, "true"], capture_output=True).returncode != 0,
    reason="this user can't become another",
)
def test_runs_as_a_user_without_an_account(start):
    """OpenShift runs containers with any user id, group 0 and no home directory."""
    service = start(
        "--shadow-version",
        "1",
        env={"HOME": "/nonexistent"},
        command=[*OTHER_USER, sys.executable, "-m", "serve"],
    )
    for pid in [service.process.pid, *service.children()]:
        assert Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[:4] == ["12345"] * 4
    assert service.predict(tiny_bundle.make_image("red")).json()["predictions"][0]["label"] == "red"
    assert service.http.get("/samples/0").status_code == 200
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()


@needs_namespaces
@needs_ipv6
def test_both_ports_are_open_on_ipv4_and_ipv6(bundle_store, tmp_path):
    with sandboxed(bundle_store, tmp_path / "log", "::") as inner:
        assert ask(inner, "/predict", tiny_bundle.make_image("red"), at="[::1]:8000") == 200
        for host in ("127.0.0.1", "[::1]"):
            assert ask(inner, "/metrics", at=f"{host}:9090") == 200
