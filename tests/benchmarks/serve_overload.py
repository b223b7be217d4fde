"""Goodput when ten times more is asked than can be done, and what a refusal costs.

    python tests/benchmarks/serve_overload.py [--case small|large] [--variant fp32] [--seconds 5] [--rounds 3]

Capacity is what 32 clients in a closed loop get (wrk; ResNet-18 at 32 or 224 pixels). Then hey offers ten times that
rate and a little more, from eight times as many connections as MAX_PENDING. `offered` is what came, in capacities: on
few cores the client of the fast case can't bring as much as it wants to, that of the large one can. Answers are counted
by the server's own metrics, over `--seconds` in the middle of a load: when a client begins nothing is done yet, and
what is under way when it hangs up is lost. Both clients share the cores with the server, so figures are divided by what
a client left of them: `goodput = (200s a second / share left) / (capacity / share left)`; `goodput_raw` is without it.
Capacity is taken before and after each flood, and a flood is compared with the mean of the two; figures are medians of
the rounds. `refusal_cpu_us` is the CPU of the HTTP process a request of the flood; `refusal_ms` the latency of refusals
(p50, p99) while the worker is stopped and all places are taken. One JSON line.
"""

import argparse
import json
import os
import re
import signal
import statistics
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
EDGE = 3  # seconds


def metric(port: int, start: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def steady(client: list, metrics: int, pid: int, seconds: int) -> dict[str, float]:
    """Answers and refusals a second in the middle of a load, the client's share of the cores, and the HTTP process's
    CPU seconds a second."""
    api = http_process(pid)
    process = subprocess.Popen(client, stdout=subprocess.DEVNULL)
    try:
        time.sleep(EDGE)
        before = read(metrics, process.pid, api)
        time.sleep(seconds)
        used = [now - was for now, was in zip(read(metrics, process.pid, api), before, strict=True)]
    finally:
        process.kill()
        process.wait()
    good, refused, client_cpu, api_cpu, wall = used
    return {
        "good": good / wall,
        "asked": (good + refused) / wall,
        "client": client_cpu / wall / CORES,
        "api": api_cpu / wall,
    }


def read(metrics: int, client: int, api: int) -> list[float]:
    good, refused = (
        metric(metrics, f'imago_requests_total{{code="{code}"}}') for code in (200, 429)
    )
    return [good, refused, own_cpu(client), own_cpu(api), time.perf_counter()]


def refusal_latency(port: int, pid: int, body: Path, lua: Path) -> dict[str, float]:
    """Stop the worker, take all places, then ask one at a time."""
    worker = next(
        p for p in children(pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()
    )
    os.kill(worker, signal.SIGSTOP)
    try:
        held = subprocess.Popen(
            [
                "hey",
                "-n",
                str(PENDING),
                "-c",
                str(PENDING),
                "-m",
                "POST",
                "-T",
                "image/jpeg",
                "-D",
                str(body),
                f"http://127.0.0.1:{port}/predict",
            ],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(1)
        out = subprocess.run(
            [
                "wrk",
                "-t1",
                "-c1",
                "-d2s",
                "--latency",
                "-s",
                lua,
                f"http://127.0.0.1:{port}/predict",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    finally:
        os.kill(worker, signal.SIGCONT)
    held.wait()
    assert "Non-2xx" in out, out
    return {
        percent: float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]
        for percent, number, unit in re.findall(r"(50|99)% +([\d.]+)(us|ms|s)", out)
    }


def main(store: Path, case: str, variant: str, seconds: int, rounds: int) -> dict:
    publish(store, case)
    lua, _ = script(store)
    port, metrics, body = free_port(), free_port(), store / "one.body"
    command = [
        "-m",
        "serve",
        "--store",
        str(store),
        "--model",
        case,
        "--variant",
        variant,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--metrics-port",
        str(metrics),
        "--log-level",
        "error",
        "--max-pending",
        str(PENDING),
    ]
    url, whole = f"http://127.0.0.1:{port}/predict", seconds + 2 * EDGE
    closed = ["wrk", "-t1", "-c32", f"-d{whole}s", "-s", lua, url]
    found: list[dict[str, float]] = []
    with serving(command, port, "/health/ready") as pid:
        load(port, pid, lua, 2)
        before = steady(closed, metrics, pid, seconds)
        for _ in range(rounds):
            rate = (
                14 * before["good"] / (8 * PENDING)
            )  # of each client; those that wait offer nothing meanwhile
            flood = steady(
                [
                    "hey",
                    "-z",
                    f"{whole}s",
                    "-c",
                    str(8 * PENDING),
                    "-q",
                    f"{rate:.3f}",
                    "-m",
                    "POST",
                    "-T",
                    "image/jpeg",
                    "-D",
                    str(body),
                    url,
                ],
                metrics,
                pid,
                seconds,
            )
            after = steady(closed, metrics, pid, seconds)
            raw = (before["good"] + after["good"]) / 2
            left = sum(calm["good"] / (1 - calm["client"]) for calm in (before, after)) / 2
            found.append(
                {
                    "capacity": raw,
                    "offered": flood["asked"] / raw,
                    "goodput": flood["good"] / (1 - flood["client"]) / left,
                    "goodput_raw": flood["good"] / raw,
                    "client_share": flood["client"],
                    "refusal_cpu_us": 1e6 * flood["api"] / flood["asked"],
                }
            )
            before = after
        latency = refusal_latency(port, pid, body, lua)
    return {
        "case": case,
        "variant": variant,
        "rounds": rounds,
        **{key: round(statistics.median(r[key] for r in found), 3) for key in found[0]},
        "refusal_ms": latency,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("small", "large"), default="small")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", default="fp32")
    parser.add_argument("--store", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        where = given.store or Path(place)
        print(json.dumps(main(where, given.case, given.variant, given.seconds, given.rounds)))
