"""The dataset card for people: samples, lengths, drops and quarantine by reason, lineage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mdm.preprocess.publish import unknown_warning
from mdm.preprocess.receipt import CardSample
from mdm.report.charts import bar_chart
from mdm.report.page import render

_BARS = 32


def card_page(card: Mapping[str, Any], samples: Sequence[CardSample]) -> str:
    """The page of a card that `mdm.preprocess.publish` made; one file, texts escaped."""
    lengths = {int(k): v for k, v in card["token_lengths"].items()}
    edges, heights = histogram(lengths)
    chart = bar_chart(edges, heights, "tokens a text") if lengths else ""
    return render(
        Path(__file__).with_name("card.html.j2"),
        {
            "card": card,
            "counts": [(k, f"{v:,}") for k, v in card["counts"].items() if ": " not in k],
            "samples": [
                {
                    "src": Markup(f"data:image/{_kind(s.image)};base64,{s.image}")
                    if s.image
                    else "",
                    "text": s.text,
                    "id": s.id,
                }
                for s in samples
            ],
            "unknown": f"{card['unknown_tokens']:.2%}",
            "warning": unknown_warning(card["unknown_tokens"]),
            "chart": Markup(chart),
            "lineage": [
                (key, value)
                for key, value in card["lineage"]["recipe"].items()
                if value is not None
            ],
            "versions": list(card["lineage"]["versions"].items()),
        },
    )


def histogram(lengths: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """At most _BARS bars of equal width: where each begins (and the last ends), and its height."""
    if not lengths:
        return [0], []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BARS)
    heights = [0] * -(-(high - low + 1) // width)
    for length, count in lengths.items():
        heights[(length - low) // width] += count
    return [low + i * width for i in range(len(heights) + 1)], heights


def _kind(image: str) -> str:
    return "png" if image.startswith("iVBOR") else "jpeg"
