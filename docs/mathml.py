"""Formulas as MathML, by the converter that docutils ships: no script, no font, no network."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

# docutils sets the subscript of an accented letter below it, unless the letter is a group.
ACCENT = re.compile(r"\\(bar|hat|tilde) ?(\\[a-z]+|[A-Za-z])")
log = logging.getLogger(__name__)


def _mathml(node: nodes.Node, *, as_block: bool) -> str:
    try:
        tex = ACCENT.sub(r"{\\\1 \2{}}", node.astext())
        return str(tex2mathml(tex, as_block=as_block))
    except MathError as error:
        log.warning("cannot convert formula %r: %s", node.astext(), error, location=node)
        return ""


def inline(translator: Any, node: nodes.math) -> None:
    """Append an inline formula to the page."""
    translator.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def display(translator: Any, node: nodes.math_block) -> None:
    """Append a displayed formula, with its number if it has a label."""
    translator.body.append(translator.starttag(node, "div", CLASS="equation notranslate"))
    if node.get("number"):
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})</span>')
    translator.body.append(_mathml(node, as_block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer `mathml`."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
