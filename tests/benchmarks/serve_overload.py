"""Goodput when ten times more is asked than can be done, and what a refusal costs.

    python tests/benchmarks/serve_overload.py [--case small|large] [--variant fp32] [--seconds 5]

Capacity is what 32 clients in a closed loop get (wrk; ResNet-18 at 32 or 224 pixels). Then hey offers ten times that
rate and a little more, from eight times as many connections as MAX_PENDING. `offered` is what came, in capacities: on
few cores the client of the fast case can't bring as much as it wants to, that of the large one can. 200 are counted by
the server's own metrics. Both clients share the cores with it, so figures are divided by what a client left of them:
`goodput = (200s a second / share left) / (capacity / share left)`; `goodput_raw` is without that. `refusal_cpu_us`
is the CPU of the HTTP process a refusal; `refusal_ms` their latency (p50, p99) while the worker is stopped and
all places are taken. One JSON line.
"""
import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from serve_cost import http_process, own_cpu, script  # noqa: E402
from serve_models import publish  # noqa: E402
from serve_speed import CORES, children, free_port, load, serving  # noqa: E402

PENDING = 64


def metric(port: int, start: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def flood(port: int, body: Path, rate: float, seconds: int, clients: int) -> tuple[float, float]:
    """Offer a rate with hey; returns the client's share of the cores, and the seconds it took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(["hey", "-z", f"{seconds}s", "-c", str(clients), "-q", f"{rate / clients:.2f}", "-m", "POST", "-T",
                    "image/jpeg", "-D", str(body), f"http://127.0.0.1:{port}/predict"], capture_output=True, check=True)
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return (now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime) / wall / CORES, wall


def refusal_latency(port: int, pid: int, body: Path, lua: Path) -> dict[str, float]:
    """Stop the worker, take all places, then ask one at a time."""
    worker = next(p for p in children(pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(worker, signal.SIGSTOP)
    try:
        held = subprocess.Popen(["hey", "-n", str(PENDING), "-c", str(PENDING), "-m", "POST", "-T", "image/jpeg", "-D",
                                 str(body), f"http://127.0.0.1:{port}/predict"], stdout=subprocess.DEVNULL)
        time.sleep(1)
        out = subprocess.run(["wrk", "-t1", "-c1", "-d2s", "--latency", "-s", lua, f"http://127.0.0.1:{port}/predict"],
                             capture_output=True, text=True, check=True).stdout
    finally:
        os.kill(worker, signal.SIGCONT)
    held.wait()
    assert "Non-2xx" in out, out
    return {percent: float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]
            for percent, number, unit in re.findall(r"(50|99)% +([\d.]+)(us|ms|s)", out)}


def main(store: Path, case: str, variant: str, seconds: int) -> dict:
    publish(store, case)
    lua, _ = script(store)
    port, metrics, body = free_port(), free_port(), store / "one.body"
    command = ["-m", "serve", "--store", str(store), "--model", case, "--variant", variant, "--port", str(port),
               "--host", "127.0.0.1", "--metrics-port", str(metrics), "--log-level", "error",
               "--max-pending", str(PENDING)]
    with serving(command, port, "/health/ready") as pid:
        load(port, pid, lua, 2)
        first = load(port, pid, lua, seconds)
        capacity, ok, no = first["rate"], 'imago_requests_total{code="200"}', 'imago_requests_total{code="429"}'
        api, before = http_process(pid), (metric(metrics, ok), metric(metrics, no))
        cpu = own_cpu(api)
        client, wall = flood(port, body, 12 * capacity, seconds, 8 * PENDING)  # those that wait offer nothing meanwhile
        good, refused = metric(metrics, ok) - before[0], metric(metrics, no) - before[1]
        cpu = own_cpu(api) - cpu
        latency = refusal_latency(port, pid, body, lua)
    return {"case": case, "variant": variant, "capacity": capacity,
            "offered": round((good + refused) / wall / capacity, 1),
            "goodput": round(good / wall / (1 - client) / (capacity / (1 - first["client"])), 3),
            "goodput_raw": round(good / wall / capacity, 3), "client_share": round(client, 3),
            "refusal_cpu_us": round(1e6 * cpu / (good + refused), 1), "refusal_ms": latency}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("small", "large"), default="small")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--variant", default="fp32")
    parser.add_argument("--store", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        where = given.store or Path(place)
        print(json.dumps(main(where, given.case, given.variant, given.seconds)))
