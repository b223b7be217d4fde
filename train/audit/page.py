"""The findings as one HTML page that loads nothing else: styles and thumbnails are inside."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from models.image import InputSpec, resize_to_input
from train.audit.duplicates import MIN_SIDE
from train.audit.findings import Findings, ImageEntry, Refusal
from train.audit.summary import pluralize
from train.data import ImageData
from train.data.pixels import to_image_bytes

THUMBNAIL_SIDE = 72  # pixels
LISTED = 48  # pairs or images in each section


def render_page(findings: Findings, data: ImageData) -> str:
    """Render the page of an audit."""

    def thumbnail(image: ImageEntry) -> Markup:
        return _thumbnail(data, image)

    template = _environment().get_template("audit.html")
    return template.render(findings=findings, listed=LISTED, min_side=MIN_SIDE, thumbnail=thumbnail)


def render_refusal(refusal: Refusal) -> str:
    """Render the page of data that can't be used."""
    template = _environment().get_template("refusal.html")
    return template.render(refusal=refusal, listed=LISTED)


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
        spec = InputSpec(
            height=THUMBNAIL_SIDE, width=THUMBNAIL_SIDE, channels=pixels.shape[2], resize="pad"
        )
        pixels = resize_to_input(pixels, spec)
    content = base64.b64encode(to_image_bytes(pixels)).decode()
    tag = Markup('<img src="data:image/png;base64,{}" alt="{}" title="{}">')
    return tag.format(content, image["label"], image["file"])
