"""Quality against the number of evaluations, a curve for each solver."""

import math
from collections.abc import Callable, Mapping, Sequence

from mdm.diffusion.sampler import SOLVERS
from mdm.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, short

EVALUATIONS = (5, 10, 20, 40, 80)
COLOURS = ("#2980b9", "#d35400", "#27ae60", "#8e44ad", "#7f8c8d", "#c0392b")

Curves = dict[str, dict[int, float]]


def curves(
    quality: Callable[[str, int], float],
    solvers: Sequence[str] = SOLVERS,
    evaluations: Sequence[int] = EVALUATIONS,
) -> Curves:
    """`quality(solver, evaluations)` of every pair, as {solver: {evaluations: quality}}."""
    return {name: {n: quality(name, n) for n in evaluations} for name in solvers}


def chart(measured: Mapping[str, Mapping[int, float]], title: str, *, log: bool = False) -> str:
    """An SVG of one line a solver over evaluations, which are on a logarithmic axis.

    Args:
        measured: {solver: {evaluations: value}}.
        title: what is measured.
        log: the vertical axis too; for errors.

    Raises:
        ValueError: nothing to draw, or a value that the axis cannot show.
    """
    x = sorted({n for line in measured.values() for n in line})
    y = [value for line in measured.values() for value in line.values()]
    if len(x) < 2:
        raise ValueError(f"{title}: {len(x)} numbers of evaluations make no line")
    if not all(math.isfinite(value) and (value > 0 or not log) for value in y):
        raise ValueError(f"{title}: {min(y)} ... {max(y)} do not fit the axis")
    low, high = min(y), max(y)

    def share(value: float, low: float, high: float, log: bool) -> float:
        if log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / ((high - low) or 1.0)

    def px(n: int) -> float:
        return LEFT + share(n, x[0], x[-1], True) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - share(value, low, high, log) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}" font-size="8" font-family="sans-serif" fill="#7f8c8d">'
    ]
    middle = math.sqrt(low * high) if log else (low + high) / 2
    parts += [_text(LEFT - 5, py(value) + 3, "end", short(value)) for value in (low, middle, high)]
    parts += [_text(px(n), HEIGHT - 5, "middle", str(n)) for n in x]
    for i, (name, line) in enumerate(measured.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = "L".join(f"{px(n):.1f},{py(line[n]):.1f}" for n in sorted(line))
        parts.append(f'<path d="M{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(WIDTH - RIGHT, TOP + 8 + 10 * i, "end", name, colour))
    return "".join(parts) + "</svg>"


def _text(x: float, y: float, anchor: str, text: str, colour: str = "#7f8c8d") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
