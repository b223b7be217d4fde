"""Seconds that the audit of a data set takes, step by step, and images a second; nothing is cached.

CPU seconds are listed besides wall-clock seconds: other work on the machine hardly changes them.

    python tests/benchmarks/audit_speed.py DATA [--root DIR] [--threads 2] [--keep]

--keep writes the results to audit_speed.json in this directory as well.
"""

import argparse
import platform
import resource
import time

import bare  # first: it puts the repository on the path
import numpy as np
import torch

from train.audit import collect_findings
from train.audit.duplicates import find_near_duplicates
from train.audit.labels import find_label_errors
from train.audit.page import render_page
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
    findings = collect_findings(data)
    lap("all findings")
    render_page(findings, data)
    lap("page")
    total = clock() - began
    usable = data.decoded.metadata["problem"] == ""
    start = clock()
    find_near_duplicates(data.decoded.pixels, usable, torch.device("cpu"))
    lap("of these, near duplicates")
    index = np.flatnonzero(usable)
    find_label_errors(
        data.decoded.pixels, data.dataset.labels, index, len(data.classes), torch.device("cpu")
    )
    lap("of these, suspicious labels")
    count = len(usable)
    print(
        f"{count} images, {options.threads} threads: {total[0]:.1f} s, "
        f"{count / total[0]:.0f} images/s"
    )
    for name, (wall, cpu) in {"in all": total, **spent}.items():
        print(f"  {name:28}{wall:7.1f} s  {cpu:7.1f} s of CPU  {cpu / total[1]:5.2f} of all")
    print(
        f"leaked test images: {findings['leakage']['test']['count']}; near duplicates: "
        f"{findings['near_duplicates']['count']}; label model: "
        f"{findings['labels']['accuracy']:.3f} accurate, "
        f"{findings['labels']['count']} suspicious labels"
    )
    if options.keep:
        seconds = {
            name: {"wall": round(wall, 1), "cpu": round(cpu, 1)}
            for name, (wall, cpu) in {"in all": total, **spent}.items()
        }
        bare.keep(
            __file__,
            {
                "data": data.dataset.name,
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
