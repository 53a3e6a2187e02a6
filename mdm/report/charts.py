"""Charts as inline SVG, drawn by matplotlib and coloured by the style sheet of their page.

Matplotlib writes the colours of `THEME` into the SVG, and `_svg` replaces each by the page's
variable of that name, so that one chart suits light and dark pages. A chart outside a page keeps
the colours. Equal numbers give equal bytes. The title is the accessible name of a chart.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

SOFT, LINE, ACCENT, BAD = "#6d6a63", "#d9d5cc", "#3b5bcc", "#c8452f"
THEME = {SOFT: "--soft", LINE: "--line", ACCENT: "--accent", BAD: "--no"}
SERIES = ("#2980b9", "#d35400", "#27ae60", "#8e44ad", "#7f8c8d", "#c0392b")
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
    "font.size": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mdm",  # ids depend on the content alone
    "text.color": SOFT,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
BARS = 32  # of a histogram, at most
MARKS = ("|", "d", "x")  # of a row chart's references


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A new figure of this size in inches and its axes, in the style of all charts."""
    with _panels(1, 1, width, height) as (figure, (axes,)):
        yield figure, axes


@contextmanager
def _panels(
    rows: int, columns: int, width: float, height: float
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A new figure of `rows` x `columns` axes of this size in inches each."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False).flatten().tolist()


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element, without date and metadata."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    _, _, rest = buffer.getvalue().partition("<svg")
    text = f'<svg role="img" aria-label="{escape(title)}"{rest}'
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the charts of a page would share these ids
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    return Markup(text)


def _scale_y(axes: Axes, values: ArrayLike) -> None:
    """A logarithmic vertical axis if `values` are positive and span more than a factor of ten."""
    low, high = np.min(values), np.max(values)
    if 0 < 10 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", size=0)


def smooth(values: ArrayLike) -> NDArray[np.float64]:
    """Centred moving mean over 3 % of the values on each side."""
    numbers = np.asarray(values, dtype=np.float64)
    window = np.ones(2 * int(len(numbers) * 0.03) + 1)
    count: NDArray[np.float64] = np.convolve(np.ones(len(numbers)), window, "same")
    return np.convolve(numbers, window, "same") / count


def line_chart(x: Sequence[float], y: Sequence[float], title: str, y_label: str) -> Markup:
    """`y` over the samples seen `x`, thin as measured and bold smoothed.

    Raises ValueError if x and y differ in length, or fewer than two values are finite.
    """
    points = np.array([x, y], np.float64)
    xs, ys = points[:, np.isfinite(points).all(0)]
    if len(xs) < 2:
        raise ValueError(f"{title}: {len(xs)} finite values; a line needs at least 2")
    with _figure(3.6, 2.0) as (figure, axes):
        axes.plot(xs, ys, color=ACCENT, linewidth=0.7, alpha=0.35)
        axes.plot(xs, smooth(ys), color=ACCENT, linewidth=1.6)
        axes.set(xlabel="samples seen", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _scale_y(axes, ys)
        axes.grid(axis="y")
        return _svg(figure, title)


def histogram(counts: Mapping[int, int], title: str, x_label: str, y_label: str) -> Markup:
    """At most `BARS` bars of equal width over the integers in `counts`, which is not empty."""
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BARS)
    edges, heights = range(low, high + width + 1, width), list(counts.values())
    with _figure(4.8, 2.2) as (figure, axes):
        axes.hist(list(counts), edges, weights=heights, color=ACCENT, rwidth=0.9)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y")
        return _svg(figure, title)


def solver_chart(
    measured: Mapping[str, Mapping[int, float]],
    title: str,
    y_label: str,
    references: Mapping[str, float],
) -> Markup:
    """A line for each solver over its evaluations of the network, on a logarithmic axis.

    `measured` is {solver: {evaluations: value}}; `references` are {name: value}, such as a floor,
    drawn as dashed lines.
    """
    counts = sorted({n for line in measured.values() for n in line})
    values = [value for line in measured.values() for value in line.values()]
    with _figure(4.8, 2.6) as (figure, axes):
        for (name, line), colour in zip(measured.items(), cycle(SERIES), strict=False):
            axes.plot(*zip(*sorted(line.items()), strict=True), ".-", color=colour, label=name)
        for name, value in references.items():
            axes.axhline(value, color=SOFT, linestyle="--", linewidth=1, label=name)
        axes.set_xscale("log")
        axes.set(xlabel="evaluations of the network", ylabel=y_label)
        axes.set_xticks(counts, labels=[str(n) for n in counts])
        axes.minorticks_off()
        _scale_y(axes, [*values, *references.values()])
        axes.grid(axis="y")
        figure.legend(loc="outside right upper", fontsize=7)
        return _svg(figure, title)


def line_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
    title: str,
    x_label: str,
    columns: int,
    logarithmic: bool = False,
) -> Markup:
    """Small multiples: a panel for each name in `panels`, which is {line: {x: y}}.

    All panels have the same lines, of finite values. With `logarithmic`, the horizontal axis is.
    """
    rows = -(-len(panels) // columns)
    with _panels(rows, columns, 3.2, 1.7) as (figure, grid):
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, lines) in zip(grid, panels.items(), strict=False):
            for (label, line), colour in zip(lines.items(), cycle(SERIES), strict=False):
                xs, ys = zip(*sorted(line.items()), strict=True)
                marker = "." if len(xs) < 12 else ""
                axes.plot(xs, ys, marker=marker, color=colour, linewidth=1.2, label=label)
            if logarithmic:
                axes.set_xscale("log")
            axes.set_title(name, fontsize=8, color=SOFT, loc="left")
            axes.set_xlabel(x_label)
            _scale_y(axes, [y for line in lines.values() for y in line.values()])
            axes.grid(axis="y")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=7)
        return _svg(figure, title)


def row_chart(
    rows: Mapping[str, Sequence[float]],
    title: str,
    x_label: str,
    references: Mapping[str, Mapping[str, float]],
) -> Markup:
    """A row for each name in `rows`: a dot for each of its values and a bar at their mean.

    `references` are {reference, such as "target": {row: value}}, at most three, drawn as marks.
    """
    with _figure(4.8, 0.8 + 0.2 * len(rows)) as (figure, axes):
        names = [name for name, values in rows.items() for _ in values]
        x = [value for values in rows.values() for value in values]
        axes.scatter(x, names, s=20, color=ACCENT, alpha=0.7, linewidths=0, zorder=3, label="value")
        means = {name: np.mean(row) for name, row in rows.items() if len(row) > 1}
        axes.scatter(list(means.values()), list(means), s=70, marker="|", color=ACCENT)
        for mark, (name, by_row) in zip(MARKS, references.items(), strict=False):
            x, colour = list(by_row.values()), BAD if mark == "|" else SOFT
            axes.scatter(x, list(by_row), s=36, marker=mark, color=colour, label=name)
        axes.invert_yaxis()
        axes.set(xlabel=x_label)
        axes.grid()
        columns = 1 + len(references)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, fontsize=7)
        return _svg(figure, title)


def bar_chart(
    values: Mapping[str, float], title: str, x_label: str, number: str = "{:.0f}"
) -> Markup:
    """A horizontal bar for each name, with its value beside it as `number` formats it."""
    with _figure(4.8, 0.5 + 0.2 * len(values)) as (figure, axes):
        bars = axes.barh(list(values), list(values.values()), color=ACCENT, height=0.6)
        axes.bar_label(bars, fmt=number, padding=3)
        axes.invert_yaxis()
        axes.set(xlabel=x_label)
        axes.grid(axis="x")
        return _svg(figure, title)
