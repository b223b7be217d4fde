"""`imago serve predict`: classify image files without a server.

It decodes, predicts and applies thresholds exactly as the service does. Results are written as they
come, so that the number of files has no limit. Files and results may be in buckets, and several
processes may share the work: each classifies one shard.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import track

from models.cpu_quota import available_cores
from models.drift import measure_signals
from models.image import ImageError, read_header
from models.image.files import FORMATS, find_files, is_image_file
from serve import options
from serve.commands.bucket_images import (
    BucketFolder,
    BucketImage,
    BucketUnreachable,
    is_bucket_url,
)
from serve.commands.drift_report import DriftReport
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
from serve.commands.shards import Shard, is_finished, open_shards, parse_shard
from serve.model import Model
from serve.settings import Settings
from serve.wire import DEFAULT_TOP_K

DESCRIPTION = "Classify image files without a server, with the same results as the service."
STATUS_HELP = (
    "Exit status: 0 all classified, 1 some failed or a bucket did not answer, 2 invalid setting or "
    "path. Of a shard: 0 also if some images failed; their rows say why."
)
FORMAT_NAMES = ("table", "json", "csv", "parquet")
BATCH_SIZE = 16
BATCHES_AHEAD = 4  # for each thread: so many results may wait to be written
THREADS_PER_CORE = 2  # with a bucket: one waits for objects while another classifies
PARALLEL_READS = 32  # objects

ImageFile: TypeAlias = Path | BucketImage


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status, as STATUS_HELP says."""
    flags = vars(_build_parser().parse_args(arguments))
    paths = flags.pop("paths")
    out = flags.pop("out")
    shard = flags.pop("shard")
    if shard is None and out and is_bucket_url(out):
        shard = Shard(0, 1)
    format_name = flags.pop("format") or _guess_format(out, shard)
    top_k = flags.pop("top_k")
    has_embeddings = flags.pop("embedding")
    _check_output(format_name, out, top_k, has_embeddings, shard)

    settings = options.parse_settings(flags)
    try:
        files = list_files(paths, settings.max_body_bytes)
        settings = options.resolve_model(settings)
        if shard is not None:
            return _predict_shard(files, shard, out, settings, top_k, has_embeddings)
        return _predict_files(
            files, format_name, Path(out) if out else None, settings, top_k, has_embeddings
        )
    except BucketUnreachable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _predict_files(
    files: list[ImageFile],
    format_name: str,
    out: Path | None,
    settings: Settings,
    top_k: int,
    has_embeddings: bool,
) -> int:
    """Classify all files into one file or to stdout. Return the exit status."""
    threads = settings.threads or available_cores()
    with open_output(out, format_name == "parquet") as file:
        model = _load_model(settings, threads, has_embeddings)
        writer = _build_writer(format_name, file, model, has_embeddings)
        classify = partial(classify_batch, model, top_k, has_embeddings)

        has_failed = False
        for result in classify_all(classify, files, threads):
            writer.write(result)
            has_failed = has_failed or result.prediction is None
        writer.finish()
    return 1 if has_failed else 0


def _predict_shard(
    files: list[ImageFile],
    shard: Shard,
    out: str,
    settings: Settings,
    top_k: int,
    has_embeddings: bool,
) -> int:
    """Classify the files of a shard, unless that was done already. Return the exit status."""
    threads = settings.threads or available_cores()
    model = _load_model(settings, threads, has_embeddings)
    folder = open_shards(out)
    if is_finished(folder, shard, model, out):
        print(f"shard {shard}: finished before, skipped", file=sys.stderr)
        return 0

    own = [file for file in files if shard.has(file)]
    report = DriftReport(model.baseline)
    failed = 0
    classify = partial(classify_batch, model, top_k, has_embeddings, measures_drift=True)
    with folder.write_result(shard.file_name) as file:
        writer = ParquetWriter(file, model, has_embeddings)
        try:
            for result in classify_all(classify, own, threads * THREADS_PER_CORE):
                writer.write(result)
                failed += result.prediction is None
                if result.signals is not None:
                    report.add(result.signals)
            writer.add_metadata(
                {
                    "shard": str(shard),
                    "images": str(len(own)),
                    "failed": str(failed),
                    "drift": json.dumps(report.indices()),
                }
            )
        finally:
            writer.finish()  # before the file is closed, also where it is thrown away

    print(f"shard {shard}: {len(own)} images, {failed} failed; {report}", file=sys.stderr)
    return 0


def _load_model(settings: Settings, threads: int, has_embeddings: bool) -> Model:
    """Load the model. Raises ValueError if embeddings are asked for and it has none."""
    model = Model.from_settings(settings, threads)
    if has_embeddings and not model.has_embeddings:
        raise ValueError("--embedding: this model has no embeddings; leave it out")
    return model


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "imago serve predict", description=DESCRIPTION, epilog=STATUS_HELP
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="IMAGE|DIR|URL",
        help="files, or directories and prefixes of buckets (s3://bucket/photos, gs://…, az://…) "
        "to search for images; hidden files are skipped",
    )
    parser.add_argument(
        "--format",
        choices=FORMAT_NAMES,
        help="default: that of the name of --out, or else table; parquet needs the extra of that "
        "name",
    )
    parser.add_argument(
        "--out",
        metavar="FILE|DIR|URL",
        help="write to this file, which appears when it is complete (default: stdout); with "
        "--shard to a file in this directory or prefix of a bucket",
    )
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="NUMBER/COUNT",
        help="classify one of COUNT parts of the images, numbered from 0, into a Parquet file in "
        "--out; a part that is finished is skipped; prints the drift against the validation data",
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
    options.add_arguments(parser, (*options.MODEL_SETTINGS, "max_pixels", "max_body_bytes"))
    return parser


def _guess_format(out: str | None, shard: Shard | None) -> str:
    """Return the format that the name of the output file ends with, or else table."""
    if shard is not None:
        return "parquet"
    ending = Path(out).suffix.lower().removeprefix(".") if out else ""
    return ending if ending in FORMAT_NAMES else "table"


def _check_output(
    format_name: str, out: str | None, top_k: int, has_embeddings: bool, shard: Shard | None
) -> None:
    """Raise ValueError for flags that exclude each other, and for a missing package."""
    if top_k < 1:
        raise ValueError("--top-k must be at least 1")
    if shard is not None and format_name != "parquet":
        raise ValueError(f"--format {format_name}: shards are Parquet files; leave it out")
    if shard is not None and out is None:
        raise ValueError("--shard writes a file; name its directory or bucket with --out")
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


def list_files(paths: Iterable[str], max_bytes: int) -> list[ImageFile]:
    """Return files as given, and the images in directories and in prefixes of buckets, sorted.

    `max_bytes` bounds an image in a bucket. Raises ValueError for a path that does not exist, and
    for a directory or a prefix without images; BucketUnreachable.
    """
    files: list[ImageFile] = []
    for path in paths:
        if is_bucket_url(path):
            files += BucketFolder(path, max_bytes).list_images()
            continue
        if os.path.isdir(path):
            images = find_images(Path(path))
            if not images:
                raise ValueError(f"{path}: no images in this directory")
            files += images
            continue

        try:
            os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        files.append(Path(path))
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
    classify: Callable[[list[ImageFile]], list[Result]], files: list[ImageFile], threads: int
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
    classify: Callable[[list[ImageFile]], list[Result]],
    batches: list[list[ImageFile]],
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
    model: Model,
    top_k: int,
    has_embeddings: bool,
    files: list[ImageFile],
    measures_drift: bool = False,
) -> list[Result]:
    """Return the results of a batch of files, in the same order."""
    errors: dict[ImageFile, str] = {}
    decoded: dict[ImageFile, np.ndarray] = {}
    sizes: dict[ImageFile, tuple[int, int]] = {}
    for file, data in zip(files, read_files(files), strict=True):
        try:
            if isinstance(data, OSError):
                raise data
            decoded[file] = model.decode(data)
            if measures_drift:
                header = read_header(data)
                sizes[file] = (header.height, header.width)
        except (ImageError, OSError) as error:
            errors[file] = str(error)

    results: dict[os.PathLike[str], Result] = {}
    for file, message in errors.items():
        results[file] = Result(file, error=message)
    if decoded:
        for result in classify_pixels(model, top_k, has_embeddings, decoded, sizes):
            results[result.file] = result
    return [results[file] for file in files]


def read_files(files: list[ImageFile]) -> list[bytes | OSError]:
    """Return the content of each file, or why it can't be read; objects of buckets in parallel."""
    if not any(isinstance(file, BucketImage) for file in files):
        return [_read_file(file) for file in files]
    with ThreadPoolExecutor(min(PARALLEL_READS, len(files))) as pool:
        return list(pool.map(_read_file, files))


def _read_file(file: ImageFile) -> bytes | OSError:
    try:
        return file.read_bytes()
    except OSError as error:
        return error


def classify_pixels(
    model: Model,
    top_k: int,
    has_embeddings: bool,
    decoded: dict[ImageFile, np.ndarray],
    sizes: dict[ImageFile, tuple[int, int]],
) -> list[Result]:
    """Return the result of each decoded image: its prediction, or why the model gives none.

    `sizes` holds height and width of the files whose signals are measured. An image on which the
    model fails does not affect the others.
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
            results += classify_pixels(model, top_k, has_embeddings, {file: pixels}, sizes)
        return results

    embeddings = others[0] if has_embeddings else [None] * len(files)
    results = []
    for i, file in enumerate(files):
        signals = None
        if file in sizes:
            signals = measure_signals(probabilities[i], energy[i], decoded[file], *sizes[file])
        results.append(Result(file, predictions[i], embeddings[i], signals=signals))
    return results
