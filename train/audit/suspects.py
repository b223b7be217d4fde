"""Suspicious labels of training data as the labelling page shows them."""

import cv2

from models.image.errors import ImageError
from models.kept import Verdict
from models.labelling import Item, NewLabel
from models.labelling.source import GivenLabel
from train.audit.editing import CorrectionEditor
from train.audit.findings import Findings, SuspectEntry
from train.data import DataError, ImageData
from train.data.corrections import Action, Correction
from train.data.pixels import to_image_bytes

WHO = "corrections"  # the file does not store who made a correction


class SuspectSource:
    """The suspicious labels that an audit lists; labels become corrections of the data."""

    saves_who = False
    allows_new_classes = False

    def __init__(self, data: ImageData, findings: Findings, editor: CorrectionEditor):
        self.data = data
        self.editor = editor
        self.location = str(editor.file)
        self.suspects: dict[str, SuspectEntry] = {}
        for suspect in findings["labels"]["suspects"]:
            self.suspects[suspect["file"]] = suspect

    def list_items(self) -> list[Item]:
        """Return the images, the most suspicious first."""
        corrections = {entry["path"]: entry for entry in self._read_corrections()}
        return [
            self._build_item(suspect, corrections.get(path))
            for path, suspect in self.suspects.items()
        ]

    def list_classes(self, items: list[Item]) -> list[str]:
        """Return the classes of the data."""
        return list(self.data.classes)

    def read_image(self, item_id: str) -> bytes:
        """Return an image as a file that browsers show."""
        suspect = self.suspects.get(item_id)
        if suspect is None:
            raise FileNotFoundError(item_id)
        try:
            return to_image_bytes(self.data.dataset.items[suspect["position"]])
        except (ImageError, cv2.error) as error:
            raise OSError(str(error)) from error

    def save(self, labels: list[NewLabel]) -> list[str]:
        """Save corrections: keep, relabel or leave out; a label taken back takes one out."""
        changes: list[Correction] = []
        removed: list[str] = []
        gone: list[str] = []
        for label in labels:
            suspect = self.suspects.get(label.id)
            if suspect is None:
                gone.append(label.id)
            elif label.verdict is Verdict.WITHDRAWN:
                removed.append(label.id)
            else:
                changes.append(_build_correction(suspect, label))
        try:
            self.editor.merge(changes, removed)
        except DataError as error:
            raise OSError(str(error)) from error
        return gone

    def _read_corrections(self) -> list[dict[str, str]]:
        try:
            return self.editor.read()
        except DataError as error:
            raise OSError(str(error)) from error

    def _build_item(self, suspect: SuspectEntry, correction: dict[str, str] | None) -> Item:
        given: GivenLabel | None = None
        if correction is not None:
            given = _describe(correction, suspect["label"])
        return Item(
            id=suspect["file"],
            guesses=[(suspect["suggested"], suspect["confidence"])],
            reasons=["suspicious label"],
            label=given,
            training_label=suspect["label"],
            arrived=-float(suspect["position"]),
        )


def _build_correction(suspect: SuspectEntry, label: NewLabel) -> Correction:
    path = suspect["file"]
    if label.verdict is not Verdict.CLASS:
        return Correction(path, Action.LEAVE_OUT)
    if label.label == suspect["label"]:
        return Correction(path, Action.KEEP)
    return Correction(path, Action.RELABEL, label.label)


def _describe(correction: dict[str, str], training_label: str) -> GivenLabel:
    action = correction["action"]
    if action == Action.LEAVE_OUT:
        return GivenLabel(Verdict.FOREIGN, "", WHO)
    label = correction["label"] if action == Action.RELABEL else training_label
    return GivenLabel(Verdict.CLASS, label, WHO)
