"""The findings as one HTML page that needs nothing else: styles and thumbnails are inside."""

import base64
from collections.abc import Callable
from html import escape
from typing import Any

from models.image import InputSpec, resize_to_input
from train.audit.duplicates import LEAST
from train.data import ImageData
from train.data.pixels import to_image_bytes

THUMBNAIL = 72  # pixels
SHOWN = 48  # pairs or images of a kind

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #66727f; --line: #dfe4ea; --card: #fff; --back: #f5f7f9;
  --good: #1a7f4b; --warn: #b25e09; --bad: #c02b30; --bar: #4c7bd9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e5eaf0; --soft: #97a3b0; --line: #2c3641; --card: #19212a;
  --back: #10161d; --good: #4cc38a; --warn: #f0a04b; --bad: #ff6b70; --bar: #6d9bf5 } }
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back) }
main { max-width: 1080px; margin: auto; padding: 32px 20px 64px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 18px; margin: 0 0 4px } p { margin: 4px 0 12px; color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin-top: 20px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; color: inherit;
  text-decoration: none }
.tile b { display: block; font-size: 24px; line-height: 1.3 } .tile span { color: var(--soft); font-size: 13px }
.good b { color: var(--good) } .warn b { color: var(--warn) } .bad b { color: var(--bad) }
.alarm { border-left: 6px solid var(--bad); font-weight: 600 }
.grid { display: flex; flex-wrap: wrap; gap: 12px }
figure { margin: 0; width: 164px; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere }
figure.one { width: 104px } figure div { display: flex; gap: 4px }
img { width: 72px; height: 72px; border-radius: 6px; image-rendering: pixelated; background: var(--line) }
figcaption { margin-top: 4px; color: var(--soft) } figcaption b { color: var(--ink) } .bad-text { color: var(--bad) }
table { border-collapse: collapse; width: 100%; font-size: 14px } td, th { padding: 4px 10px 4px 0; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; width: 70px } td.w { width: 45% }
.bar { height: 10px; border-radius: 5px; background: var(--bar) } code { font-size: 13px }
"""

TEST_LEAK = (
    "test images ({share:.2%}) have an exact or near duplicate in the data that is trained on. They make the "
    "test figures look better than they are; figures are given with and without them."
)
VAL_LEAK = (
    "validation images ({share:.2%}) have an exact or near duplicate in the training part. The best epoch, the "
    "temperature, the thresholds and the prediction sets are chosen with them, so answers are surer than they "
    "should be."
)


def _text(value: str) -> str:
    """Safe inside HTML, also where a file's name holds bytes that are no text."""
    return escape(value.encode("utf-8", "replace").decode())


def render(findings: dict[str, Any], data: ImageData) -> str:
    leak, held = (findings["leakage"][part] for part in ("test", "val"))
    label, near = findings["labels"], findings["near_duplicates"]
    tiles = [
        ("leakage", leak["count"], f"leaked test images ({leak['share']:.1%})", "bad"),
        ("leakage-val", held["count"], f"leaked validation images ({held['share']:.1%})", "bad"),
        ("unreadable", len(findings["unreadable"]), "unreadable files", "bad"),
        ("exact", findings["exact_duplicates"]["count"], "exact duplicates", "warn"),
        (
            "near",
            near["count"],
            "near duplicates"
            + (
                " (not looked for)"
                if not near["looked_for"]
                else ""
                if near["complete"]
                else " or more"
            ),
            "warn",
        ),
        ("labels", label["count"], "doubtful labels", "warn"),
        (
            "classes",
            sum(bool(row["note"]) for row in findings["class_counts"]),
            "rare classes",
            "warn",
        ),
        ("odd", findings["odd"]["count"], "odd sizes and modes", "warn"),
    ]
    counts = ", ".join(f"{count:,} {part}" for part, count in findings["counts"].items())
    thumbnail = _thumbnails(data)
    return f"""{_head(findings["source"])}
<p><b>{_text(findings["source"])}</b>: {counts} images of {len(findings["classes"])} classes.
Digest <code>{
        findings["digest"][:16]
    }</code>. All that is listed here in part is in full count in audit.json.</p>
<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>
{_alarm("leakage", leak, TEST_LEAK)}{_alarm("leakage-val", held, VAL_LEAK)}{
        _unreadable(findings["unreadable"])
    }
{
        _pairs(
            "exact",
            "Exact duplicates",
            "The same file more than once.",
            findings["exact_duplicates"],
            thumbnail,
        )
    }
{
        _pairs(
            "near",
            "Near duplicates",
            "The same picture but for brightness, colour, a frame or a slight crop.",
            near,
            thumbnail,
        )
    }
{_labels(label, thumbnail)}{_classes(findings["class_counts"])}{_odd(findings["odd"], thumbnail)}
</main></html>
"""


def refusal(findings: dict[str, Any]) -> str:
    """The page for data that was refused."""
    return f"""{_head(findings["source"])}
<p>All files that can't be read are in audit.json; the first are listed here.</p>
<section class="alarm">{_text(findings["problem"])}</section>{_unreadable(findings["unreadable"])}
</main></html>
"""


def _head(source: str) -> str:
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Data audit: {_text(source)}</title><style>{STYLE}</style>
<main><h1>Data audit</h1>"""


def _thumbnails(data: ImageData) -> Callable[[dict[str, Any]], str]:
    """From an image of the findings to its <img>."""

    def draw(image: dict[str, Any]) -> str:
        pixels = data.decoded.pixels[image["position"]]
        if max(pixels.shape[:2]) > THUMBNAIL:
            pixels = resize_to_input(
                pixels,
                InputSpec(
                    height=THUMBNAIL, width=THUMBNAIL, channels=pixels.shape[2], resize="pad"
                ),
            )
        code = base64.b64encode(to_image_bytes(pixels)).decode()
        return f'<img src="data:image/png;base64,{code}" alt="{_text(image["label"])}" title="{_text(image["file"])}">'

    return draw


def _tile(anchor: str, count: int, text: str, level: str) -> str:
    return f'<a class="tile {level if count else "good"}" href="#{anchor}"><b>{count:,}</b><span>{text}</span></a>'


def _section(anchor: str, title: str, text: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{title}</h2><p>{text}</p>{body}</section>'


def _alarm(anchor: str, leak: dict[str, Any], text: str) -> str:
    if not leak["count"]:
        return ""
    return f'<section id="{anchor}" class="alarm">{leak["count"]:,} {text.format(share=leak["share"])}</section>'


def _unreadable(files: list[dict[str, str]]) -> str:
    if not files:
        return ""
    rows = "".join(
        f"<tr><td>{_text(f['file'])}</td><td>{_text(f['problem'])}</td></tr>" for f in files[:SHOWN]
    )
    return _section(
        "unreadable", "Unreadable files", "They are left out of training.", f"<table>{rows}</table>"
    )


def _pairs(anchor: str, title: str, text: str, found: dict[str, Any], thumbnail: Callable) -> str:
    if not found.get("looked_for", True):
        return _section(
            anchor,
            title,
            text,
            f"Not looked for: that takes images of {LEAST} pixels a side or more.",
        )
    if not found["count"]:
        return ""
    figures = []
    for pair in found["pairs"][:SHOWN]:
        one, two = pair["first"], pair["second"]
        lines = [f"<b>{one['part']} / {two['part']}</b>", _text(one["file"]), _text(two["file"])]
        if one["label"] != two["label"]:
            lines.insert(
                1, f'<span class="bad-text">{_text(one["label"])} / {_text(two["label"])}</span>'
            )
        figures.append(
            f"<figure><div>{thumbnail(one)}{thumbnail(two)}</div><figcaption>{'<br>'.join(lines)}</figcaption>"
            "</figure>"
        )
    text = f"{text} {found['count']:,} pairs, {found['across_parts']:,} across parts, which come first."
    return _section(anchor, title, text, f'<div class="grid">{"".join(figures)}</div>')


def _labels(found: dict[str, Any], thumbnail: Callable) -> str:
    if not found["count"]:
        return ""
    figures = "".join(
        f'<figure class="one">{thumbnail(image)}<figcaption><b>{_text(image["label"])}</b><br>rather '
        f"<b>{_text(image['suggested'])}</b> ({image['confidence']:.0%})<br>{_text(image['file'])}</figcaption>"
        "</figure>"
        for image in found["suspects"][:SHOWN]
    )
    text = (
        f"A first, simple model that did not see these images ({found['accuracy']:.0%} accurate) is sure of "
        "another class. Most doubtful first; the better the model, the more this list is worth."
    )
    return _section("labels", "Doubtful labels", text, f'<div class="grid">{figures}</div>')


def _classes(rows: list[dict[str, Any]]) -> str:
    most = max(row["train"] for row in rows)
    body = "".join(
        f"<tr><td>{_text(row['label'])}</td>"
        f'<td class="w"><div class="bar" style="width:{100 * row["train"] / most:.1f}%"></div></td>'
        f"{''.join(f'<td class=n>{row[part]:,}</td>' for part in ('train', 'val', 'test'))}"
        f'<td class="bad-text">{row["note"]}</td></tr>'
        for row in sorted(rows, key=lambda row: -row["train"])
    )
    head = (
        "<tr><th>Class</th><th>Share</th><th class=n>train</th><th class=n>val</th><th class=n>test</th>"
        "<th>Note</th></tr>"
    )
    return _section(
        "classes", "Classes", "Images by class and part.", f"<table>{head}{body}</table>"
    )


def _odd(found: dict[str, Any], thumbnail: Callable) -> str:
    sizes = ", ".join(f"{size} ({count:,})" for size, count in found["sizes"].items())
    modes = ", ".join(f"{mode} ({count:,})" for mode, count in found["modes"].items())
    figures = "".join(
        f'<figure class="one">{thumbnail(image)}<figcaption><b>{_text(image["why"])}</b><br>'
        f"{_text(image['file'])}</figcaption></figure>"
        for image in found["images"][:SHOWN]
    )
    text = f"{found['different_sizes']:,} different sizes, most often {sizes}. Modes: {modes}."
    return _section("odd", "Sizes and modes", text, f'<div class="grid">{figures}</div>')
