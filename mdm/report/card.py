"""The page of a dataset card: samples, lengths, drops and quarantine by reason, lineage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mdm.preprocess.publish import unknown_warning
from mdm.preprocess.receipt import CardSample
from mdm.report.charts import histogram
from mdm.report.render import render


def card_page(card: Mapping[str, Any], samples: Sequence[CardSample]) -> str:
    """The self-contained page of a card made by `mdm.preprocess.publish`; texts are escaped."""
    lengths = {int(length): count for length, count in card["token_lengths"].items()}
    axes = ("tokens per text", "tokens per text", "texts")
    content = {
        "card": card,
        "counts": [(k, f"{v:,}") for k, v in card["counts"].items() if ": " not in k],
        "samples": [{"src": _data_uri(s.image), "text": s.text, "id": s.id} for s in samples],
        "unknown": f"{card['unknown_tokens']:.2%}",
        "warning": unknown_warning(card["unknown_tokens"]),
        "chart": histogram(lengths, *axes) if lengths else "",
        "lineage": [(k, v) for k, v in card["lineage"]["recipe"].items() if v is not None],
        "versions": list(card["lineage"]["versions"].items()),
    }
    return render(Path(__file__).with_name("card.html.j2"), content)


def _data_uri(image: str) -> str:
    """The data: address of a base64 PNG or JPEG; empty if there is no image."""
    kind = "png" if image.startswith("iVBOR") else "jpeg"
    return Markup(f"data:image/{kind};base64,{image}") if image else ""
