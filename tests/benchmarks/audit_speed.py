"""Seconds of each step of an audit of a data set, and images a second. No cache is used.

    python tests/benchmarks/audit_speed.py DATA [--root DIR] [--threads 2] [--keep]

Seconds of processor time are printed next to wall time, as other load on the machine hardly changes
them. --keep also writes the results into audit_speed.json in this folder.
"""

import argparse
import platform
import resource
import time
from dataclasses import dataclass
from typing import Any

import bare  # noqa: F401  (first: it puts the repository on the path)
import numpy as np
import torch
from results import write_result

from train.audit import collect_findings
from train.audit.duplicates import find_near_duplicates
from train.audit.labels import find_label_errors
from train.audit.page import render_page
from train.data import ImageData


@dataclass(frozen=True)
class Seconds:
    """Wall time, and processor time of this process and its workers."""

    wall: float
    cpu: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


def read_clocks() -> Seconds:
    cpu = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        cpu += usage.ru_utime + usage.ru_stime
    return Seconds(time.perf_counter(), cpu)


class Laps:
    """Seconds of each step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}
        self._lap_start = read_clocks()

    def restart(self) -> None:
        """Start a lap now."""
        self._lap_start = read_clocks()

    def end(self, name: str) -> None:
        """End a lap and start the next one."""
        now = read_clocks()
        self.seconds[name] = now - self._lap_start
        self._lap_start = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--root", help="directory of a torchvision data set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")

    started = read_clocks()
    laps = Laps()
    data = ImageData(options.data, root=options.root, cache="", workers=options.threads)
    data.setup()
    laps.end("find, read, digest, decode")
    findings = collect_findings(data)
    laps.end("all findings")
    render_page(findings, data)
    laps.end("page")
    total = read_clocks() - started

    # Two steps of `collect_findings`, by themselves.
    usable = data.decoded.metadata["problem"] == ""
    usable_rows = np.flatnonzero(usable)
    laps.restart()
    find_near_duplicates(data.decoded.pixels, usable, cpu)
    laps.end("of these, near duplicates")
    find_label_errors(data.decoded.pixels, data.dataset.labels, usable_rows, len(data.classes), cpu)
    laps.end("of these, suspicious labels")

    seconds = {"in total": total, **laps.seconds}
    images = len(usable)
    print_results(images, options.threads, seconds, findings)
    if options.keep:
        result = {
            "data": data.dataset.name,
            "images": images,
            "threads": options.threads,
            "seconds": round_seconds(seconds),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_result(__file__, result, ("data", "threads"))


def print_results(
    images: int, threads: int, seconds: dict[str, Seconds], findings: dict[str, Any]
) -> None:
    total = seconds["in total"]
    speed = images / total.wall
    print(f"{images} images, {threads} threads: {total.wall:.1f} s, {speed:.0f} images/s")
    for name, each in seconds.items():
        share = each.cpu / total.cpu
        print(f"  {name:28}{each.wall:7.1f} s  {each.cpu:7.1f} s of CPU  {share:5.2f} of all")
    print(
        f"leaked test images: {findings['leakage']['test']['count']}; "
        f"near duplicates: {findings['near_duplicates']['count']}; "
        f"accuracy of the label model: {findings['labels']['accuracy']:.3f}; "
        f"suspicious labels: {findings['labels']['count']}"
    )


def round_seconds(seconds: dict[str, Seconds]) -> dict[str, dict[str, float]]:
    rounded: dict[str, dict[str, float]] = {}
    for name, each in seconds.items():
        rounded[name] = {"wall": round(each.wall, 1), "cpu": round(each.cpu, 1)}
    return rounded


if __name__ == "__main__":
    main()
