"""Measure what drift, reload and shadow cost, and a swap of models under load.

    python tests/benchmarks/serve_trust.py [small-int8 tiny] [--rounds 5] [--seconds 3] [--modes on]

Servers run at the same time, but only one is loaded at a time (wrk, 32 clients), in turns. One JSON
line a case: medians of the rounds' ratios to the service with everything off, for throughput, p99
and CPU seconds per request. `swap_p99` is the p99 of rounds in which `latest` moves, divided by
that of rounds in which it does not. --keep also
writes the lines into serve_trust.json in this folder.
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

from results import write_result
from serve_models import make_jpeg, publish
from serving import LoadResult, measure_load, running_service, write_wrk_script

from models.bundle import read_manifest, write_checksums
from models.store import Store

MODES = {
    "off": ("--drift-window", "0", "--reload-seconds", "0"),
    "drift": ("--reload-seconds", "0"),
    "on": (),
    "shadow": ("--shadow-version", "1"),
}
FIGURES = ("rate", "p99", "cpu")
FAST_RELOAD = ("--reload-seconds", "0.1")
SWAP_TIMEOUT_SECONDS = 30


def publish_copy(store: Path, prepared: Path | None, model: str) -> Path:
    """The bundle of a model in a store that may be changed, copied from `prepared` where given."""
    if prepared:
        publish(prepared, model)
        shutil.copytree(prepared / model, store / model, symlinks=True)
    return publish(store, model)


def measure_case(
    name: str, prepared: Path | None, rounds: int, seconds: int, modes: list[str]
) -> dict:
    model, _, variant = name.partition("-")
    variant = variant or "fp32"
    measured: list[dict[str, LoadResult]] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        store = Path(directory)
        publish_copy(store, prepared, model)
        script = write_wrk_script(store, make_jpeg(32, 32))
        servers = {}
        for mode in ["off", *modes]:
            service = running_service(store, model, "--variant", variant, *MODES[mode])
            servers[mode] = stack.enter_context(service)
            measure_load(servers[mode], script, 1)

        for _ in range(rounds):
            loads = {
                mode: measure_load(server, script, seconds) for mode, server in servers.items()
            }
            measured.append(loads)

    line = {"case": name, "off": round(statistics.median(r["off"].rate for r in measured), 1)}
    for mode in modes:
        for figure in FIGURES:
            ratios = [getattr(r[mode], figure) / getattr(r["off"], figure) for r in measured]
            line[f"{figure}_{mode}"] = round(statistics.median(ratios), 3)
    swap_rounds = max(3, rounds // 2)
    line["swap_p99"] = measure_swap(model, variant, prepared, swap_rounds, seconds)
    return line


def measure_swap(
    model: str, variant: str, prepared: Path | None, rounds: int, seconds: int
) -> float:
    """p99 of rounds with a swap, divided by that of rounds without; every response must be 2xx."""
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        store = Path(directory)
        publish_second_version(store, publish_copy(store, prepared, model), model)
        script = write_wrk_script(store, make_jpeg(32, 32))
        service = running_service(store, model, "--variant", variant, *FAST_RELOAD)
        server = stack.enter_context(service)
        measure_load(server, script, 1)

        for number in range(rounds):
            without = measure_load(server, script, seconds)
            version = 1 + number % 2
            promotion = threading.Timer(seconds / 4, Store(store).promote, (model, version))
            promotion.start()
            with_swap = measure_load(server, script, seconds)
            ratios.append(with_swap.p99 / without.p99)
            wait_for_version(server.port, str(version))
    return round(statistics.median(ratios), 3)


def publish_second_version(store: Path, first: Path, model: str) -> None:
    """Publish a copy of the first version as the second."""
    with Store(store).stage(model) as staged:
        shutil.copytree(first, staged.path, dirs_exist_ok=True)
        manifest = read_manifest(first)
        manifest.version = staged.version
        manifest.write(staged.path)
        write_checksums(staged.path)
        staged.publish()


def wait_for_version(port: int, version: str) -> None:
    deadline = time.monotonic() + SWAP_TIMEOUT_SECONDS
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/model") as response:
            if json.load(response)["version"] == version:
                return
        assert time.monotonic() < deadline, f"version {version} is not served"
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["small-int8", "tiny"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument(
        "--modes", nargs="*", default=["drift", "on", "shadow"], choices=list(MODES)[1:]
    )
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    parser.add_argument("--store", type=Path, help="keeps the bundles for the next run")
    options = parser.parse_args()

    for case in options.cases:
        line = measure_case(case, options.store, options.rounds, options.seconds, options.modes)
        print(json.dumps(line), flush=True)
        if options.keep:
            write_result(__file__, line, ("case",))


if __name__ == "__main__":
    main()
