"""What trust costs: drift, reload and shadow beside the same service without them, and a swap of models under load.

    python tests/benchmarks/serve_trust.py [small-int8 tiny] [--rounds 5] [--seconds 3] [--modes on]

Servers run side by side, only one is loaded at a time (wrk, 32 clients), in turns. One JSON line a case: medians of the
rounds' ratios to the service with everything off, for throughput, p99 and CPU seconds a request. `swap_p99` is p99 of
rounds in which `latest` moves, against rounds of the same service in which it does not.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from serve_models import picture, publish
from serve_speed import SCRIPT, free_port, load, serving

from models.bundle import read_manifest, write_checksums
from models.store import Store

OFF = ["--drift-window", "0", "--reload-seconds", "0"]
MODES = {
    "off": OFF,
    "drift": ["--reload-seconds", "0"],
    "on": [],
    "shadow": ["--shadow-version", "1"],
}


def start(
    stack: ExitStack, store: Path, model: str, variant: str, flags: list[str]
) -> tuple[int, int]:
    port = free_port()
    command = [
        "-m",
        "serve",
        "--store",
        str(store),
        "--model",
        model,
        "--variant",
        variant,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--metrics-port",
        str(free_port()),
        "--log-level",
        "error",
        *flags,
    ]
    return port, stack.enter_context(serving(command, port, "/health/ready"))


def own(store: Path, made: Path | None, model: str) -> Path:
    """The bundle of a model in a store of our own, since it will be changed: a copy where it has been made before."""
    if made:
        publish(made, model)
        shutil.copytree(made / model, store / model, symlinks=True)
    return publish(store, model)


def case(name: str, made: Path | None, rounds: int, seconds: int, modes: list[str]) -> dict:
    model, _, variant = name.partition("-")
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        store, script = Path(place), Path(place) / "raw.lua"
        own(store, made, model)
        (store / "image.jpg").write_bytes(picture(32, 32))
        script.write_text(SCRIPT % ("image/jpeg", store / "image.jpg"))
        servers = {
            mode: start(stack, store, model, variant or "fp32", MODES[mode])
            for mode in ["off", *modes]
        }
        for server in servers.values():
            load(*server, script, 1)
        found = [
            {mode: load(*server, script, seconds) for mode, server in servers.items()}
            for _ in range(rounds)
        ]
        line = {"case": name, "off": round(statistics.median(r["off"]["rate"] for r in found), 1)}
        for mode in modes:
            line |= {
                f"{key}_{mode}": round(
                    statistics.median(r[mode][key] / r["off"][key] for r in found), 3
                )
                for key in ("rate", "p99", "cpu")
            }
    return line | {"swap_p99": swap(name, made, max(3, rounds // 2), seconds)}


def swap(name: str, made: Path | None, rounds: int, seconds: int) -> float:
    """p99 of rounds with a swap, to that of rounds without; wrk fails where an answer is not 2xx."""
    model, _, variant = name.partition("-")
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        store, script = Path(place), Path(place) / "raw.lua"
        first = own(store, made, model)
        with Store(store).stage(model) as staged:
            shutil.copytree(first, staged.path, dirs_exist_ok=True)
            manifest = read_manifest(first)
            manifest.version = staged.version
            manifest.write(staged.path)
            write_checksums(staged.path)
            staged.publish()
        (store / "image.jpg").write_bytes(picture(32, 32))
        script.write_text(SCRIPT % ("image/jpeg", store / "image.jpg"))
        port, pid = start(stack, store, model, variant or "fp32", ["--reload-seconds", "0.1"])
        load(port, pid, script, 1)
        ratios = []
        for i in range(rounds):
            quiet = load(port, pid, script, seconds)
            version = 1 + i % 2
            timer = threading.Timer(seconds / 4, Store(store).promote, (model, version))
            timer.start()
            ratios.append(load(port, pid, script, seconds)["p99"] / quiet["p99"])
            end = time.monotonic() + 30
            while json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/model"))[
                "version"
            ] != str(version):
                assert time.monotonic() < end, "not swapped"
                time.sleep(0.1)
    return round(statistics.median(ratios), 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["small-int8", "tiny"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument(
        "--modes", nargs="*", default=["drift", "on", "shadow"], choices=list(MODES)[1:]
    )
    parser.add_argument("--store", type=Path)
    given = parser.parse_args()
    for one in given.cases:
        print(
            json.dumps(case(one, given.store, given.rounds, given.seconds, given.modes)), flush=True
        )
