"""Corrections of a data set: which images keep their label, get another one, or are left out.

The audit's page writes them, and each command applies them when it opens the data:

    path,action,label
    daisy/001.jpg,keep,
    daisy/007.jpg,relabel,rose
    rose/013.jpg,leave out,

The file is corrections.csv in the folder of the data, or photos.corrections.csv beside photos.csv.
Paths are relative to the folder, or as in the CSV file. `keep` changes nothing: the audit shows the
image as reviewed.
"""

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.durable_files import open_replacement
from train.data.source import (
    AppliedCorrections,
    DataError,
    FileItems,
    LabelledImages,
    expand_home,
    normalize_name,
    notify,
)
from train.data.sources.csv_file import DELIMITERS, read_text, split_line

COLUMNS = ("path", "action", "label")
LISTED_CLASSES = 20  # classes that a message names


class Action(StrEnum):
    """What is done with an image."""

    KEEP = "keep"
    RELABEL = "relabel"
    LEAVE_OUT = "leave out"


class Correction(NamedTuple):
    """The correction of one image."""

    path: str
    action: Action
    label: str = ""  # the new class of a relabelled image
    line: int = 0  # in the file; 0 for a correction that is not from a file

    def as_json(self) -> dict[str, str]:
        """Return the columns of the file by name."""
        return {"path": self.path, "action": self.action.value, "label": self.label}


# Where the file is


def locate_corrections(dataset: LabelledImages, setting: str | None) -> Path | None:
    """Return the file of a data set's corrections, which may not exist yet; None without one.

    `setting` is a path, None for the default place, or empty for no corrections. Raises DataError
    for a path where corrections are not supported.
    """
    if setting == "":
        return None
    if not supports_corrections(dataset):
        if setting is not None:
            raise DataError(f"data.corrections: {explain_missing_location(dataset, setting)}")
        return None
    return dataset.corrections_file if setting is None else expand_home(setting)


def supports_corrections(dataset: LabelledImages) -> bool:
    """Whether images have paths that a correction can name."""
    return isinstance(dataset.items, FileItems)


def explain_missing_location(dataset: LabelledImages, setting: str | None) -> str:
    """Return in one line why `locate_corrections` returns no file, and what to do."""
    if not supports_corrections(dataset):
        return (
            f"corrections are not supported for {dataset.name}, whose images are not files; use a "
            "folder or a CSV file"
        )
    if setting == "":
        return "corrections are turned off; leave out data.corrections, or set it to a file"
    return f"{dataset.name} has no place for corrections; set data.corrections to a file"


# Reading


def read_corrections(file: Path) -> list[Correction]:
    """Read a file of corrections; each path occurs once.

    Raises FileNotFoundError, or DataError that names the line.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    text = read_text(file)
    delimiter, names = _parse_header(file, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    corrections: dict[str, Correction] = {}
    try:
        next(reader)
        for fields in reader:
            if not any(fields):
                continue
            correction = _parse_row(file, reader.line_num, fields, names)
            key = normalize_path(correction.path)
            _check_agreement(file, corrections.get(key), correction)
            corrections.setdefault(key, correction)
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: {error}") from error
    return list(corrections.values())


def _parse_header(file: Path, text: str) -> tuple[str, list[str]]:
    """Return the delimiter, and the names of the columns in their order."""
    first_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    for delimiter in DELIMITERS:
        names = [name.lower() for name in split_line(first_line, delimiter)]
        if sorted(names) == sorted(COLUMNS):
            return delimiter, names
    raise DataError(
        f"{file}: line 1: must name the columns {','.join(COLUMNS)}; it is {first_line[:80]!r} "
        "(data.corrections names another file, or none if it is empty)"
    )


def _parse_row(file: Path, number: int, fields: list[str], names: list[str]) -> Correction:
    line = f"{file}: line {number}"
    if len(fields) > len(names):
        raise DataError(
            f"{line}: {len(fields)} fields, but the first line names {len(names)}; put a path that "
            "holds the separator in double quotes"
        )
    values = dict(zip(names, fields, strict=False))
    path = values["path"]
    if not path or "\0" in path:
        raise DataError(f"{line}: lacks a path")

    action = parse_action(values.get("action", ""))
    if action is None:
        raise DataError(
            f"{line}: action {values.get('action', '')!r} is not one of {', '.join(Action)}"
        )
    label = normalize_name(values.get("label", "").strip())
    if action is not Action.RELABEL and label:
        raise DataError(
            f"{line}: {action.value} takes no label; leave {label!r} out, or write relabel"
        )
    return Correction(path, action, label, number)


def parse_action(text: str) -> Action | None:
    """Return the action of a name such as "Leave-out"; None for any other text."""
    name = re.sub(r"[\s_-]+", " ", text.strip().lower())
    return Action(name) if name in list(Action) else None


def _check_agreement(file: Path, first: Correction | None, second: Correction) -> None:
    """Raise DataError for two different corrections of one path."""
    if first is None or (first.action, first.label) == (second.action, second.label):
        return
    raise DataError(
        f"{file}: line {second.line}: {second.path} has another correction in line {first.line}; "
        "remove one of them"
    )


def normalize_path(path: str) -> str:
    """Return the form in which paths are compared: slashes, composed letters, no leading `./`."""
    path = normalize_name(path.replace("\\", "/"))
    return path.removeprefix("./")


# Applying


def apply_corrections(
    dataset: LabelledImages, corrections: Sequence[Correction], file: Path
) -> LabelledImages:
    """Return the data set with its labels corrected, and with the images that are left out marked.

    Corrections of images that are gone are counted in one line and ignored. Raises DataError for a
    label that is not a class.
    """
    by_path = {normalize_path(correction.path): correction for correction in corrections}
    class_numbers = {name: k for k, name in enumerate(dataset.classes)}
    labels = dataset.labels.copy()
    excluded = np.zeros(len(labels), bool)
    reviewed = np.zeros(len(labels), bool)
    present = set()
    for i in range(len(labels)):
        path = normalize_path(dataset.items.name(i))
        correction = by_path.get(path)
        if correction is None:
            continue
        present.add(path)
        reviewed[i] = True
        if correction.action is Action.LEAVE_OUT:
            excluded[i] = True
        elif correction.action is Action.RELABEL:
            check_label(f"{file}: line {correction.line}", correction.label, dataset.classes)
            labels[i] = class_numbers[correction.label]

    applied = AppliedCorrections(file, dataset.labels, excluded, reviewed)
    corrected = replace(dataset, labels=labels, corrections=applied)
    gone = [correction.path for path, correction in by_path.items() if path not in present]
    _report(file, corrected, gone)
    return corrected


def check_label(place: str, label: str, classes: list[str]) -> None:
    """Raise DataError, beginning with `place`, for a label that is not one of the classes."""
    if label in classes:
        return
    listed = ", ".join(classes[:LISTED_CLASSES])
    if len(classes) > LISTED_CLASSES:
        listed += f" and {len(classes) - LISTED_CLASSES} more"
    problem = f"label {label!r} is not a class" if label else "relabel needs a label"
    raise DataError(f"{place}: {problem}; the classes are {listed}")


def _report(file: Path, dataset: LabelledImages, gone: list[str]) -> None:
    """Print how many corrections are applied, and how many can't be."""
    relabelled = dataset.count_relabelled()
    excluded = dataset.count_excluded()
    if relabelled or excluded:
        notify(f"{file}: corrections applied: {relabelled} relabelled, {excluded} left out")
    if gone:
        notify(
            f"WARNING: {file}: {len(gone)} of its paths are not in the data, such as {gone[0]}; "
            "they are ignored"
        )


# Writing


def merge_corrections(
    file: Path, changes: Iterable[Correction], removed: Iterable[str] = ()
) -> list[Correction]:
    """Add corrections to a file, or create it; the last one of a path counts.

    Corrections of the paths in `removed` are taken out. The file appears complete or stays as it
    is, and is on the disk when this returns. Returns all corrections. Raises OSError, or DataError
    for an existing file that can't be read.
    """
    try:
        existing = read_corrections(file)
    except FileNotFoundError:
        existing = []
    merged = {normalize_path(correction.path): correction for correction in existing}
    for correction in changes:
        merged[normalize_path(correction.path)] = correction
    for path in removed:
        merged.pop(normalize_path(path), None)

    corrections = list(merged.values())
    target = file.resolve()  # the target of a link is replaced, not the link
    with open_replacement(target, f".{target.name}-{os.getpid()}") as output:
        output.write(format_corrections(corrections).encode())
    return corrections


def format_corrections(corrections: Iterable[Correction]) -> str:
    """Return the content of a file of corrections."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for correction in corrections:
        writer.writerow(correction.as_json())
    return text.getvalue()
