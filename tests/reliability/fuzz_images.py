"""Fuzz the image decoder with structure-aware mutations of every format.

    python tests/reliability/fuzz_images.py [--minutes 10] [--formats png gif] [--seed 0]
        [--processes 2] [--findings DIR] [--out FILE]

Child processes decode mutated files through `models.image.decode`, as a worker of the service does.
A finding is an image that ends the process, raises anything but an ImageError, takes more than 5
CPU seconds or more memory than its allowed size needs, or makes a library write to stderr. Its file
is kept in DIR, named after the format and the cause.

Prints the report as JSON, which FILE keeps: images and statuses by format, the slowest image, the
findings. Exit status 1 where there are findings.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import project_path  # noqa: F401  makes the imports below possible
from reports import describe_run, print_report

from models.image import ImageError, InputSpec, decode
from support.image_mutations import FORMATS, mutate_image, write_seed_images

SPEC = InputSpec(height=32, width=32)
MAX_PIXELS = 1_000_000
CPU_SECONDS_PER_IMAGE = 5
MEMORY_PER_IMAGE_MB = 64
ADDRESS_SPACE_BYTES = 4 << 30
SAVE_SECONDS = 1


class Child:
    """Decodes mutated files until the time is over; its parent sees how it ends."""

    def __init__(self, directory: Path, formats: list[str], seed: int) -> None:
        self.current = directory / "current"  # the file that is decoded now
        self.results = directory / "results.json"
        self.stderr_file = directory / "stderr"
        self.formats = formats
        self.rng = random.Random(seed)
        self.seeds = write_seed_images()
        self.statuses: dict[str, Counter[str]] = {name: Counter() for name in formats}
        self.slowest = (0.0, "")

    def run(self, seconds: float) -> None:
        """Decode for `seconds`. Exits with the cause of a finding."""
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        stderr = os.open(self.stderr_file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(stderr, 2)

        end = time.monotonic() + seconds
        next_save = 0.0
        while time.monotonic() < end:
            file_format = self.rng.choice(self.formats)
            data = mutate_image(file_format, self.seeds[file_format], self.rng)
            self.current.write_bytes(data)
            self.decode(file_format, data)
            if os.fstat(2).st_size:
                raise SystemExit(f"{file_format}-stderr")
            if time.monotonic() > next_save:
                self.save()
                next_save = time.monotonic() + SAVE_SECONDS
        self.save()

    def decode(self, file_format: str, data: bytes) -> None:
        """Decode one file. SIGPROF ends the process where it takes too long."""
        memory_before = reset_peak_memory_mb()
        cpu_before = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_PER_IMAGE)
        try:
            decode(data, SPEC, MAX_PIXELS)
            status = "decoded"
        except ImageError as error:
            status = str(error.status)
        except Exception as error:
            raise SystemExit(f"{file_format}-{type(error).__name__}") from error
        signal.setitimer(signal.ITIMER_PROF, 0)

        self.statuses[file_format][status] += 1
        self.slowest = max(self.slowest, (time.process_time() - cpu_before, file_format))
        if read_peak_memory_mb() - memory_before > MEMORY_PER_IMAGE_MB:
            raise SystemExit(f"{file_format}-memory")

    def save(self) -> None:
        """Write the counts, whole or not at all."""
        counts = {name: dict(counter) for name, counter in self.statuses.items()}
        partial = self.results.with_suffix(".partial")
        partial.write_text(json.dumps({"statuses": counts, "slowest": self.slowest}))
        partial.replace(self.results)


def reset_peak_memory_mb() -> float:
    """Forget the peak of this process's memory; return what it holds now [MB]."""
    Path("/proc/self/clear_refs").write_text("5")
    return read_peak_memory_mb()


def read_peak_memory_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise LookupError("the kernel states no VmHWM")


@dataclass(frozen=True)
class RunningChild:
    """A child process and the directory of its files."""

    process: subprocess.Popen[bytes]
    directory: Path


class Parent:
    """Runs child processes, keeps the file of each finding and starts the next child."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments = arguments
        self.directory = directory
        self.end = time.monotonic() + 60 * arguments.minutes
        self.next_seed = arguments.seed
        self.findings: Counter[str] = Counter()
        self.statuses: dict[str, Counter[str]] = {name: Counter() for name in arguments.formats}
        self.slowest: tuple[float, str] = (0.0, "")

    def run(self) -> None:
        children = [self.start_child() for _ in range(self.arguments.processes)]
        while children:
            for child in list(children):
                if child.process.poll() is None:
                    continue
                children.remove(child)
                self.collect(child)
                if time.monotonic() < self.end:
                    children.append(self.start_child())
            time.sleep(0.05)

    def start_child(self) -> RunningChild:
        seed = self.next_seed
        self.next_seed += 1
        seconds = self.end - time.monotonic()
        directory = self.directory / str(seed)
        directory.mkdir()
        command = [sys.executable, __file__, "--child", str(directory), "--seed", str(seed)]
        flags = ["--minutes", str(seconds / 60), "--formats", *self.arguments.formats]
        process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
        return RunningChild(process, directory)

    def collect(self, child: RunningChild) -> None:
        """Add a child's counts; keep the file that ended it."""
        directory = child.directory
        status = child.process.returncode
        results = directory / "results.json"
        if results.exists():
            measured = json.loads(results.read_text())
            for name, counts in measured["statuses"].items():
                self.statuses[name].update(counts)
            self.slowest = max(self.slowest, tuple(measured["slowest"]))
        if status == 0:
            return

        output = (directory / "stderr").read_text(errors="replace")
        cause = output.strip().splitlines()[-1][:80] if output.strip() else "no output"
        if status < 0:
            cause = signal.Signals(-status).name
        self.findings[cause] += 1
        kept = self.arguments.findings / f"{directory.name}-{len(self.findings)}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes((directory / "current").read_bytes())
        kept.with_suffix(".txt").write_text(f"{cause}\n{output}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--findings", type=Path, default=Path("artifacts/fuzz-images"))
    parser.add_argument("--out", type=Path, help="file for the report")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.child:
        child = Child(arguments.child, arguments.formats, arguments.seed)
        child.run(60 * arguments.minutes)
        return 0

    with TemporaryDirectory() as directory:
        parent = Parent(arguments, Path(directory))
        parent.run()
    report = {
        **describe_run(),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "images": sum(sum(counts.values()) for counts in parent.statuses.values()),
        "statuses": {name: dict(counts) for name, counts in parent.statuses.items()},
        "slowest_cpu_seconds": [round(parent.slowest[0], 3), parent.slowest[1]],
        "violations": dict(parent.findings),
    }
    return print_report(report, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
