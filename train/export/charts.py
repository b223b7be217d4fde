"""Charts as inline SVG, so that the report opens anywhere without a drawing library.

Colors come from the page's style sheet and follow its light and dark scheme.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]
Range = tuple[float, float]

# Size and margins of a chart, in SVG units
WIDTH = 420
HEIGHT = 240
LEFT = 46
RIGHT = 12
TOP = 12
BOTTOM = 34

# The confusion matrix, in SVG units
MAX_NAME_CHARACTERS = 14  # of a class
MIN_CELL = 14
MAX_CELL = 40
MIN_CELL_WITH_COUNT = 22  # smaller cells show no number
MATRIX_WIDTH = 560


class Chart:
    """One pair of axes with lines, bars and dots, in the units of the data."""

    def __init__(self, x_range: Range, y_range: Range, x_label: str, y_label: str):
        self.x_range = _widen_if_empty(x_range)
        self.y_range = _widen_if_empty(y_range)
        self._parts: list[str] = []
        self._draw_axes(x_label, y_label)

    def to_pixels(self, x: float, y: float) -> Point:
        """Return the position of a point in SVG units."""
        x0, x1 = self.x_range
        y0, y1 = self.y_range
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    def draw_line(self, points: Sequence[Point], style: str) -> None:
        """Draw a line through points; `style` names classes of the style sheet."""
        coordinates: list[str] = []
        for point in points:
            x, y = self.to_pixels(*point)
            coordinates.append(f"{x:.1f},{y:.1f}")
        self._parts.append(f'<polyline class="{style}" points="{" ".join(coordinates)}"/>')

    def draw_bar(self, x0: float, x1: float, y: float, style: str, title: str) -> None:
        """Draw a bar from the bottom to y; `title` appears as a tooltip."""
        left, top = self.to_pixels(x0, y)
        right, bottom = self.to_pixels(x1, self.y_range[0])
        self._parts.append(
            f'<rect class="{style}" x="{left + 0.5:.1f}" y="{top:.1f}" '
            f'width="{right - left - 1:.1f}" height="{max(bottom - top, 0):.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def draw_dot(self, x: float, y: float, text: str) -> None:
        """Draw a dot with a text, on the side where there is space for it."""
        left, top = self.to_pixels(x, y)
        anchor = "end" if left > WIDTH / 2 else "start"
        text_offset = 18 if top < HEIGHT / 2 else -10
        self._parts.append(
            f'<circle class="dot" cx="{left:.1f}" cy="{top:.1f}" r="4"/>'
            f'<text class="note" x="{left:.1f}" y="{top + text_offset:.1f}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )

    def draw_legend(self, styles: Mapping[str, str]) -> None:
        """Draw the legend; `styles` maps names to classes of the style sheet."""
        y = TOP + 8
        for i, (name, style) in enumerate(styles.items()):
            x = LEFT + 10 + 90 * i
            self._parts.append(
                f'<line class="{style}" x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}"/>'
                f'<text x="{x + 21}" y="{y + 4}">{escape(name)}</text>'
            )

    def to_svg(self, title: str) -> Markup:
        """Return the chart; screen readers read the title."""
        return Markup(
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}">{"".join(self._parts)}</svg>'
        )

    def _draw_axes(self, x_label: str, y_label: str) -> None:
        """Draw horizontal grid lines, the numbers of both axes, and their labels."""
        for tick in choose_ticks(*self.y_range):
            _, y = self.to_pixels(self.x_range[0], tick)
            self._parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )

        x_ticks = choose_ticks(*self.x_range)
        if x_label == "epoch" and self.x_range[1] - self.x_range[0] < 5:
            x_ticks = [*self.x_range]  # epochs are whole numbers
        for tick in x_ticks:
            x, _ = self.to_pixels(tick, self.y_range[0])
            self._parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
            )

        x_center = (LEFT + WIDTH - RIGHT) / 2
        y_center = (TOP + HEIGHT - BOTTOM) / 2
        self._parts.append(
            f'<text class="label" x="{x_center}" y="{HEIGHT - 4}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" transform="translate(11 {y_center}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers in low..high, 1, 2 or 5 times a power of ten apart."""
    rough_step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough_step))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough_step)

    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]


def _widen_if_empty(value_range: Range) -> Range:
    low, high = value_range
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def draw_curves(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Markup:
    """Return one or two lines over one pair of axes; the style sheet has two line styles."""
    xs: list[float] = []
    ys: list[float] = []
    for points in series.values():
        for x, y in points:
            xs.append(x)
            ys.append(y)

    legend_space = 0.18 * (max(ys) - min(ys))
    chart = Chart((min(xs), max(xs)), (min(ys), max(ys) + legend_space), x_label, y_label)
    styles = {name: f"line s{i}" for i, name in enumerate(series)}
    for name, points in series.items():
        chart.draw_line(points, styles[name])
    chart.draw_legend(styles)
    return chart.to_svg(f"{y_label} over {x_label}")


def draw_confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """Return a heat map: rows are the true class; the shade is the share of the row."""
    cell = max(MIN_CELL, min(MAX_CELL, MATRIX_WIDTH // len(classes)))
    longest_name = max(len(name) for name in classes)
    label_space = 10 + min(MAX_NAME_CHARACTERS, longest_name) * 7
    size = label_space + len(classes) * cell + 4

    parts: list[str] = []
    for i, row in enumerate(matrix):
        name = escape(_shorten(classes[i]))
        center = f"{label_space + i * cell + cell / 2 + 4:.1f}"
        edge = label_space - 5
        parts.append(
            f'<text x="{edge}" y="{center}" text-anchor="end">{name}</text>'
            f'<text text-anchor="start" transform="translate({center} {edge}) rotate(-90)">'
            f"{name}</text>"
        )
        row_images = max(sum(row), 1)
        for j, count in enumerate(row):
            share = count / row_images
            title = f"{classes[i]} predicted as {classes[j]}: {count} ({share:.1%})"
            style = "right" if i == j else "wrong"
            x = label_space + j * cell
            y = label_space + i * cell
            parts.append(_draw_matrix_cell(x, y, cell, count, share, style, title))

    return Markup(
        f'<svg class="matrix" viewBox="0 0 {size} {size}" style="max-width:{size}px" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def _draw_matrix_cell(
    x: int, y: int, cell: int, count: int, share: float, style: str, title: str
) -> str:
    """Return a square, shaded by its share of the row, with its count where there is space."""
    svg = (
        f'<rect class="cell" x="{x}" y="{y}" width="{cell}" height="{cell}"/>'
        f'<rect class="{style}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
        f'opacity="{share**0.5:.2f}"><title>{escape(title)}</title></rect>'
    )
    if count and cell >= MIN_CELL_WITH_COUNT:
        text_style = "count strong" if share > 0.5 else "count"
        svg += (
            f'<text class="{text_style}" text-anchor="middle" x="{x + cell / 2:.1f}" '
            f'y="{y + cell / 2 + 4:.1f}">{count}</text>'
        )
    return svg


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARACTERS else name[: MAX_NAME_CHARACTERS - 1] + "…"
