"""The formats in which `imago serve predict` writes its results.

A writer gets the results one by one and keeps no more of them than its format needs, so that the
images of a large directory do not collect in memory:

    with open_output(path, is_binary) as file:
        writer = JsonWriter(file, model)
        writer.write(result)
        writer.finish()
"""

import csv
import dataclasses
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve.model import Model
from serve.prediction import Prediction

PIPE_COLUMNS = 200  # width of a table that does not go to a terminal, so that no name is cut
LIST_SEPARATOR = "|"  # between the elements of a list in a CSV cell
ROWS_PER_GROUP = 2000  # of a Parquet file: what a reader loads at once
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


@dataclass(frozen=True)
class Result:
    """A file and its prediction, or the reason why there is none."""

    file: os.PathLike[str]
    prediction: Prediction | None = None
    embedding: np.ndarray | None = None  # float32 [D], if it is asked for
    error: str = ""
    signals: dict[str, float] | None = None  # for drift, if they are asked for

    def members(self) -> dict[str, Any]:
        """Return all values by the names that the service uses, without the embedding."""
        name = os.fspath(self.file)
        if self.prediction is None:
            return {"file": name, "error": self.error}
        return {"file": name, **dataclasses.asdict(self.prediction)}


class ResultWriter(Protocol):
    """Writes results in one format."""

    def write(self, result: Result) -> None:
        """Write one result."""

    def finish(self) -> None:
        """Write what follows the last result."""


class TableWriter:
    """A table for people. Its widths depend on all results, so it is written at the end."""

    def __init__(self, file: IO[str], model: Model) -> None:
        self.file = file
        title = f"{model.name}, version {model.version}"
        self.table = Table("file", "label", "confidence", "notes", title=title)

    def write(self, result: Result) -> None:
        """Add a row."""
        name = escape(os.fspath(result.file))
        prediction = result.prediction
        if prediction is None:
            self.table.add_row(name, "", "", f"[red]{escape(result.error)}[/red]")
            return
        self.table.add_row(
            name,
            escape(prediction.label),
            f"{prediction.confidence:.1%}",
            escape(", ".join(_list_notes(prediction))),
        )

    def finish(self) -> None:
        """Write the table."""
        console = Console(file=self.file)
        if not console.is_terminal:
            console.width = PIPE_COLUMNS
        console.print(self.table)


def _list_notes(prediction: Prediction) -> list[str]:
    """Return why a prediction deserves less trust."""
    notes: list[str] = []
    if prediction.abstain:
        notes.append("abstains")
    if prediction.out_of_distribution:
        notes.append("out of distribution")
    if len(prediction.prediction_set) > 1:
        notes.append(f"one of {', '.join(prediction.prediction_set)}")
    return notes


class JsonWriter:
    """One JSON object in the form of the service's answers, with a line for each file."""

    def __init__(self, file: IO[str], model: Model) -> None:
        self.file = file
        self.separator = "\n"
        name = json.dumps({"name": model.name, "version": str(model.version)})
        file.write(f'{{"model": {name},\n"predictions": [')

    def write(self, result: Result) -> None:
        """Write the object of one file."""
        members = result.members()
        if result.embedding is not None:
            members["embedding"] = [float(number) for number in _format_numbers(result.embedding)]
        self.file.write(self.separator + json.dumps(members))
        self.separator = ",\n"

    def finish(self) -> None:
        """Close the list and the object."""
        self.file.write("\n]}\n")


class CsvWriter:
    """A row for each file. The elements of a list are separated by `|`."""

    def __init__(self, file: IO[str], has_embeddings: bool) -> None:
        columns = [*CSV_COLUMNS, "embedding"] if has_embeddings else CSV_COLUMNS
        self.writer = csv.DictWriter(
            file, columns, restval="", extrasaction="ignore", lineterminator="\n"
        )
        self.writer.writeheader()

    def write(self, result: Result) -> None:
        """Write a row."""
        members = result.members()
        members["prediction_set"] = LIST_SEPARATOR.join(members.get("prediction_set", []))
        if result.embedding is not None:
            members["embedding"] = LIST_SEPARATOR.join(_format_numbers(result.embedding))
        self.writer.writerow(members)

    def finish(self) -> None:
        """Write nothing: the last row is complete."""


def _format_numbers(embedding: np.ndarray) -> list[str]:
    """Return the numbers with the digits that float32 has."""
    return [f"{number:.7g}" for number in embedding.tolist()]


class ParquetWriter:
    """A row for each file, for pandas, polars, DuckDB and the like. Needs the extra `parquet`.

    The name and version of the model are in the metadata of the schema.
    """

    def __init__(self, file: IO[bytes], model: Model, has_embeddings: bool) -> None:
        """Raises ValueError if the extra is missing."""
        self.pyarrow = import_pyarrow()
        from pyarrow import parquet

        self.schema = self._build_schema(model, has_embeddings)
        self.writer = parquet.ParquetWriter(file, self.schema)
        self.rows: list[dict[str, Any]] = []

    def _build_schema(self, model: Model, has_embeddings: bool) -> Any:
        pyarrow = self.pyarrow
        choice = [
            ("label", pyarrow.string()),
            ("index", pyarrow.int32()),
            ("confidence", pyarrow.float32()),
        ]
        columns = [
            ("file", pyarrow.string()),
            *choice,
            ("top", pyarrow.list_(pyarrow.struct(choice))),
            ("prediction_set", pyarrow.list_(pyarrow.string())),
            ("abstain", pyarrow.bool_()),
            ("out_of_distribution", pyarrow.bool_()),
            ("energy", pyarrow.float32()),
            ("error", pyarrow.string()),
        ]
        if has_embeddings:
            columns.append(("embedding", pyarrow.list_(pyarrow.float32())))
        metadata = {"model": model.name, "version": str(model.version)}
        return pyarrow.schema(columns, metadata=metadata)

    def write(self, result: Result) -> None:
        """Keep a row until its group is complete."""
        members = result.members()
        # A file name may contain bytes that are not valid text.
        members["file"] = members["file"].encode("utf-8", "backslashreplace").decode()
        members["embedding"] = result.embedding
        self.rows.append(members)
        if len(self.rows) == ROWS_PER_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        table = self.pyarrow.Table.from_pylist(self.rows, self.schema)
        self.writer.write_table(table)
        self.rows = []

    def add_metadata(self, metadata: dict[str, str]) -> None:
        """Add to the metadata of the file, such as what is known only at its end."""
        self.writer.add_key_value_metadata(metadata)

    def finish(self) -> None:
        """Write the last rows, and the index of the file."""
        if self.rows:
            self._write_rows()
        self.writer.close()


def import_pyarrow() -> Any:
    """Return the package pyarrow. Raises ValueError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            "--format parquet needs the package pyarrow: pip install 'imago[parquet]'"
        ) from error
    return pyarrow


@contextmanager
def open_output(path: Path | None, is_binary: bool) -> Iterator[IO[Any]]:
    """Open what the results are written to: stdout, or a file that appears when it is complete.

    The file is written under another name in the same directory, and deleted if the block raises.
    Raises ValueError if it can't be written.
    """
    if path is None:
        yield sys.stdout
        return

    _check_replaceable(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _open_file(partial, is_binary) as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"--out {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _open_file(path: Path, is_binary: bool) -> IO[Any]:
    if is_binary:
        return path.open("xb")
    # A file name among the results may contain bytes that are not valid text.
    return path.open("x", encoding="utf-8", errors="backslashreplace", newline="")


def _check_replaceable(path: Path) -> None:
    """Raise ValueError if something else than a file has this path, such as a directory."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening the new file shows whether it can be written
    if not stat.S_ISREG(mode):
        raise ValueError(f"--out {path}: exists and is not a regular file; name another")
