"""Line charts as inline SVG, coloured by the page's own style sheet, so that they follow its theme.

Classes: `grid` (lines), `tick` (numbers), `raw` (every value), `line` (smoothed).
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 300, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 20


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between `low` and `high`."""
    span = (high - low) / max(count, 1)
    if span <= 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= span * 0.99)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred moving mean over `share` of the values on each side."""
    reach = int(len(values) * share)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        low, high = max(0, i - reach), min(len(values), i + reach + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return means


def short(value: float) -> str:
    """A number in few characters: 12k, 0.25, 1.3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.3g}"


def line_chart(x: Sequence[float], y: Sequence[float], title: str) -> str:
    """An SVG of `y` over `x`, thin as measured and bold smoothed.

    The vertical axis leaves out the highest two per cent, so that a first spike does not flatten
    the rest. Raises ValueError if the two differ in length or fewer than two values are finite.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(points) < 2:
        raise ValueError(f"{title}: {len(points)} finite values make no line")
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    ranked = sorted(ys)
    low, high = ranked[0], ranked[min(len(ranked) - 1, int(0.98 * len(ranked)))]
    low = min(low, 0.0) if low < 0.3 * high else low
    pad = 0.06 * (high - low) or abs(high) or 1.0
    high += pad
    x_low, x_high = min(xs), max(xs)

    def px(value: float) -> float:
        return LEFT + (value - x_low) / ((x_high - x_low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        inside = min(max(value, low), high)
        return TOP + (high - inside) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(values: Sequence[float]) -> str:
        every = max(1, len(xs) // 400)
        kept = list(zip(xs, values, strict=True))[::every]
        return "M" + "L".join(f"{px(a):.1f},{py(b):.1f}" for a, b in kept)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    for tick in _ticks(low, high, 3):
        parts.append(
            f'<path class="grid" d="M{LEFT},{py(tick):.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{py(tick) + 3:.1f}" text-anchor="end">'
            f"{short(tick)}</text>"
        )
    for tick in _ticks(x_low, x_high, 3):
        anchor = "end" if px(tick) > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{px(tick):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">'
            f"{short(tick)}</text>"
        )
    parts.append(f'<path class="raw" d="{path(ys)}"/><path class="line" d="{path(smooth(ys))}"/>')
    return "".join(parts) + "</svg>"


def bar_chart(edges: Sequence[float], heights: Sequence[float], title: str) -> str:
    """An SVG of bars between neighbouring `edges` (one more than heights), from zero."""
    top = max(heights)
    ticks = _ticks(0, top, 4)
    high = max(top, ticks[-1])
    span = edges[-1] - edges[0]

    def across(value: float) -> float:
        return LEFT + (value - edges[0]) / span * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - value / high * (HEIGHT - TOP - BOTTOM)

    lines = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        lines.append(
            f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 4}" y="{up(tick) + 3:.1f}" text-anchor="end">'
            f"{short(tick)}</text>"
        )
    for left, right, height in zip(edges, edges[1:], heights, strict=False):
        x, width = across(left), max(0.5, across(right) - across(left) - 1)
        lines.append(
            f'<rect class="block" x="{x:.1f}" y="{up(height):.1f}" width="{width:.1f}" '
            f'height="{HEIGHT - BOTTOM - up(height):.1f}"/>'
        )
    for tick in (t for t in _ticks(edges[0], edges[-1], 6) if t == int(t)):
        lines.append(
            f'<text class="tick" x="{across(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
    return "".join([*lines, "</svg>"])
