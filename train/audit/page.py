"""The findings as one HTML page that loads nothing else: styles and thumbnails are inside.

Its buttons correct the data: they save to the server of train/audit/server.py, or offer a download
where the page is opened as a file.
"""

import base64
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from models.image import InputSpec, resize_to_input
from train.audit.duplicates import MIN_SIDE
from train.audit.editing import CorrectionEditor
from train.audit.findings import Findings, ImageEntry, Refusal
from train.audit.summary import pluralize
from train.data import DataError, ImageData
from train.data.pixels import to_image_bytes

THUMBNAIL_SIDE = 144  # pixels
JPEG_QUALITY = 80  # of the thumbnails of larger images
LISTED = 48  # pairs or images in each section


def render_page(findings: Findings, data: ImageData) -> str:
    """Render the page of an audit."""

    def thumbnail(image: ImageEntry) -> Markup:
        return _thumbnail(data, image)

    groups = {
        "leakage": _names_at(data, findings["leakage"]["test"]["positions"]),
        "leakage-val": _names_at(data, findings["leakage"]["val"]["positions"]),
        "unreadable": [file["file"] for file in findings["unreadable"]],
    }
    template = _environment().get_template("audit.html")
    return template.render(
        findings=findings,
        listed=LISTED,
        min_side=MIN_SIDE,
        thumbnail=thumbnail,
        **_describe_editing(data, groups),
    )


def render_refusal(refusal: Refusal, data: ImageData) -> str:
    """Render the page of data that can't be used."""
    groups = {"unreadable": [file["file"] for file in refusal["unreadable"]]}
    template = _environment().get_template("refusal.html")
    return template.render(refusal=refusal, listed=LISTED, **_describe_editing(data, groups))


def _names_at(data: ImageData, positions: list[int]) -> list[str]:
    return [data.dataset.items.name(i) for i in positions]


def _describe_editing(data: ImageData, groups: dict[str, list[str]]) -> dict[str, Any]:
    """Return what the template needs to correct images, or why they can't be corrected.

    `groups`: images that one button leaves out, by section.
    """
    try:
        editor = CorrectionEditor(data)
    except DataError as error:
        return {"editing": None, "missing": str(error)}
    editing = {
        "file": str(editor.file),
        "name": editor.file.name,
        "classes": data.classes,
        "corrections": editor.read(),
        "groups": groups,
    }
    return {"editing": editing, "missing": ""}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("train.audit"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["thousands"] = _format_thousands
    environment.filters["percent"] = _format_percent
    environment.filters["pluralize"] = pluralize
    return environment


def _format_thousands(count: int) -> str:
    return f"{count:,}"


def _format_percent(share: float, digits: int) -> str:
    return f"{share:.{digits}%}"


def _thumbnail(data: ImageData, image: ImageEntry) -> Markup:
    """Return an <img> that holds the image's pixels, reduced to THUMBNAIL_SIDE."""
    pixels = data.decoded.pixels[image["position"]]
    if max(pixels.shape[:2]) > THUMBNAIL_SIDE:
        source = _encode_photo(pixels)
        tag = Markup('<img class="photo" src="{}" alt="{}" title="{}">')
    else:
        source = "data:image/png;base64," + base64.b64encode(to_image_bytes(pixels)).decode()
        tag = Markup('<img src="{}" alt="{}" title="{}">')
    return tag.format(source, image["label"], image["file"])


def _encode_photo(pixels: np.ndarray) -> str:
    """Return uint8 [H, W, C], reduced to THUMBNAIL_SIDE, as the URL of a JPEG."""
    channels = pixels.shape[2]
    spec = InputSpec(height=THUMBNAIL_SIDE, width=THUMBNAIL_SIDE, channels=channels, resize="pad")
    reduced = resize_to_input(pixels, spec)
    if channels > 1:
        reduced = cv2.cvtColor(reduced, cv2.COLOR_RGB2BGR)
    content = cv2.imencode(".jpg", reduced, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()
