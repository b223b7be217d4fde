"""Seconds that looking at a data set takes, step by step, and images a second: nothing is taken from a cache.

Beside the time on the wall stand the seconds of CPU, which other work on the machine hardly changes.

    python tests/benchmarks/audit_speed.py DATA [--root DIR] [--threads 2] [--keep]

--keep writes them into audit_speed.json beside this script as well.
"""

import argparse
import platform
import resource
import time

import bare  # first: it puts the repository on the path
import numpy as np
import torch

from train.audit import duplicates, examine, labels, page
from train.data import ImageData


def clock() -> np.ndarray:
    """Seconds on the wall and of CPU, the worker processes' included."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in usage)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--root")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep", action="store_true", help="write the results beside this script, too"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = start = clock()
    spent = {}

    def lap(name: str) -> None:
        nonlocal start
        spent[name], start = clock() - start, clock()

    data = ImageData(options.data, root=options.root, cache="", workers=options.threads)
    data.setup()
    lap("find, read, digest, decode")
    findings = examine(data)
    lap("all findings")
    page.render(findings, data)
    lap("page")
    total = clock() - began
    usable = data.known.facts["problem"] == ""
    start = clock()
    duplicates.near(data.known.pixels, usable, torch.device("cpu"))
    lap("of these, near duplicates")
    index = np.flatnonzero(usable)
    labels.suspects(
        data.known.pixels, data.found.labels, index, len(data.classes), torch.device("cpu")
    )
    lap("of these, doubtful labels")
    count = len(usable)
    print(
        f"{count} images, {options.threads} threads: {total[0]:.1f} s, {count / total[0]:.0f} images/s"
    )
    for name, (wall, cpu) in {"in all": total, **spent}.items():
        print(f"  {name:28}{wall:7.1f} s  {cpu:7.1f} s of CPU  {cpu / total[1]:5.2f} of all")
    print(
        f"leaked test images: {findings['leakage']['test']['count']}; near duplicates: "
        f"{findings['near_duplicates']['count']}; first model: {findings['labels']['accuracy']:.3f} accurate, "
        f"{findings['labels']['count']} doubtful labels"
    )
    if options.keep:
        seconds = {
            name: {"wall": round(wall, 1), "cpu": round(cpu, 1)}
            for name, (wall, cpu) in {"in all": total, **spent}.items()
        }
        bare.keep(
            __file__,
            {
                "data": data.found.name,
                "images": count,
                "threads": options.threads,
                "seconds": seconds,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            ("data", "threads"),
        )


if __name__ == "__main__":
    main()
