"""Accuracy and time of fine-tuning on small sets of photographs, beside other programs.

    python tests/benchmarks/finetune_recipes.py [--flowers DIR] [--cifar10 DIR] [--work DIR]
        [--methods probe auto timm …] [--sets flowers cifar10-50 …] [--seeds 3]
        [--peer-python PYTHON] [--out FILE] [--table]

Each cell of the table is one process: the project's command `train run`, or finetune_peers.py with
the Python of the peers, on the same files and with the same pretrained weights. For the peers,
`pip install torch timm fastai`, and autogluon.multimodal in an environment of its own.

Results are kept in FILE after each cell, by default finetune_recipes.json in this folder, and a
cell that is there is not run again: the same command continues an interrupted table. --table prints
the results and runs nothing.

--flowers is a folder of class folders. Near duplicates are left out, as the project's audit
reports them; of each class 20 % are for testing and 15 % for validation. --cifar10 is a folder with
train and test, each with class folders. Of it, 10, 50 and 200 images of each class are for training
(80 %) and validation, and 50 others for testing, at their size of 32 pixels and enlarged to 224.
The seed chooses the images, too.

Processor seconds are those of the whole process and its children, imports included. Of the
project's command that is everything up to the published bundle; for CIFAR-10 without int8.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project_path import ROOT

# First, before timm: it declares operators that timm needs.
from models.networks.pretrained import PACKAGED_NETWORK, fetch_pretrained_file

Result = dict[str, Any]

DEFAULT_RESULTS = Path(__file__).with_suffix(".json")
PEERS_SCRIPT = Path(__file__).with_name("finetune_peers.py")
KEY = ("set", "method", "seed")

TEST_SHARE = 0.2  # of the flowers
VAL_SHARE = 0.15
CIFAR_VAL_SHARE = 0.2
CIFAR_TEST_IMAGES = 50  # of each class
CIFAR_SIDE = 32
IMAGE_SIDE = 224
TIMEOUT_SECONDS = 3 * 3600

FROM_SCRATCH = [
    *["--model.weights", "none", "--fit.mode", "plain", "--trainer.max_epochs", "40"],
    *["--model.optimizer.lr", "1e-3", "--model.optimizer.layer_decay", "1"],
    *["--model.frozen_share", "0", "--model.freeze_batch_norm", "false", "--ema.decay", "0.99"],
    *["--data.normalization", "data"],
]
# Flags of the project's command.
METHODS = {
    "probe": ["--fit.mode", "probe"],
    "auto": [],
    "auto-mixup": ["--data.augment.mixup", "0.2"],
    "auto-cutmix": ["--data.augment.cutmix", "1"],
    "scratch": FROM_SCRATCH,
}
PEERS = ("timm", "fastai", "autogluon")


@dataclass(frozen=True)
class ImageSet:
    """A set of the table. `images` of each class are for training and validation; None: all."""

    name: str
    source: str  # flowers or cifar10
    images: int | None = None
    side: int = IMAGE_SIDE  # of the network's input


SETS = [ImageSet("flowers", "flowers")]
for count in (10, 50, 200):
    SETS.append(ImageSet(f"cifar10-{count}", "cifar10", count))
    SETS.append(ImageSet(f"cifar10-{count}-32px", "cifar10", count, CIFAR_SIDE))


# Data


def split_flowers(source: Path, target: Path, seed: int, duplicates: set[str]) -> None:
    """Link the images of each class into the parts."""
    for label in list_classes(source):
        files = [
            file for file in list_files(label) if f"{label.name}/{file.name}" not in duplicates
        ]
        random.Random(seed).shuffle(files)
        test = round(TEST_SHARE * len(files))
        val = round(VAL_SHARE * len(files))
        link_files(target / "test" / label.name, files[:test])
        link_files(target / "val" / label.name, files[test : test + val])
        link_files(target / "train" / label.name, files[test + val :])


def split_cifar(source: Path, target: Path, seed: int, images: int) -> None:
    """Link `images` of each class into train and val, and others of its test part into test."""
    generator = random.Random(seed)
    for label in list_classes(source / "train"):
        files = generator.sample(list_files(label), images)
        val = round(CIFAR_VAL_SHARE * images)
        link_files(target / "val" / label.name, files[:val])
        link_files(target / "train" / label.name, files[val:])
        tests = list_files(source / "test" / label.name)
        count = min(CIFAR_TEST_IMAGES, len(tests))
        link_files(target / "test" / label.name, generator.sample(tests, count))


def list_classes(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir())


def list_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def link_files(directory: Path, files: list[Path]) -> None:
    directory.mkdir(parents=True)
    for file in files:
        (directory / file.name).symlink_to(file.resolve())


def find_duplicates(source: Path, work: Path) -> set[str]:
    """Return the second image of each pair of duplicates, as class/file, by the audit."""
    report = work / "audit" / "audit.json"
    if not report.exists():
        command = ["audit", str(source), "--out", str(report.parent), "--model.weights", "none"]
        run_process([sys.executable, "-m", "train", *command], work / "audit.log")
    findings = json.loads(report.read_text())
    found: set[str] = set()
    for kind in ("exact_duplicates", "near_duplicates"):
        assert findings[kind]["count"] == len(findings[kind]["pairs"])
        found |= {pair["second"]["file"] for pair in findings[kind]["pairs"]}
    return found


def write_weights(path: Path) -> None:
    """Write the packaged weights as a state dict in timm's names, which fit in order."""
    import timm
    import torch

    state = torch.load(
        fetch_pretrained_file(PACKAGED_NETWORK), map_location="cpu", weights_only=True
    )
    names = timm.create_model(PACKAGED_NETWORK).state_dict()
    torch.save(dict(zip(names, state.values(), strict=True)), path)


# Cells


def run_process(command: list[str], log: Path) -> tuple[str, float, float]:
    """Run a command; return its stdout, wall seconds and processor seconds.

    Raises CalledProcessError; stderr is in `log`.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with log.open("w") as stderr:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=True,
            cwd=log.parent,
            env=environment,
            timeout=TIMEOUT_SECONDS,
        )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, seconds, cpu_seconds


def measure_project(image_set: ImageSet, method: str, seed: int, data: Path, cell: Path) -> Result:
    """Run `train run`, with caches of its own, and read the figures of the bundle."""
    command = [
        *[sys.executable, "-m", "train", "run", str(data), "--name", "photos"],
        *["--seed_everything", str(seed), "--store", str(cell / "store")],
        *["--data.cache", str(cell / "cache"), "--trainer.default_root_dir", str(cell / "runs")],
        *METHODS[method],
    ]
    if image_set.side != IMAGE_SIDE:
        command += ["--data.size", str(image_set.side)]
    if image_set.source == "cifar10":
        command += ["--export.quantize.enabled", "false"]

    _, seconds, cpu_seconds = run_process(command, cell / "log")
    bundle = cell / "store" / "photos" / "1"
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {
        "accuracy": manifest["metrics"]["test"]["accuracy"],
        "val_accuracy": manifest["metrics"]["val"]["accuracy"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "steps": {
            name: round(value, 1) for name, value in manifest["provenance"]["seconds"].items()
        },
        "int8_accuracy": manifest["variants"].get("int8", {}).get("accuracy"),
        "notes": manifest["notes"],
        "versions": manifest["provenance"]["packages"],
    }


def measure_peer(
    image_set: ImageSet, method: str, seed: int, data: Path, cell: Path, options: argparse.Namespace
) -> Result:
    """Run another program on the same files, with the same weights."""
    weights = options.work / "weights.pth"
    if not weights.exists():
        write_weights(weights)
    command = [
        *[options.peer_python, str(PEERS_SCRIPT), method, str(data), "--weights", str(weights)],
        *["--seed", str(seed), "--size", str(image_set.side)],
    ]
    output, seconds, cpu_seconds = run_process(command, cell / "log")
    printed = json.loads(output.splitlines()[-1])
    return {
        "accuracy": printed["accuracy"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": printed["versions"],
    }


def measure_cell(
    image_set: ImageSet,
    method: str,
    seed: int,
    duplicates: set[str],
    options: argparse.Namespace,
) -> Result:
    """Split the data and run one method on it; `duplicates` are of the flowers."""
    cell = options.work / "cell"
    shutil.rmtree(cell, ignore_errors=True)
    data = cell / "data"
    if image_set.source == "flowers":
        split_flowers(options.flowers, data, seed, duplicates)
    else:
        assert image_set.images is not None
        split_cifar(options.cifar10, data, seed, image_set.images)

    if method in PEERS:
        result = measure_peer(image_set, method, seed, data, cell, options)
    else:
        result = measure_project(image_set, method, seed, data, cell)
    counts = {part: len(list(data.glob(f"{part}/*/*"))) for part in ("train", "val", "test")}
    return {
        "set": image_set.name,
        "method": method,
        "seed": seed,
        "images": counts,
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        "python": platform.python_version(),
        **result,
    }


def list_cells(options: argparse.Namespace) -> Iterator[tuple[ImageSet, str, int]]:
    """Yield the cells by set, then by seed, so that an unfinished table compares all methods."""
    sets = {image_set.name: image_set for image_set in SETS}
    for name in options.sets:
        if getattr(options, sets[name].source) is None:
            continue
        for seed in range(options.seeds):
            for method in options.methods:
                yield sets[name], method, seed


# Results


def read_results(file: Path) -> list[Result]:
    return json.loads(file.read_text()) if file.exists() else []


def keep_result(result: Result, file: Path) -> None:
    """Add a result to a file, which is replaced at once."""
    staged = file.with_suffix(".tmp")
    staged.write_text(json.dumps([*read_results(file), result], indent=1) + "\n")
    staged.replace(file)


def print_table(results: list[Result]) -> None:
    """Print means over the seeds, one line for each set and method."""
    print("| images | method | seeds | accuracy | s.d. | CPU seconds | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["set"], result["method"]), []).append(result)

    names = [image_set.name for image_set in SETS]
    methods = [*METHODS, *PEERS]
    for key in sorted(groups, key=lambda key: (names.index(key[0]), methods.index(key[1]))):
        group = groups[key]
        accuracies = [result["accuracy"] for result in group]
        deviation = f"{statistics.stdev(accuracies):.4f}" if len(group) > 1 else ""
        cpu_seconds = statistics.mean(result["cpu_seconds"] for result in group)
        seconds = statistics.mean(result["seconds"] for result in group)
        print(
            f"| {key[0]} | {key[1]} | {len(group)} | {statistics.mean(accuracies):.4f} | "
            f"{deviation} | {cpu_seconds:.0f} | {seconds:.0f} |"
        )


def run_table() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [image_set.name for image_set in SETS]
    methods = [*METHODS, *PEERS]
    parser.add_argument("--flowers", type=Path, help="folder of class folders")
    parser.add_argument("--cifar10", type=Path, help="folder with train and test")
    parser.add_argument("--work", type=Path, default=Path("/tmp/finetune_recipes"))
    parser.add_argument("--sets", nargs="+", choices=names, default=names)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=DEFAULT_RESULTS, help="file of the results")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if options.table:
        print_table(read_results(options.out))
        return

    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    duplicates = find_duplicates(options.flowers, options.work) if options.flowers else set()
    for image_set, method, seed in list_cells(options):
        key = (image_set.name, method, seed)
        if any(tuple(result[part] for part in KEY) == key for result in read_results(options.out)):
            continue
        try:
            result = measure_cell(image_set, method, seed, duplicates, options)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log = options.work / f"failed-{image_set.name}-{method}-{seed}.log"
            shutil.copy(options.work / "cell" / "log", log)
            print(f"finetune_recipes: {key}: {error}; see {log}", file=sys.stderr, flush=True)
            continue
        print(
            json.dumps({part: result[part] for part in (*KEY, "accuracy", "cpu_seconds")}),
            flush=True,
        )
        keep_result(result, options.out)
    print_table(read_results(options.out))


if __name__ == "__main__":
    run_table()
