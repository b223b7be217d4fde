"""A CSV file of paths and labels."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.image.files import read_regular_file
from train.data.source import (
    CORRECTIONS_FILE,
    DataError,
    FileItems,
    LabelledImages,
    number_classes,
    parse_part,
)

DELIMITERS = ",;\t|"
# Names of columns, in lower case and without spaces and underscores. The first one is the plain
# name, which has precedence over the others.
PATH_COLUMNS = ("path", "paths", "file", "filename", "filepath", "filepaths", "image", "imagepath")
LABEL_COLUMNS = ("label", "labels", "class", "classname", "category")
SPLIT_COLUMNS = ("split", "set", "dataset", "subset", "part", "partition")
FLAG_COLUMNS = {"isvalid": "val", "isval": "val", "istest": "test"}  # true names the part
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


class Columns(NamedTuple):
    """Positions of the columns in a row."""

    path: int
    label: int
    split: int | None
    flags: dict[int, str]  # position -> part where the value is true
    names: list[str]  # of all columns


class Row(NamedTuple):
    """One image."""

    path: str
    label: str
    part: str


def read_csv(path: Path) -> LabelledImages:
    """Read a CSV file whose first line names the columns path and label, and optionally split.

    A split is train, val or test, or a common name of these; a column is_valid or is_test is taken
    as well. Fields are separated by commas, semicolons, tabs or bars. Paths are relative to the
    file's own folder, with slashes or backslashes. Missing images count as unreadable. Raises
    DataError that names the line.
    """
    rows = list(_read_rows(path))
    if not rows:
        raise DataError(f"{path}: no rows")

    classes, labels = number_classes([row.label for row in rows])
    parts = np.array([row.part for row in rows])
    items = FileItems(path.parent, [_to_posix(path.parent, row.path) for row in rows])
    corrections_file = path.with_name(f"{path.stem}.{CORRECTIONS_FILE}")
    return LabelledImages(
        path.stem, classes, items, labels, parts, corrections_file=corrections_file
    )


def _read_rows(path: Path) -> Iterator[Row]:
    """Parse the file. Raises DataError."""
    text = read_text(path)
    columns, delimiter = _parse_header(path, text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        next(reader)
        for fields in reader:
            if fields:
                yield _parse_row(f"{path}: line {reader.line_num}", fields, columns)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def read_text(path: Path) -> str:
    """Read the file as UTF-8, or as UTF-16 where it begins with a byte-order mark."""
    try:
        content = read_regular_file(path)
    except OSError as error:
        raise DataError(f"{path}: not readable as a CSV file: {error}") from error

    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: not readable as a CSV file: a byte that is not UTF-8; save the "
            "file as UTF-8"
        ) from error


def _parse_header(path: Path, text: str) -> tuple[Columns, str]:
    """Return the columns and the delimiter of the fields."""
    first_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    headers = {
        delimiter: split_line(first_line, delimiter)
        for delimiter in DELIMITERS
        if delimiter in first_line
    }
    for delimiter, names in headers.items():
        if _find_columns(names, PATH_COLUMNS) and _find_columns(names, LABEL_COLUMNS):
            return _parse_columns(path, names), delimiter

    names = max(headers.values(), key=len, default=[first_line])
    return _parse_columns(path, names), ","


def split_line(line: str, delimiter: str) -> list[str]:
    """Return the fields of one line, without the blanks around them."""
    fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [field.strip() for field in fields]


def _parse_columns(path: Path, names: list[str]) -> Columns:
    """Find the columns in a header. Raises DataError where one is missing or ambiguous."""
    path_column = _find_column(path, names, PATH_COLUMNS)
    label_column = _find_column(path, names, LABEL_COLUMNS)
    for plain_name, column in (("path", path_column), ("label", label_column)):
        if column is None:
            present = ", ".join(name for name in names if name) or "nothing"
            raise DataError(f"{path}: no column {plain_name!r} in the first line; it has {present}")
    assert path_column is not None
    assert label_column is not None

    flags = {}
    for position, name in enumerate(names):
        part = FLAG_COLUMNS.get(_simplify_name(name))
        if part is not None:
            flags[position] = part
    split_column = _find_column(path, names, SPLIT_COLUMNS)
    return Columns(path_column, label_column, split_column, flags, names)


def _find_column(path: Path, names: list[str], wanted: tuple[str, ...]) -> int | None:
    """Return the position of a column; None without one. Raises DataError for two of them."""
    positions = _find_columns(names, wanted)
    if len(positions) > 1:
        listed = " and ".join(repr(names[position]) for position in positions)
        raise DataError(
            f"{path}: line 1: columns {listed} could both be the {wanted[0]}; name one of them "
            f"{wanted[0]} and rename the others"
        )
    return positions[0] if positions else None


def _find_columns(names: list[str], wanted: tuple[str, ...]) -> list[int]:
    """Return the positions of columns with the plain name, or else with any of the others."""
    simple_names = [_simplify_name(name) for name in names]
    plain = [position for position, name in enumerate(simple_names) if name == wanted[0]]
    return plain or [position for position, name in enumerate(simple_names) if name in wanted]


def _simplify_name(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _parse_row(line: str, fields: list[str], columns: Columns) -> Row:
    """Parse one row. Raises DataError, beginning with `line`, where it can't be used."""
    count = len(columns.names)
    if len(fields) > count and any(fields[count:]):
        raise DataError(
            f"{line}: {len(fields)} fields, but the first line names {count}; put a label that "
            "holds the separator in double quotes"
        )
    fields = fields + [""] * (count - len(fields))

    path = fields[columns.path]
    label = fields[columns.label].strip()
    if not path or not label:
        raise DataError(f"{line} lacks a path or a label")
    if "\0" in path:
        raise DataError(f"{line}: a NUL byte in the path; write the file as UTF-8 text")
    if "\n" in label or "\r" in label:
        raise DataError(f"{line}: the label holds a line break; close its double quotes")
    return Row(path, label, _parse_row_part(line, fields, columns))


def _parse_row_part(line: str, fields: list[str], columns: Columns) -> str:
    """Return train, val or test, as the split column or the flags say."""
    if columns.split is not None and fields[columns.split].strip():
        name = columns.names[columns.split]
        value = fields[columns.split]
        part = parse_part(value)
        if part is None:
            raise DataError(f"{line}: {name} {value!r} is not one of train, val, test")
        return part

    for position, part in columns.flags.items():
        value = fields[position].strip().lower()
        if value not in FLAGS:
            raise DataError(f"{line}: {columns.names[position]} {value!r} is not true or false")
        if FLAGS[value]:
            return part
    return "train"


def _to_posix(folder: Path, path: str) -> str:
    """Return a path with backslashes as slashes, where no file has the name as written."""
    if "\\" not in path or (folder / path).exists():
        return path
    return path.replace("\\", "/")
