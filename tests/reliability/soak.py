"""Load the service for a long time and check that it answers and that nothing grows.

    python tests/reliability/soak.py [--minutes 30] [--share 0.8] [--hostile 0.02] [--clients 16]
        [--store DIR --model NAME] [--seed 0] [--out FILE]

Starts the service, by default with a bundle of a few nodes, measures the rate that CLIENTS in a
closed loop get, and then sends SHARE of this rate in an open loop: images of every format and of
several sizes, and HOSTILE of them damaged files with valid framing. The first quarter of the time
is the warm-up.

Violations: a status of 500 or above, a request without an answer, memory that grows by more than
2 % after the warm-up, descriptors or threads that grow, a process that was replaced. The clients
share the machine with the service, so the rate is no measure of its speed.

Prints the report as JSON, which FILE keeps. Exit status 1 where there are violations.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import project_path  # noqa: F401  makes the imports below possible
from processes import Usage, read_usage
from reports import describe_run, print_report

from support import tiny_bundle
from support.image_mutations import FORMATS, mutate_image, write_seed_images
from support.load_generator import LoadGenerator
from support.server import Server

SIZES = (32, 200, 640)  # pixels a side
SUFFIXES = (".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif", ".avif")
CAPACITY_SECONDS = 5
SAMPLES = 200  # of memory, at most
MIN_SAMPLE_SECONDS = 0.5
WARM_UP_SHARE = 0.25
MAX_MEMORY_GROWTH = 0.02
MAX_DESCRIPTOR_GROWTH = 8  # connections that are opened and closed at the moment of a sample
HOSTILE_FILES = 2000


class ImageMix:
    """Images of all formats and sizes, some of them damaged; clients draw from it at random."""

    def __init__(self, hostile_share: float, seed: int) -> None:
        self.rng = random.Random(seed)
        self.hostile_share = hostile_share
        self.valid = self._encode_valid(seed)
        seeds = write_seed_images()
        formats = list(FORMATS)
        self.hostile: list[bytes] = []
        for _ in range(HOSTILE_FILES):
            file_format = self.rng.choice(formats)
            # An empty body is no image at all: it gets 400, not an answer of the decoder.
            self.hostile.append(mutate_image(file_format, seeds[file_format], self.rng) or b"\0")

    @staticmethod
    def _encode_valid(seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        images: list[bytes] = []
        for size in SIZES:
            noise = rng.integers(0, 256, (size, size, 3), np.uint8)
            smooth = cv2.GaussianBlur(noise, (0, 0), 3)
            images += [cv2.imencode(suffix, smooth)[1].tobytes() for suffix in SUFFIXES]
        return images

    def choose(self) -> bytes:
        if self.rng.random() < self.hostile_share:
            return self.rng.choice(self.hostile)
        return self.rng.choice(self.valid)


def measure_capacity(server: Server, mix: ImageMix, clients: int) -> float:
    """Return the requests a second that clients in a closed loop get."""
    with LoadGenerator(server.port, mix.choose, clients) as load:
        time.sleep(CAPACITY_SECONDS)
    return load.statuses.total() / CAPACITY_SECONDS


def sample_usage(server: Server, seconds: float) -> list[Usage]:
    interval = max(MIN_SAMPLE_SECONDS, seconds / SAMPLES)
    end = time.monotonic() + seconds
    samples: list[Usage] = []
    while time.monotonic() < end:
        time.sleep(interval)
        samples.append(read_usage(server))
    return samples


def compare_usage(samples: list[Usage]) -> dict[str, Any]:
    """Compare the first quarter after the warm-up with the last quarter."""
    steady = samples[int(len(samples) * WARM_UP_SHARE) :]
    part = max(1, len(steady) // 3)
    first = steady[:part]
    last = steady[-part:]
    memory_before = statistics.median(usage.memory_mb for usage in first)
    memory_after = statistics.median(usage.memory_mb for usage in last)
    return {
        "memory_mb": [round(memory_before, 1), round(memory_after, 1)],
        "memory_growth": round(memory_after / memory_before - 1, 4),
        "descriptors": [_median_of(first, "descriptors"), _median_of(last, "descriptors")],
        "threads": [_median_of(first, "threads"), _median_of(last, "threads")],
    }


def _median_of(samples: list[Usage], name: str) -> int:
    return int(statistics.median(getattr(usage, name) for usage in samples))


def find_violations(report: dict[str, Any]) -> list[str]:
    violations: list[str] = []
    for status, count in report["statuses"].items():
        if int(status) >= 500:
            violations.append(f"{count} answers with status {status}")
    if report["unanswered"] or report["refused_connections"]:
        violations.append("requests without an answer")
    if report["memory_growth"] > MAX_MEMORY_GROWTH:
        violations.append(f"memory grew by {report['memory_growth']:.1%}")
    before, after = report["descriptors"]
    if after > before + MAX_DESCRIPTOR_GROWTH:
        violations.append(f"descriptors grew from {before} to {after}")
    before, after = report["threads"]
    if after > before:
        violations.append(f"threads grew from {before} to {after}")
    if report["replaced_processes"]:
        violations.append(f"{report['replaced_processes']} processes were replaced")
    return violations


def run_soak(options: argparse.Namespace, store: Path, log: Path) -> dict[str, Any]:
    mix = ImageMix(options.hostile, options.seed)
    flags = ("--model", options.model) if options.model else ()
    with Server(store, log, *flags) as server:
        server.wait_ready()
        processes = set(server.children())
        capacity = measure_capacity(server, mix, options.clients)
        rate = options.share * capacity
        seconds = 60 * options.minutes
        with LoadGenerator(server.port, mix.choose, options.clients, rate=rate) as load:
            samples = sample_usage(server, seconds)
        replaced = len(processes - set(server.children()))

    report: dict[str, Any] = {
        **describe_run(),
        "minutes": options.minutes,
        "seed": options.seed,
        "hostile_share": options.hostile,
        "capacity_per_second": round(capacity, 1),
        "rate_per_second": round(rate, 1),
        "requests": load.statuses.total() + len(load.unanswered),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "unanswered": len(load.unanswered),
        "refused_connections": load.refused_connections,
        "latency_ms": {str(q): round(1000 * load.latency(q), 1) for q in (0.5, 0.99)},
        **compare_usage(samples),
        "replaced_processes": replaced,
    }
    return report | {"violations": find_violations(report)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--share", type=float, default=0.8, help="of the measured capacity")
    parser.add_argument("--hostile", type=float, default=0.02, help="share of damaged images")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--store", type=Path, help="a store with a real model")
    parser.add_argument("--model", help="its name, where the store has several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the report")
    options = parser.parse_args(arguments)

    with TemporaryDirectory() as directory:
        store = options.store
        if store is None:
            store = Path(directory) / "store"
            tiny_bundle.publish(store)
        report = run_soak(options, store, Path(directory) / "log")
    return print_report(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
