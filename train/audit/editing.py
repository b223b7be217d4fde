"""Corrections as the audit's page reads and saves them."""

import json
from pathlib import Path
from threading import Lock
from typing import Any

from train.data import DataError, ImageData
from train.data.corrections import (
    Action,
    Correction,
    check_label,
    explain_missing_location,
    merge_corrections,
    normalize_path,
    parse_action,
    read_corrections,
)


class CorrectionEditor:
    """The corrections of a data module's images. Several threads may use it at once."""

    def __init__(self, data: ImageData):
        """Raises DataError where the data has no place for corrections."""
        file = data.corrections_file
        if file is None:
            raise DataError(explain_missing_location(data.dataset, data.corrections))
        self.file: Path = file.absolute()
        self._classes = data.classes
        names = [data.dataset.items.name(i) for i in range(len(data.dataset.items))]
        self._names = {normalize_path(name): name for name in names}
        self._lock = Lock()

    def read(self) -> list[dict[str, str]]:
        """Return the columns of each correction, with paths as the audit writes them.

        Raises DataError for a file that can't be read.
        """
        try:
            corrections = read_corrections(self.file)
        except FileNotFoundError:
            return []
        return [self._with_image_name(correction).as_json() for correction in corrections]

    def _with_image_name(self, correction: Correction) -> Correction:
        name = self._names.get(normalize_path(correction.path), correction.path)
        return correction._replace(path=name)

    def save(self, content: bytes) -> int:
        """Merge corrections into the file; return how many it holds now.

        `content` is {"corrections": [{"path", "action", "label"}, …]} in JSON; a correction whose
        action is null is taken out. All are saved or none. Raises DataError for content, or for an
        existing file, that can't be used, and OSError where the file can't be written.
        """
        changes: list[Correction] = []
        removed: list[str] = []
        for entry in _parse_entries(content):
            path = self._parse_path(entry)
            if entry.get("action") is None:
                removed.append(path)
            else:
                changes.append(self._parse_correction(path, entry))
        return self.merge(changes, removed)

    def merge(self, changes: list[Correction], removed: list[str]) -> int:
        """Add corrections, take out those of some paths; return how many the file holds now.

        Raises DataError and OSError as `save` does.
        """
        with self._lock:
            return len(merge_corrections(self.file, changes, removed))

    def _parse_path(self, entry: dict[str, Any]) -> str:
        path = entry.get("path")
        name = self._names.get(normalize_path(path)) if isinstance(path, str) else None
        if name is None:
            raise DataError(f"{path!r} is not an image of the data; reload the page")
        return name

    def _parse_correction(self, path: str, entry: dict[str, Any]) -> Correction:
        action = parse_action(str(entry["action"]))
        if action is None:
            raise DataError(f"action {entry['action']!r} is not one of {', '.join(Action)}")
        if action is not Action.RELABEL:
            return Correction(path, action)
        label = str(entry.get("label") or "")
        check_label(path, label, self._classes)
        return Correction(path, action, label)


def _parse_entries(content: bytes) -> list[dict[str, Any]]:
    """Return the entries of a request. Raises DataError."""
    try:
        entries = json.loads(content)["corrections"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError('the request is not {"corrections": […]} in JSON') from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError("corrections: not a list of objects")
    return entries
