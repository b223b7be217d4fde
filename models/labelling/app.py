"""The requests of the labelling page, whichever server receives them.

GET  label                     the page
GET  label/page/<file>         its script and styles
GET  label/items               the next images, the classes and the progress
GET  label/images/<id>         an image
GET  label/similar/<id>        images without a label that look like it
POST label/labels              save labels
"""

import hashlib
import json
import threading
import time
import unicodedata
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from models.image import ImageError, read_header
from models.kept import Verdict
from models.kept.records import MAX_LABEL_CHARACTERS, MAX_WHO_CHARACTERS
from models.labelling.order import ORDERS, find_look_alikes
from models.labelling.source import GivenLabel, Item, LabelSource, NewLabel

MAX_BODY_BYTES = 1 << 20
MAX_LABELS = 1000  # of one request
MAX_ITEMS = 200
DEFAULT_ITEMS = 40
LEASE_SECONDS = 300.0  # for which other people get other images first

DIRECTORY = Path(__file__).parent / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
PAGE_FILES = {path.name: path.read_bytes() for path in sorted(DIRECTORY.iterdir())}
PAGE_VERSION = hashlib.sha256(b"".join(PAGE_FILES.values())).hexdigest()[:16]
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
JSON_TYPE = "application/json"
SHOWN = ("unlabelled", "conflicts", "labelled")


class LabelProblem(Exception):
    """A request that gets an error; the message is shown on the page."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class LabelReply:
    """An answer to the page."""

    body: bytes
    content_type: str = JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)


class LabelApp:
    """Answers the page. Threads may call it at once."""

    def __init__(self, source: LabelSource):
        self.source = source
        self.save_lock = threading.Lock()
        # Who has which image on the page: by id, the client and the time of time.monotonic().
        self.leases: dict[str, tuple[str, float]] = {}

    def handle(self, method: str, path: str, query: dict[str, str], body: bytes) -> LabelReply:
        """Answer a request; `path` begins with "label". Raises LabelProblem."""
        _, _, rest = path.strip("/").partition("/")
        name, _, item_id = rest.partition("/")
        if name == "" or name == "page":
            return read_page_file(item_id or "label.html")
        try:
            if (method, name) == ("GET", "items"):
                return self._list_items(query)
            if (method, name) == ("GET", "images"):
                return self._read_image(item_id)
            if (method, name) == ("GET", "similar"):
                return self._find_similar(item_id)
            if (method, name) == ("POST", "labels"):
                return self._save_labels(body)
        except OSError as error:
            reason = error.strerror or str(error)
            raise LabelProblem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self.source.location}: {reason}; nothing was saved, try again",
            ) from error
        raise LabelProblem(HTTPStatus.NOT_FOUND, "this path does not exist")

    # Reading

    def _list_items(self, query: dict[str, str]) -> LabelReply:
        order = query.get("order", "teach")
        shown = query.get("show", "unlabelled")
        limit_text = query.get("limit", str(DEFAULT_ITEMS))
        if order not in ORDERS or shown not in SHOWN or not limit_text.isdecimal():
            raise LabelProblem(
                HTTPStatus.BAD_REQUEST,
                f"order can be {', '.join(ORDERS)}; show can be {', '.join(SHOWN)}; limit is a "
                "number",
            )
        limit = min(int(limit_text[:9]), MAX_ITEMS)
        client = query.get("client", "")

        items = self.source.list_items()
        labelled = [item for item in items if item.label is not None]
        _, sort = ORDERS[order]
        chosen = sort(self._choose(items, shown, client), labelled, limit)
        self._lease(chosen, client)
        return _json(
            {
                "page": PAGE_VERSION,
                "location": self.source.location,
                "saves_who": self.source.saves_who,
                "allows_new_classes": self.source.allows_new_classes,
                "orders": {key: text for key, (text, _) in ORDERS.items()},
                "classes": self.source.list_classes(items),
                "total": len(items),
                "labelled": len(labelled),
                "conflicts": sum(1 for item in items if item.others),
                "items": [_describe_item(item) for item in chosen],
            }
        )

    def _choose(self, items: list[Item], shown: str, client: str) -> list[Item]:
        """Return the images to show; those on the page of other people only if no others are."""
        if shown == "conflicts":
            return [item for item in items if item.others]
        if shown == "labelled":
            return [item for item in items if item.label is not None]
        unlabelled = [item for item in items if item.label is None]
        oldest = time.monotonic() - LEASE_SECONDS
        free: list[Item] = []
        for item in unlabelled:
            owner, leased = self.leases.get(item.id, (client, 0.0))
            if owner == client or leased < oldest:
                free.append(item)
        return free or unlabelled

    def _lease(self, items: list[Item], client: str) -> None:
        now = time.monotonic()
        oldest = now - LEASE_SECONDS
        for item_id, (_, leased) in list(self.leases.items()):
            if leased < oldest:
                self.leases.pop(item_id, None)
        if client:
            for item in items:
                self.leases[item.id] = (client, now)

    def _read_image(self, item_id: str) -> LabelReply:
        try:
            content = self.source.read_image(item_id)
        except FileNotFoundError as error:
            raise LabelProblem(HTTPStatus.NOT_FOUND, "this image is gone") from error
        try:
            content_type = f"image/{read_header(content).format}"
        except ImageError:
            content_type = "application/octet-stream"
        return LabelReply(content, content_type, {"Content-Security-Policy": "sandbox"})

    def _find_similar(self, item_id: str) -> LabelReply:
        items = self.source.list_items()
        by_id = {item.id: item for item in items}
        if item_id not in by_id:
            raise LabelProblem(HTTPStatus.NOT_FOUND, "this image is gone")
        unlabelled = [item for item in items if item.label is None]
        similar = find_look_alikes(by_id[item_id], unlabelled)
        return _json({"items": [_describe_item(item) for item in similar]})

    # Saving

    def _save_labels(self, body: bytes) -> LabelReply:
        content = parse_body(body)
        if content.get("page") != PAGE_VERSION:
            raise LabelProblem(
                HTTPStatus.CONFLICT,
                "this page is of another version than the server; reload it, no label is lost",
            )
        labels = parse_labels(content)
        self._check_classes(labels)
        with self.save_lock:
            gone = self.source.save(labels)
        for label in labels:
            self.leases.pop(label.id, None)
        items = self.source.list_items()
        labelled = sum(1 for item in items if item.label is not None)
        return _json(
            {
                "saved": len(labels) - len(gone),
                "gone": gone,
                "total": len(items),
                "labelled": labelled,
            }
        )

    def _check_classes(self, labels: list[NewLabel]) -> None:
        """Raise LabelProblem for a class that is not known, where that is not allowed."""
        if self.source.allows_new_classes:
            return
        known = set(self.source.list_classes(self.source.list_items()))
        for label in labels:
            if label.verdict is Verdict.CLASS and label.label not in known:
                raise LabelProblem(
                    HTTPStatus.BAD_REQUEST, f"label {label.label!r} is not a class of the data"
                )


def read_page_file(name: str) -> LabelReply:
    """Return a file of the page. Raises LabelProblem 404."""
    content = PAGE_FILES.get(name)
    if content is None:
        raise LabelProblem(HTTPStatus.NOT_FOUND, "this path does not exist")
    headers = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "same-origin"}
    return LabelReply(content, CONTENT_TYPES[Path(name).suffix], headers)


def parse_labels(content: dict[str, Any]) -> list[NewLabel]:
    """Return the labels of a request. Raises LabelProblem 400."""
    entries = content.get("labels")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_LABELS:
        raise LabelProblem(HTTPStatus.BAD_REQUEST, f"labels must be a list of 1 to {MAX_LABELS}")
    labels: list[NewLabel] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise LabelProblem(HTTPStatus.BAD_REQUEST, "each label must be an object")
        labels.append(_parse_label(entry))
    return labels


def _parse_label(entry: dict[str, Any]) -> NewLabel:
    item_id = entry.get("id")
    verdict = entry.get("verdict")
    if not isinstance(item_id, str) or verdict not in list(Verdict):
        raise LabelProblem(
            HTTPStatus.BAD_REQUEST, f"a label needs an id, and a verdict: {', '.join(Verdict)}"
        )
    who = _clean_text(entry.get("who"), MAX_WHO_CHARACTERS, "who")
    if not who:
        raise LabelProblem(HTTPStatus.BAD_REQUEST, "who is missing: give your name")
    label = ""
    if verdict == Verdict.CLASS:
        label = _clean_text(entry.get("label"), MAX_LABEL_CHARACTERS, "label")
        if not label:
            raise LabelProblem(HTTPStatus.BAD_REQUEST, "label is missing: give the class")
    return NewLabel(item_id, Verdict(verdict), label, who)


def _clean_text(text: Any, most: int, name: str) -> str:
    """Return a text with composed letters and without spaces around it. Raises LabelProblem."""
    if text is None:
        return ""
    if not isinstance(text, str) or not text.isprintable():
        raise LabelProblem(HTTPStatus.BAD_REQUEST, f"{name} is not plain text")
    cleaned = unicodedata.normalize("NFC", text).strip()
    if len(cleaned) > most:
        raise LabelProblem(HTTPStatus.BAD_REQUEST, f"{name} has more than {most} characters")
    return cleaned


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the object of a body in JSON. Raises LabelProblem 400."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LabelProblem(HTTPStatus.BAD_REQUEST, "the body is not JSON") from error
    if not isinstance(content, dict):
        raise LabelProblem(HTTPStatus.BAD_REQUEST, "the body is not an object")
    return content


def _describe_item(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "guesses": [{"label": label, "confidence": value} for label, value in item.guesses],
        "reasons": item.reasons,
        "label": None if item.label is None else _describe_label(item.label),
        "others": [_describe_label(other) for other in item.others],
        "training_label": item.training_label,
    }


def _describe_label(label: GivenLabel) -> dict[str, str]:
    return {"verdict": label.verdict.value, "label": label.label, "who": label.who}


def _json(value: object) -> LabelReply:
    return LabelReply(json.dumps(value, separators=(",", ":")).encode())
