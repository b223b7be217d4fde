"""The service against the best that onnxruntime does on the same cores, and against other ways to serve.

    python tests/benchmarks/serve_speed.py [small-int8 small-fp32 large-fp32 large-int8 tiny] [--rounds 3] [--seconds 3]

The client (wrk) shares the cores with the server. So the limit is measured bare and alone, one thread and one session
of one thread a core, on its best batch, and then multiplied by the share of the cores that the client left in the round
it is compared with: `limit * (1 - client's CPU seconds / (cores * seconds))`. For photos (large) each bare thread also
decodes what it runs. Rounds alternate bare, service and rivals, and medians of the rounds' ratios are printed, one JSON
line a case: `of_limit`, the same by CPU seconds an image (`of_limit_cpu`, which another load on the machine disturbs
less), and throughput and p99 against LitServe as it comes and plain FastAPI with onnxruntime.
"""

import argparse
import base64
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
from serve_models import picture, publish  # noqa: E402

from models.bundle import read_manifest  # noqa: E402
from models.image import decode  # noqa: E402

CORES = len(os.sched_getaffinity(0))
SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "%s"
local file = io.open("%s", "rb")
wrk.body = file:read("*a")
file:close()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_seconds(root: int) -> float:
    """User and system time of a process and its children that live."""
    total = 0.0
    for pid in [root, *children(root)]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def children(pid: int) -> list[int]:
    found = [
        int(p)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for p in file.read_text().split()
    ]
    return found + [grandchild for child in found for grandchild in children(child)]


class Bare:
    """onnxruntime alone: one thread a core, each with the one-thread session on its own batch."""

    def __init__(self, path: Path, image: bytes, decodes: bool, batch: int, threads: int = 1):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.spec, self.image, self.decodes, self.batch = (
            read_manifest(path.parent).input,
            image,
            decodes,
            batch,
        )
        self.images = np.stack([decode(image, self.spec)] * batch)

    def rate(self, seconds: float) -> tuple[float, float]:
        """Images a second, and CPU seconds an image."""
        done, end = [0] * CORES, time.perf_counter() + seconds

        def work(i: int) -> None:
            while time.perf_counter() < end:
                images = (
                    np.stack([decode(self.image, self.spec) for _ in range(self.batch)])
                    if self.decodes
                    else self.images
                )
                self.session.run(["probabilities", "energy"], {"image": images})
                done[i] += self.batch

        began, used = time.perf_counter(), time.process_time()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(CORES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - began), (time.process_time() - used) / sum(done)


@contextmanager
def serving(command: list[str], port: int, health: str):
    """A server process that answers `health`; yields its pid."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=HERE.parents[1], stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=5)
                break
            except OSError:
                assert time.monotonic() < end, f"{command} did not start"
                time.sleep(0.02)
        yield process.pid
    finally:
        pids = [process.pid, *children(process.pid)]  # LitServe's children outlive SIGTERM
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def halt(pid: int, number: int = signal.SIGSTOP) -> None:
    """Stop a server's processes (or with SIGCONT let them go on): an idle LitServe wakes a thousand times a second."""
    for process in [pid, *children(pid)]:
        os.kill(process, number)


@contextmanager
def awake(pid: int):
    """Only this server runs meanwhile; a moment later it has seen to what it missed."""
    halt(pid, signal.SIGCONT)
    time.sleep(1)
    yield
    halt(pid)


def service(store: Path, model: str, port: int, *flags: str):
    """Our own server, ready; yields its pid."""
    return serving(
        [
            "-m",
            "serve",
            "--store",
            str(store),
            "--model",
            model,
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--metrics-port",
            str(free_port()),
            "--log-level",
            "error",
            *flags,
        ],
        port,
        "/health/ready",
    )


def load(port: int, pid: int, script: Path, seconds: float, clients: int = 32) -> dict:
    """Requests a second, p50 and p99 [ms], the client's share of the cores, and the server's CPU seconds a request."""
    before, used = cpu_seconds(pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds}s",
        "--latency",
        "--timeout",
        "10s",
        "-s",
        script,
        f"http://127.0.0.1:{port}/predict",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    client = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    assert "Non-2xx" not in out, out
    count = int(re.search(r"(\d+) requests in", out)[1])
    times = {
        percent: float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]
        for percent, number, unit in re.findall(r"(\d+)% +([\d.]+)(us|ms|s)", out)
    }
    return {
        "rate": float(re.search(r"Requests/sec: +([\d.]+)", out)[1]),
        "p50": times["50"],
        "p99": times["99"],
        "client": client / wall / CORES,
        "cpu": (cpu_seconds(pid) - before) / max(count, 1),
    }


def case(store: Path, name: str, rounds: int, seconds: float, rivals: list[str]) -> dict:
    model, _, variant = name.partition("-")
    variant = variant or "fp32"
    bundle = publish(store, model)
    manifest = read_manifest(bundle)
    file, photo = bundle / manifest.variants[variant].file, model == "large"
    image = picture(375, 500) if photo else picture(32, 32)
    text = json.dumps({"image": base64.b64encode(image).decode()})
    bodies = {"image/jpeg": image, "application/json": text.encode()}
    scripts = {}
    for kind, content in bodies.items():
        scripts[kind], file_ = store / f"{kind[-4:]}.lua", store / f"{kind[-4:]}.body"
        file_.write_bytes(content)
        scripts[kind].write_text(SCRIPT % (kind, file_))
    bares = [Bare(file, image, photo, batch) for batch in ((4, 8, 16) if photo else (8, 16))]
    best = max(bares, key=lambda b: b.rate(1.0)[0])
    with ExitStack() as stack:
        servers = {}
        for kind in ["service", *rivals]:
            port = free_port()
            if kind == "service":
                flags = (
                    "--variant",
                    variant,
                    "--worker-timeout-seconds",
                    "600",
                )  # to be halted is no hang
                pid = stack.enter_context(service(store, model, port, *flags))
            else:
                command = [
                    str(HERE / "serve_rivals.py"),
                    kind,
                    str(file),
                    str(port),
                    str(bundle / "manifest.json"),
                ]
                pid = stack.enter_context(serving(command, port, "/health"))
            script = scripts["application/json" if kind == "litserve" else "image/jpeg"]
            servers[kind] = (port, pid, script)
            load(*servers[kind], 1)
            halt(pid)
        found = []
        for _ in range(rounds):
            limit, cost = best.rate(seconds)
            found.append({"limit": limit, "limit_cpu": cost})
            for kind, server in servers.items():
                with awake(server[1]):
                    found[-1][kind] = load(*server, seconds)
    return report(name, best.batch, found, rivals)


def report(name: str, batch: int, rounds: list[dict], rivals: list[str]) -> dict:
    def middle(value) -> float:
        return round(statistics.median(value(r) for r in rounds), 3)

    line = {
        "case": name,
        "cores": CORES,
        "bare_batch": batch,
        "bare": middle(lambda r: r["limit"]),
        "service": middle(lambda r: r["service"]["rate"]),
        "client_share": middle(lambda r: r["service"]["client"]),
        "of_limit": middle(
            lambda r: r["service"]["rate"] / (r["limit"] * (1 - r["service"]["client"]))
        ),
        "of_limit_raw": middle(lambda r: r["service"]["rate"] / r["limit"]),
        "of_limit_cpu": middle(lambda r: r["limit_cpu"] / r["service"]["cpu"]),
        "p99_ms": middle(lambda r: r["service"]["p99"]),
    }
    for rival in rivals:
        line[f"times_{rival}"] = middle(lambda r, k=rival: r["service"]["rate"] / r[k]["rate"])
        line[f"p99_of_{rival}"] = middle(lambda r, k=rival: r["service"]["p99"] / r[k]["p99"])
    return line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", default=["small-int8", "small-fp32", "large-fp32", "tiny"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rivals", nargs="*", default=["litserve", "fastapi"])
    parser.add_argument("--store", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for one in given.cases:
            line = case(given.store or Path(place), one, given.rounds, given.seconds, given.rivals)
            print(json.dumps(line), flush=True)
