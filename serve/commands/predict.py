"""Classify image files without a server, with the same decoding, graph and thresholds as the service."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from models.cpu_quota import available_cores
from models.image import ImageError, decode
from models.store import Store
from serve import options
from serve.model import Model

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
}  # looked for in directories
BATCH = 16
COLUMNS = (
    "file",
    "label",
    "index",
    "confidence",
    "prediction_set",
    "abstain",
    "out_of_distribution",
    "energy",
    "error",
)


def main(arguments: list[str]) -> int:
    """0: all were classified, 1: some could not be, 2: bad usage."""
    parser = argparse.ArgumentParser("python -m serve predict", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="IMAGE|DIR", help="files, or directories to search"
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="default: table"
    )
    parser.add_argument("--top-k", type=int, default=5, help="classes listed in JSON (default: 5)")
    options.add(parser, (*options.MODEL, "max_pixels"))
    given = vars(parser.parse_args(arguments))
    paths, form, top_k = given.pop("paths"), given.pop("format"), given.pop("top_k")
    if top_k < 1:
        raise ValueError("--top-k must be at least 1")
    settings = options.resolve(options.read(given))
    files = find(paths)
    threads = settings.threads or available_cores()
    model = Model(Store(settings.store).open(settings.model, settings.version), settings, threads)
    batches = [files[at : at + BATCH] for at in range(0, len(files), BATCH)]
    pool = ThreadPoolExecutor(
        threads
    )  # not in `with`, where Ctrl-C would wait for a pipe that never ends
    answered = pool.map(lambda batch: classify(model, batch, top_k, settings.max_pixels), batches)
    shown = track(
        answered,
        "Classifying",
        len(batches),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    rows = [row for batch in shown for row in batch]
    {"table": as_table, "json": as_json, "csv": as_csv}[form](model, rows)
    return 1 if any("error" in row for row in rows) else 0


def find(paths: Iterable[Path]) -> list[Path]:
    """Files as given, and the images below directories, sorted. Raises ValueError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
            try:
                path.stat()
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}") from error
            found.append(path)
        elif inside := sorted(images(path)):
            found += inside
        else:
            raise ValueError(f"{path}: no images in this directory")
    return found


def images(directory: Path) -> Iterator[Path]:
    """The images below it, and what we may not look at: to read that will say why not."""
    closed: list[OSError] = []
    for place, _, names in os.walk(directory, onerror=closed.append):
        paths = [Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
        yield from (path for path in paths if os.path.isfile(path) or not os.path.exists(path))
    yield from (Path(error.filename) for error in closed)


def classify(model: Model, files: list[Path], top_k: int, max_pixels: int) -> list[dict]:
    """One row a file, in their order: a prediction as the service gives it, or an error."""
    rows: list[dict] = [{"file": str(file)} for file in files]
    pixels, good = [], []
    for file, row in zip(files, rows, strict=True):
        try:
            pixels.append(decode(file.read_bytes(), model.manifest.input, max_pixels))
            good.append(row)
        except (ImageError, OSError) as error:
            row["error"] = str(error)
    if good:
        probabilities, energy = model.engine.run(
            np.stack(pixels), model.output_names, use_all_threads=False
        )
        for row, text in zip(
            good, model.composer.compose(probabilities, energy, [top_k] * len(good)), strict=True
        ):
            row.update(json.loads(text + "}"))
    return rows


def as_table(model: Model, rows: list[dict]) -> None:
    table = Table(
        "file", "label", "confidence", "notes", title=f"{model.name}, version {model.version}"
    )
    for row in rows:
        if "error" in row:
            table.add_row(escape(row["file"]), "", "", f"[red]{escape(row['error'])}[/red]")
        else:
            table.add_row(
                escape(row["file"]),
                escape(row["label"]),
                f"{row['confidence']:.1%}",
                escape(", ".join(notes(row))),
            )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; cutting columns would lose names
    console.print(table)


def notes(row: dict) -> Iterator[str]:
    if row["abstain"]:
        yield "abstains"
    if row["out_of_distribution"]:
        yield "out of distribution"
    if len(row["prediction_set"]) > 1:
        yield f"one of {', '.join(row['prediction_set'])}"


def as_json(model: Model, rows: list[dict]) -> None:
    json.dump(
        {"model": {"name": model.name, "version": str(model.version)}, "predictions": rows},
        sys.stdout,
        indent=1,
    )
    print()


def as_csv(model: Model, rows: list[dict]) -> None:
    writer = csv.DictWriter(
        sys.stdout, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "prediction_set": "|".join(row.get("prediction_set", []))})
