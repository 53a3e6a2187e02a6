"""Renders the templates of report pages.

A page is one file: images, charts and styles are in it, and it loads nothing over the network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def render(template: Path, content: Mapping[str, Any]) -> str:
    """The page of `template`, which may extend those of this folder; texts are escaped."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": _number, "duration": _duration}
    return env.get_template(template.name).render(**content)
