"""Strict containers: PID 1, read-only root, no capabilities, a separate network namespace."""

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
LISTEN = "0A"  # a state of a socket in /proc/net/tcp
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
IPV6 = ["sh", "-c", "ip link set lo up && ip -6 address show dev lo | grep -q ::1"]

# Sends the bytes on stdin to the URL in the first argument, and prints the status of the response.
CLIENT = """
import sys, httpx
data = sys.stdin.buffer.read()
method = "POST" if data else "GET"
headers = {"Content-Type": "image/png"}
print(httpx.request(method, sys.argv[1], content=data, headers=headers).status_code)
"""


def succeeds(command: list[str]) -> bool:
    """Whether the command exists and exits with status 0."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not all(map(shutil.which, ("nsenter", "setpriv", "ip")))
    or not succeeds([*UNSHARE, "sh", "-c", SETUP, "sh", "true"]),
    reason="this user can't make namespaces",
)
needs_ipv6 = pytest.mark.skipif(not succeeds([*UNSHARE, *IPV6]), reason="this machine has no IPv6")


def request_status(pid: int, path: str, data: bytes = b"", address: str = "127.0.0.1:8000") -> int:
    """Send a request from the network namespace of a process. Return the status, 0 if it fails."""
    result = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", sys.executable, "-c", CLIENT, f"http://{address}{path}"],
        input=data,
        capture_output=True,
    )
    return int(result.stdout or 0)


def find_child(pid: int) -> int | None:
    """Return the first child of a process, which is PID 1 in its namespace, if it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def read_status(pid: int, field: str) -> list[str]:
    """Return the values of a line of /proc/<pid>/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return text.split(f"{field}:")[1].split("\n")[0].split()


def read_listening_ports(pid: int) -> set[int]:
    """Return the TCP ports that are open in the network namespace of a process."""
    ports: set[int] = set()
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            _, address, _, state, *_ = line.split()
            if state == LISTEN:
                ports.add(int(address.rpartition(":")[2], 16))
    return ports


def handles_sigterm(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    caught = int(read_status(pid, "SigCgt")[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@contextlib.contextmanager
def sandboxed(store: Path, log: Path, host: str) -> Iterator[int]:
    """Run a service, yield its process id outside the namespace, and end it by SIGTERM."""
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
        end = time.monotonic() + 240
        while True:
            inner = find_child(outer.pid)
            if inner is not None and request_status(inner, "/health/ready") == 200:
                break
            assert outer.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
        yield inner
        os.kill(inner, signal.SIGTERM)
        assert outer.wait(240) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            outer.kill()
        outer.wait()


@needs_namespaces
def test_pid_1_on_a_read_only_root_without_capabilities(tmp_path):
    tiny_bundle.publish(tmp_path / "store")
    with sandboxed(tmp_path / "store", tmp_path / "log", "127.0.0.1") as inner:
        assert read_status(inner, "NSpid")[-1] == "1"
        assert request_status(inner, "/predict", tiny_bundle.make_image("red")) == 200
        assert read_listening_ports(inner) == {8000, 9090}
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
        end = time.monotonic() + 240
        while True:
            assert time.monotonic() < end
            inner = find_child(outer.pid)
            if inner is None:
                continue
            command_line = Path(f"/proc/{inner}/cmdline").read_bytes().split(b"\0")
            if b"serve" not in command_line[:4]:
                continue  # still the setup of the namespace
            # A signal that arrives before the handler is set would be lost.
            has_imported = "numpy" in Path(f"/proc/{inner}/maps").read_text()
            has_handler = handles_sigterm(inner)
            assert has_handler or not has_imported
            if has_handler:
                break
        os.kill(inner, signal.SIGTERM)
        # On a busy machine it may serve already.
        assert outer.wait(240) in (0, 128 + signal.SIGTERM)
    finally:
        outer.kill()
        outer.wait()


# The capability lets the user read the interpreter and the temporary directory, and write nothing.
OTHER_USER = [
    "setpriv",
    *("--reuid", "12345"),
    *("--regid", "0"),
    "--clear-groups",
    "--bounding-set=-all,+dac_read_search",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
]


@pytest.mark.slow
@pytest.mark.skipif(
    os.getuid() != 0 or not succeeds([*OTHER_USER, "true"]),
    reason="this user can't become another",
)
def test_the_service_runs_as_a_user_without_an_account(start):
    """OpenShift runs containers with any user id, group 0 and no home directory."""
    command = [*OTHER_USER, sys.executable, "-m", "serve"]
    server = start("--shadow-version", "1", env={"HOME": "/nonexistent"}, command=command)
    for pid in [server.process.pid, *server.children()]:
        assert read_status(pid, "Uid") == ["12345"] * 4
    (prediction,) = server.predict(tiny_bundle.make_image("red")).json()["predictions"]
    assert prediction["label"] == "red"
    assert server.http.get("/samples/0").status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@needs_namespaces
@needs_ipv6
def test_both_ports_are_open_on_ipv4_and_ipv6(bundle_store, tmp_path):
    with sandboxed(bundle_store, tmp_path / "log", "::") as inner:
        image = tiny_bundle.make_image("red")
        assert request_status(inner, "/predict", image, address="[::1]:8000") == 200
        for host in ("127.0.0.1", "[::1]"):
            assert request_status(inner, "/metrics", address=f"{host}:9090") == 200
