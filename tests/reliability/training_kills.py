"""Kill trainings, audits and exports at random moments; their successors must end bit-equal.

    python tests/reliability/training_kills.py [--kills 100] [--commands fit audit export]
        [--seed 0] [--out FILE]

Runs each command once without a disturbance. Then it starts the command over and over, sends
SIGKILL to all of its processes at a random moment of the time that it took, and starts the same
command again until one run ends, after up to three kills. What that run leaves must be the same to
the bit:

- fit: weights, optimizer, schedule, random numbers and metrics of the last checkpoint;
- audit: the content of audit.json;
- export: graphs, weights and samples of the bundle; the store holds whole bundles only.

On a CPU; kernels of a GPU may differ in the last bit by themselves. Prints the report as JSON,
which FILE keeps. Exit status 1 where a successor fails or differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import project_path  # noqa: F401  makes the imports below possible
from reports import PACKAGES, TRAINING_PACKAGES, describe_run, print_report

from models.bundle import Bundle, file_sha256
from support import RANDOM_CONVNET
from support.forked_commands import ForkedCommand, ForkedCommands
from support.interrupted_runs import assert_same_result, start_run
from support.sample_images import write_image_folder

COMMANDS = ("fit", "audit", "export")
MAX_KILLS_PER_RUN = 3
POLL_SECONDS = 0.005
COMPARED_IN_BUNDLES = ("*.onnx", "weights.safetensors", "samples/*")
IMAGES_PER_CLASS = 60


@dataclass(frozen=True)
class Job:
    """A command, and what its result is compared by."""

    start: Callable[[Path], ForkedCommand]
    """Starts it with a directory for what it writes."""

    check_same: Callable[[Path, Path], None]
    """Raises AssertionError where the results in two directories differ."""


class Jobs:
    """The three kinds of commands. Each run has a cache of its own, which kills may leave torn."""

    def __init__(self, commands: ForkedCommands, directory: Path) -> None:
        self.commands = commands
        self.images = write_image_folder(directory / "images", IMAGES_PER_CLASS)
        self.kinds = {
            "fit": Job(self.start_fit, assert_same_result),
            "audit": Job(self.start_audit, check_same_reports),
            "export": Job(self.start_export, check_same_bundles),
        }

    def start_fit(self, directory: Path) -> ForkedCommand:
        return start_run(self.commands, directory)

    def start_audit(self, directory: Path) -> ForkedCommand:
        env = {"XDG_CACHE_HOME": str(directory / "cache")}
        report = directory / "report"
        flags = ("--out", report, "--data.size", 32, *RANDOM_CONVNET)
        return self.commands.start("audit", self.images, *flags, env=env)

    def start_export(self, directory: Path) -> ForkedCommand:
        """A run of one epoch, of which the export takes the largest part."""
        arguments = ("run", "digits", "--store", directory / "store", "--name", "digits")
        flags = ("--trainer.max_epochs", 1, "--trainer.default_root_dir", directory / "runs")
        env = {"XDG_CACHE_HOME": str(directory / "cache")}
        return self.commands.start(*arguments, *flags, "--audit.enabled", "false", env=env)


def check_same_reports(one: Path, other: Path) -> None:
    contents = [(directory / "report" / "audit.json").read_text() for directory in (one, other)]
    assert contents[0] == contents[1], "audit.json differs"


def check_same_bundles(one: Path, other: Path) -> None:
    """Check that the store of `other` has whole bundles only, and that the results are equal."""
    for bundle in (other / "store" / "digits").glob("[0-9]*"):
        Bundle(bundle)  # checks all digests
    _check_same_files(_find_bundle(one), _find_bundle(other), COMPARED_IN_BUNDLES)


def _find_bundle(directory: Path) -> Path:
    return (directory / "store" / "digits" / "latest").resolve()


def _check_same_files(one: Path, other: Path, patterns: tuple[str, ...]) -> None:
    digests = [_read_digests(directory, patterns) for directory in (one, other)]
    assert digests[0], f"{one} has none of {', '.join(patterns)}"
    for name in sorted(set(digests[0]) | set(digests[1])):
        assert digests[0].get(name) == digests[1].get(name), f"{name} differs"


def _read_digests(directory: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for pattern in patterns:
        for file in directory.glob(pattern):
            digests[str(file.relative_to(directory))] = file_sha256(file)
    return digests


class Killer:
    """Runs each command undisturbed once, and then with kills at random moments."""

    def __init__(self, jobs: Jobs, directory: Path, rng: random.Random) -> None:
        self.jobs = jobs
        self.directory = directory
        self.rng = rng
        self.kills = 0
        self.runs: Counter[str] = Counter()
        self.violations: list[str] = []
        self.seconds: dict[str, float] = {}  # that the fastest run of each command took

    def run_undisturbed(self, name: str) -> Path:
        directory = self.directory / f"{name}-undisturbed"
        directory.mkdir()
        start = time.monotonic()
        command = self.jobs.kinds[name].start(directory)
        assert command.status() == 0, command.text
        self.seconds[name] = time.monotonic() - start
        return directory

    def run_with_kills(self, name: str, undisturbed: Path) -> None:
        """Kill the command up to MAX_KILLS_PER_RUN times, let it end and compare."""
        job = self.jobs.kinds[name]
        self.runs[name] += 1
        directory = self.directory / f"{name}-{self.runs[name]}"
        directory.mkdir()
        moments: list[float] = []
        command = job.start(directory)
        for _ in range(self.rng.randint(1, MAX_KILLS_PER_RUN)):
            moment = self.rng.uniform(0, self.seconds[name])
            start = time.monotonic()
            if not self.kill_after(command, moment):  # it has ended
                self.seconds[name] = min(self.seconds[name], time.monotonic() - start)
                break
            moments.append(round(moment, 2))
            command = job.start(directory)

        if command.status() != 0:
            self.violations.append(f"{name} killed after {moments} s: {command.text[-500:]}")
            return
        try:
            job.check_same(undisturbed, directory)
        except (AssertionError, ValueError, OSError) as error:
            self.violations.append(f"{name} killed after {moments} s: {error}")
            return
        shutil.rmtree(directory)

    def kill_after(self, command: ForkedCommand, seconds: float) -> bool:
        """Kill the processes of a command; return False where it has ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if command.poll() is not None:
                return False
            time.sleep(POLL_SECONDS)
        for pid in reversed([command.pid, *find_descendants(command.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.wait()
        self.kills += 1
        return True


def find_descendants(pid: int) -> list[int]:
    pids: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text().split()):
                pids += [child, *find_descendants(child)]
    return pids


def run_kills(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    commands = ForkedCommands("train", directory, directory)
    try:
        killer = Killer(Jobs(commands, directory), directory, random.Random(options.seed))
        undisturbed = {name: killer.run_undisturbed(name) for name in options.commands}
        while killer.kills < options.kills:
            for name in options.commands:
                killer.run_with_kills(name, undisturbed[name])
                print(f"{killer.kills} kills, {len(killer.violations)} violations", file=sys.stderr)
    finally:
        commands.close()
    return {
        **describe_run((*PACKAGES, *TRAINING_PACKAGES)),
        "seed": options.seed,
        "kills": killer.kills,
        "runs": dict(killer.runs),
        "fastest_seconds": {name: round(s, 1) for name, s in killer.seconds.items()},
        "violations": killer.violations,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the report")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as directory:
        report = run_kills(options, Path(directory))
    return print_report(report, options.out)


if __name__ == "__main__":
    sys.exit(main())
