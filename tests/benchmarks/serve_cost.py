"""What the service costs beside its answers: processor time a request, idle, memory, start, one client's latency.

    python tests/benchmarks/serve_cost.py [--seconds 4]

- api_us: CPU of the HTTP process a request, from /proc, with a network so small that it has most to do (32 clients).
- checks_cpu, checks_rate, checks_p99: CPU a request, requests a second and p99 of ResNet-18 int8 at 32 pixels, over the
  same of a service without metrics, drift, limits, request ids and checks (serve_unchecked.py), in turns.
- idle_cores: CPU of all processes over five idle seconds.
- one_client: requests a second of one client on ResNet-18 at 32 pixels, over those of one bare decode and run at a time
  with a session over all cores and onnxruntime's default options; the rounds alternate.
- ready_s: from the command to the first 200 of /health/ready, files in the page cache; the least of three starts.
- memory_mb: proportional set size of all processes, after load, with ResNet-18.
Prints JSON lines.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

from serve_models import picture, publish  # noqa: E402
from serve_speed import SCRIPT, Bare, children, cpu_seconds, free_port, load, service, serving  # noqa: E402

from models.bundle import read_manifest  # noqa: E402
from models.image import decode  # noqa: E402


def own_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def http_process(pid: int) -> int:
    return next(p for p in children(pid) if b"-m\0serve" in Path(f"/proc/{p}/cmdline").read_bytes())


def memory_mb(pid: int) -> float:
    total = 0
    for process in [pid, *children(pid)]:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
        total += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])
    return total / 1024


def script(store: Path) -> tuple[Path, bytes]:
    image, file, lua = picture(32, 32), store / "one.body", store / "one.lua"
    file.write_bytes(image)
    lua.write_text(SCRIPT % ("image/jpeg", file))
    return lua, image


def api_cost(store: Path, lua: Path, seconds: int) -> dict:
    publish(store, "tiny")
    port = free_port()
    with service(store, "tiny", port) as pid:
        load(port, pid, lua, 1)
        api, before = http_process(pid), None
        before = own_cpu(api)
        found = load(port, pid, lua, seconds)
        used = own_cpu(api) - before
        time.sleep(2)
        idle = cpu_seconds(pid)
        time.sleep(5)
        return {
            "api_us": round(1e6 * used / (found["rate"] * seconds), 1),
            "requests_s": found["rate"],
            "idle_cores": round((cpu_seconds(pid) - idle) / 5, 4),
        }


def resnet(store: Path, lua: Path, image: bytes, seconds: int) -> dict:
    port, variant = free_port(), "int8"
    bundle = publish(store, "small")
    file = bundle / read_manifest(bundle).variants[variant].file
    bare = Bare(file, image, True, 1, threads=0)
    with service(store, "small", port, "--variant", variant) as pid:
        busy = load(port, pid, lua, seconds)
        ratios = []
        for _ in range(3):
            alone = one_at_a_time(bare, image, 1.0)
            ratios.append(load(port, pid, lua, 2, clients=1)["rate"] / alone)
        memory = memory_mb(pid)
    return {
        "one_client": round(statistics.median(ratios), 3),
        "memory_mb": round(memory, 1),
        "cpu_us_a_request": round(1e6 * busy["cpu"], 1),
    }


def one_at_a_time(bare: Bare, image: bytes, seconds: float) -> float:
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        bare.session.run(["probabilities", "energy"], {"image": decode(image, bare.spec)[None]})
        done += 1
    return done / (time.perf_counter() - began)


def checks_share(store: Path, lua: Path, rounds: int, seconds: int) -> dict:
    """CPU of the service a request without all that can be left out, in turns with the whole service."""
    with ExitStack() as stack:
        pids = {}
        for kind, command in {
            "whole": ["-m", "serve"],
            "unchecked": [str(HERE / "serve_unchecked.py")],
        }.items():
            port = free_port()
            pids[kind] = (
                port,
                stack.enter_context(
                    serving(
                        [
                            *command,
                            "--store",
                            str(store),
                            "--model",
                            "small",
                            "--variant",
                            "int8",
                            "--host",
                            "127.0.0.1",
                            "--port",
                            str(port),
                            "--metrics-port",
                            str(free_port()),
                            "--log-level",
                            "error",
                        ],
                        port,
                        "/health/ready",
                    )
                ),
            )
            load(*pids[kind], lua, 1)
        orders = list(pids), list(pids)[::-1]  # who comes first in a round is a few per cent slower
        found = [
            {kind: load(*pids[kind], lua, seconds) for kind in orders[i % 2]} for i in range(rounds)
        ]
    return {
        f"checks_{key}": round(
            statistics.median(r["whole"][key] / r["unchecked"][key] for r in found), 4
        )
        for key in ("cpu", "rate", "p99")
    }


def ready_seconds(store: Path) -> float:
    found = []
    for _ in range(3):
        began = time.perf_counter()
        with service(store, "small", free_port()):
            found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--store", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        where = given.store or Path(place)
        where.mkdir(parents=True, exist_ok=True)
        lua_, image_ = script(where)
        print(json.dumps(api_cost(where, lua_, given.seconds)), flush=True)
        print(json.dumps(resnet(where, lua_, image_, given.seconds)), flush=True)
        print(json.dumps(checks_share(where, lua_, 5, given.seconds)), flush=True)
        print(json.dumps({"ready_s": round(ready_seconds(where), 2)}), flush=True)
