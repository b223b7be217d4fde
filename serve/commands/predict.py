"""`imago serve predict`: classify image files without a server.

It decodes, predicts and applies thresholds exactly as the service does.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from models.cpu_quota import available_cores
from models.image import ImageError
from models.image.files import FORMATS, find_files, is_image_file
from serve import options
from serve.model import Model
from serve.prediction import Prediction
from serve.wire import DEFAULT_TOP_K

DESCRIPTION = "Classify image files without a server, with the same results as the service."
STATUS_HELP = "Exit status: 0 all classified, 1 some failed, 2 invalid setting or path."
BATCH_SIZE = 16
PIPE_COLUMNS = 200  # width of a table that does not go to a terminal, so that no name is cut
CSV_COLUMNS = (
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

# A file and its prediction, or the reason why there is none.
Result = tuple[Path, Prediction | str]


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status, as STATUS_HELP says."""
    parser = argparse.ArgumentParser(
        "imago serve predict", description=DESCRIPTION, epilog=STATUS_HELP
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="IMAGE|DIR",
        help="files, or directories to search for images; hidden files are skipped",
    )
    parser.add_argument("--format", choices=tuple(WRITERS), default="table", help="default: table")
    parser.add_argument(
        "--top-k",
        type=int,
        default=DEFAULT_TOP_K,
        help=f"classes listed in JSON (default: {DEFAULT_TOP_K})",
    )
    options.add_arguments(parser, (*options.MODEL_SETTINGS, "max_pixels"))
    flags = vars(parser.parse_args(arguments))
    paths = flags.pop("paths")
    write_results = WRITERS[flags.pop("format")]
    top_k = flags.pop("top_k")
    if top_k < 1:
        raise ValueError("--top-k must be at least 1")

    settings = options.resolve_model(options.parse_settings(flags))
    files = list_files(paths)
    threads = settings.threads or available_cores()
    model = Model.from_settings(settings, threads)

    results = classify_all(model, files, top_k, threads)
    write_results(model, results)
    has_failed = any(isinstance(outcome, str) for _, outcome in results)
    return 1 if has_failed else 0


def list_files(paths: Iterable[Path]) -> list[Path]:
    """Return files as given, and the images in directories, sorted.

    Raises ValueError for a path that does not exist and a directory without images.
    """
    files: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            images = find_images(path)
            if not images:
                raise ValueError(f"{path}: no images in this directory")
            files += images
            continue

        try:
            path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        files.append(path)
    return files


def find_images(directory: Path) -> list[Path]:
    """Return the images in a directory and those below it, sorted by path, as training finds them.

    Files and directories without read permission are in the list too, so that the results show
    their errors. The number of other files is printed on stderr.
    """
    (found,) = find_files([directory])
    images = [Path(path) for path in found.files if is_image_file(path)]
    others = len(found.files) - len(images)
    if others:
        count = f"{others} of {len(found.files)} files"
        print(f"{directory}: {count} left out: not {FORMATS}", file=sys.stderr)

    images += [Path(error.filename) for error in found.errors]
    return sorted(images)


def classify_all(model: Model, files: list[Path], top_k: int, threads: int) -> list[Result]:
    """Classify files, a batch per thread, with a progress bar if stderr is a terminal."""
    batches = [files[start : start + BATCH_SIZE] for start in range(0, len(files), BATCH_SIZE)]
    # Not in a `with` block: on Ctrl-C it would wait for a thread that reads from a pipe.
    pool = ThreadPoolExecutor(threads)
    progress = track(
        pool.map(partial(classify_batch, model, top_k), batches),
        "Classifying",
        len(batches),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    results: list[Result] = []
    for batch_results in progress:
        results += batch_results
    return results


def classify_batch(model: Model, top_k: int, files: list[Path]) -> list[Result]:
    """Return the results of a batch of files, in the same order."""
    outcomes: dict[int, Prediction | str] = {}
    pixels: list[np.ndarray] = []
    decoded: list[int] = []
    for position, file in enumerate(files):
        try:
            pixels.append(model.decode(file.read_bytes()))
            decoded.append(position)
        except (ImageError, OSError) as error:
            outcomes[position] = str(error)

    if pixels:
        predictions = predict_each(model, pixels, top_k)
        outcomes.update(zip(decoded, predictions, strict=True))
    return [(file, outcomes[position]) for position, file in enumerate(files)]


def predict_each(model: Model, pixels: list[np.ndarray], top_k: int) -> list[Prediction | str]:
    """Return the prediction of each image, or why the model gives none.

    An image on which the model fails does not affect the others.
    """
    try:
        return [*model.predict_pixels(np.stack(pixels), top_k)]
    except Exception as error:  # engines raise exceptions of any kind
        if len(pixels) == 1:
            lines = str(error).splitlines() or [type(error).__name__]
            return [f"the model failed on this image: {lines[0]}"]

    outcomes: list[Prediction | str] = []
    for image in pixels:
        outcomes += predict_each(model, [image], top_k)
    return outcomes


def write_table(model: Model, results: list[Result]) -> None:
    """Print a table for people."""
    title = f"{model.name}, version {model.version}"
    table = Table("file", "label", "confidence", "notes", title=title)
    for file, outcome in results:
        if isinstance(outcome, str):
            table.add_row(escape(str(file)), "", "", f"[red]{escape(outcome)}[/red]")
            continue
        table.add_row(
            escape(str(file)),
            escape(outcome.label),
            f"{outcome.confidence:.1%}",
            escape(", ".join(list_notes(outcome))),
        )

    console = Console()
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(table)


def list_notes(prediction: Prediction) -> list[str]:
    """Return why a prediction deserves less trust."""
    notes: list[str] = []
    if prediction.abstain:
        notes.append("abstains")
    if prediction.out_of_distribution:
        notes.append("out of distribution")
    if len(prediction.prediction_set) > 1:
        notes.append(f"one of {', '.join(prediction.prediction_set)}")
    return notes


def write_json(model: Model, results: list[Result]) -> None:
    """Print one JSON object, in the form of the service's answers."""
    answer = {
        "model": {"name": model.name, "version": str(model.version)},
        "predictions": [build_row(file, outcome) for file, outcome in results],
    }
    json.dump(answer, sys.stdout, indent=1)
    print()


def write_csv(model: Model, results: list[Result]) -> None:
    """Print one row per file. The classes of a prediction set are separated by `|`."""
    writer = csv.DictWriter(
        sys.stdout, CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for file, outcome in results:
        row = build_row(file, outcome)
        row["prediction_set"] = "|".join(row.get("prediction_set", []))
        writer.writerow(row)


def build_row(file: Path, outcome: Prediction | str) -> dict[str, Any]:
    """Return the file with its prediction or error, by the names that the service uses."""
    if isinstance(outcome, str):
        return {"file": str(file), "error": outcome}
    return {"file": str(file), **outcome.model_dump()}


WRITERS: dict[str, Callable[[Model, list[Result]], None]] = {
    "table": write_table,
    "json": write_json,
    "csv": write_csv,
}
