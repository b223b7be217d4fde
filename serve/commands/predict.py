"""`imago serve predict`: classify image files without a server.

It decodes, predicts and applies thresholds exactly as the service does. Results are written as they
come, so that the number of files has no limit.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import track

from models.cpu_quota import available_cores
from models.image import ImageError
from models.image.files import FORMATS, find_files, is_image_file
from serve import options
from serve.commands.result_writers import (
    CsvWriter,
    JsonWriter,
    ParquetWriter,
    Result,
    ResultWriter,
    TableWriter,
    import_pyarrow,
    open_output,
)
from serve.model import Model
from serve.wire import DEFAULT_TOP_K

DESCRIPTION = "Classify image files without a server, with the same results as the service."
STATUS_HELP = "Exit status: 0 all classified, 1 some failed, 2 invalid setting or path."
FORMAT_NAMES = ("table", "json", "csv", "parquet")
BATCH_SIZE = 16
BATCHES_AHEAD = 4  # for each thread: so many results may wait to be written


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status, as STATUS_HELP says."""
    flags = vars(_build_parser().parse_args(arguments))
    paths = flags.pop("paths")
    out = flags.pop("out")
    format_name = flags.pop("format") or _guess_format(out)
    top_k = flags.pop("top_k")
    has_embeddings = flags.pop("embedding")
    _check_output(format_name, out, top_k, has_embeddings)

    settings = options.resolve_model(options.parse_settings(flags))
    files = list_files(paths)
    threads = settings.threads or available_cores()
    with open_output(out, format_name == "parquet") as file:
        model = Model.from_settings(settings, threads)
        if has_embeddings and not model.has_embeddings:
            raise ValueError("--embedding: this model has no embeddings; leave it out")
        writer = _build_writer(format_name, file, model, has_embeddings)
        classify = partial(classify_batch, model, top_k, has_embeddings)

        has_failed = False
        for result in classify_all(classify, files, threads):
            writer.write(result)
            has_failed = has_failed or result.prediction is None
        writer.finish()
    return 1 if has_failed else 0


def _build_parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--format",
        choices=FORMAT_NAMES,
        help="default: that of the name of --out, or else table; parquet needs the extra of that "
        "name",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write to this file, which appears when it is complete (default: stdout)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=DEFAULT_TOP_K,
        help=f"classes listed in JSON and Parquet (default: {DEFAULT_TOP_K})",
    )
    parser.add_argument(
        "--embedding",
        action="store_true",
        help="add the features before the last layer, to JSON, CSV and Parquet",
    )
    options.add_arguments(parser, (*options.MODEL_SETTINGS, "max_pixels"))
    return parser


def _guess_format(out: Path | None) -> str:
    """Return the format that the name of the output file ends with, or else table."""
    ending = out.suffix.lower().removeprefix(".") if out else ""
    return ending if ending in FORMAT_NAMES else "table"


def _check_output(format_name: str, out: Path | None, top_k: int, has_embeddings: bool) -> None:
    """Raise ValueError for flags that exclude each other, and for a missing package."""
    if top_k < 1:
        raise ValueError("--top-k must be at least 1")
    if has_embeddings and format_name == "table":
        raise ValueError("--embedding: a table shows none; add --format json, csv or parquet")
    if format_name == "parquet":
        import_pyarrow()
        if out is None:
            raise ValueError("--format parquet writes a binary file; name it with --out FILE")


def _build_writer(
    format_name: str, file: IO[Any], model: Model, has_embeddings: bool
) -> ResultWriter:
    if format_name == "json":
        return JsonWriter(file, model)
    if format_name == "csv":
        return CsvWriter(file, has_embeddings)
    if format_name == "parquet":
        return ParquetWriter(file, model, has_embeddings)
    return TableWriter(file, model)


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


def classify_all(
    classify: Callable[[list[Path]], list[Result]], files: list[Path], threads: int
) -> Iterator[Result]:
    """Yield the result of each file, in order, with a progress bar if stderr is a terminal.

    `classify` runs in threads, a batch in each.
    """
    batches = [files[start : start + BATCH_SIZE] for start in range(0, len(files), BATCH_SIZE)]
    # Not in a `with` block: on Ctrl-C it would wait for a thread that reads from a pipe.
    pool = ThreadPoolExecutor(threads)
    progress = track(
        map_in_order(pool, classify, batches, BATCHES_AHEAD * threads),
        "Classifying",
        len(batches),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    for results in progress:
        yield from results


def map_in_order(
    pool: ThreadPoolExecutor,
    classify: Callable[[list[Path]], list[Result]],
    batches: list[list[Path]],
    ahead: int,
) -> Iterator[list[Result]]:
    """Yield `classify` of each batch, as `pool.map` does, with at most `ahead` results waiting."""
    futures: deque[Future[list[Result]]] = deque()
    for batch in batches:
        futures.append(pool.submit(classify, batch))
        if len(futures) == ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def classify_batch(
    model: Model, top_k: int, has_embeddings: bool, files: list[Path]
) -> list[Result]:
    """Return the results of a batch of files, in the same order."""
    errors: dict[Path, str] = {}
    decoded: dict[Path, np.ndarray] = {}
    for file in files:
        try:
            decoded[file] = model.decode(file.read_bytes())
        except (ImageError, OSError) as error:
            errors[file] = str(error)

    results = {file: Result(file, error=error) for file, error in errors.items()}
    if decoded:
        for result in classify_pixels(model, top_k, has_embeddings, decoded):
            results[result.file] = result
    return [results[file] for file in files]


def classify_pixels(
    model: Model, top_k: int, has_embeddings: bool, decoded: dict[Path, np.ndarray]
) -> list[Result]:
    """Return the result of each decoded image: its prediction, or why the model gives none.

    An image on which the model fails does not affect the others.
    """
    output_names = (*model.output_names, "embedding") if has_embeddings else model.output_names
    files = list(decoded)
    try:
        probabilities, energy, *others = model.run(np.stack(list(decoded.values())), output_names)
        predictions = model.compose_predictions(probabilities, energy, top_k)
    except Exception as error:  # engines raise exceptions of any kind
        if len(files) == 1:
            lines = str(error).splitlines() or [type(error).__name__]
            return [Result(files[0], error=f"the model failed on this image: {lines[0]}")]
        results: list[Result] = []
        for file, pixels in decoded.items():
            results += classify_pixels(model, top_k, has_embeddings, {file: pixels})
        return results

    embeddings = others[0] if has_embeddings else [None] * len(files)
    rows = zip(files, predictions, embeddings, strict=True)
    return [Result(file, prediction, embedding) for file, prediction, embedding in rows]
