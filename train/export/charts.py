"""Charts as inline SVG: a report that opens anywhere needs no library to be drawn."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34


class Frame:
    """Axes from data to pixels. Colours come from the page's style, so that light and dark both work."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str):
        self.x, self.y = _widen(*x), _widen(*y)
        self.parts: list[str] = []
        self._axes(x_label, y_label)

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    def line(self, points: Points, style: str) -> None:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (self.at(x, y) for x, y in points))
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def bar(self, x0: float, x1: float, y: float, style: str, title: str) -> None:
        (left, top), (right, bottom) = self.at(x0, y), self.at(x1, self.y[0])
        self.parts.append(
            f'<rect class="{style}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" '
            f'height="{max(bottom - top, 0):.1f}"><title>{escape(title)}</title></rect>'
        )

    def dot(self, x: float, y: float, text: str) -> None:
        px, py = self.at(x, y)
        anchor, below = ("end" if px > WIDTH / 2 else "start"), (18 if py < HEIGHT / 2 else -10)
        self.parts.append(
            f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="4"/><text class="note" x="{px:.1f}" '
            f'y="{py + below:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def legend(self, names: dict[str, str]) -> None:
        for i, (name, style) in enumerate(names.items()):
            x, y = LEFT + 10 + 90 * i, TOP + 8
            self.parts.append(
                f'<line class="{style}" x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}"/>'
                f'<text x="{x + 21}" y="{y + 4}">{escape(name)}</text>'
            )

    def svg(self, title: str) -> Markup:
        return Markup(
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"{''.join(self.parts)}</svg>"
        )

    def _axes(self, x_label: str, y_label: str) -> None:
        for tick in ticks(*self.y):
            y = self.at(self.x[0], tick)[1]
            self.parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        whole = self.x[1] - self.x[0] >= 5 or x_label != "epoch"  # there is no epoch 1.5
        for tick in ticks(*self.x) if whole else self.x:
            x = self.at(tick, self.y[0])[0]
            self.parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
            )
        self.parts.append(
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def curves(series: Mapping[str, Points], x_label: str, y_label: str) -> Markup:
    """Up to four lines over one pair of axes."""
    points = [p for line in series.values() for p in line]
    ys = [y for _, y in points]
    room = 0.18 * (max(ys) - min(ys))  # for the legend
    frame = Frame(
        (min(x for x, _ in points), max(x for x, _ in points)),
        (min(ys), max(ys) + room),
        x_label,
        y_label,
    )
    styles = {name: f"line s{i}" for i, name in enumerate(series)}
    for name, line in series.items():
        frame.line(line, styles[name])
    frame.legend(styles)
    return frame.svg(f"{y_label} over {x_label}")


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """A heat map, rows the true class; each row's shade is its share."""
    n = len(classes)
    cell = max(14, min(40, 560 // n))
    room = 10 + min(14, max(map(len, classes))) * 7
    size = room + n * cell + 4
    parts = []
    for i, row in enumerate(matrix):
        total = max(sum(row), 1)
        parts.append(
            f'<text x="{room - 5}" y="{room + i * cell + cell / 2 + 4:.1f}" text-anchor="end">'
            f'{escape(_short(classes[i]))}</text><text text-anchor="start" '
            f'transform="translate({room + i * cell + cell / 2 + 4:.1f} {room - 5}) rotate(-90)">'
            f"{escape(_short(classes[i]))}</text>"
        )
        for j, count in enumerate(row):
            share = count / total
            style = "right" if i == j else "wrong"
            number = (
                f'<text class="count{" strong" if share > 0.5 else ""}" text-anchor="middle" '
                f'x="{room + j * cell + cell / 2:.1f}" y="{room + i * cell + cell / 2 + 4:.1f}">{count}</text>'
                if count and cell >= 22
                else ""
            )
            parts.append(
                f'<rect class="cell" x="{room + j * cell}" y="{room + i * cell}" width="{cell}" height="{cell}"/>'
                f'<rect class="{style}" x="{room + j * cell}" y="{room + i * cell}" width="{cell - 1}" '
                f'height="{cell - 1}" opacity="{share**0.5:.2f}"><title>{escape(classes[i])} taken for '
                f"{escape(classes[j])}: {count} ({share:.1%})</title></rect>{number}"
            )
    return Markup(
        f'<svg class="matrix" viewBox="0 0 {size} {size}" style="max-width:{size}px" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
