"""Docstrings as reStructuredText: the source has plain text with `code` and indented listings."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note):$")
LIST = re.compile(r"([-*]|\d+\.) ")
CODE = re.compile(r"(``.+?``|`[^`]+`)")


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that are not empty."""
    run: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line.rstrip())
        elif run:
            yield run
            run = []


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def escape(text: str) -> str:
    """`text` with its `code` in double backticks and nothing else that reStructuredText marks up.

    Code may span lines, so `text` is a whole paragraph.
    """
    out = ""
    pieces = CODE.split(text)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            piece = piece.replace("\\", "\\\\")
            piece = re.sub(r"[*|`]", r"\\\g<0>", piece)
            out += re.sub(r"_(?![A-Za-z0-9_])", r"\\_", piece)
            continue
        code = " ".join(piece.strip("`").split()) if "\n" not in piece else piece.strip("`")
        before = "" if not out or out[-1] in " \n'\"([{<-/:" else "\\ "
        after = pieces[i + 1][:1]
        glued = after and after not in " \n'\")]}>-/\\:.,;!?"
        out += f"{before}``{code}``" + ("\\ " if glued else "")
    return out


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText, its Google sections as they were.

    A paragraph that is indented, or aligned within, is a listing.
    """
    out: list[str] = []
    in_section = False
    for run in paragraphs(lines):
        indents = {_indent(line) for line in run}
        starts = SECTION.match(run[0])
        in_section = bool(starts) or (in_section and min(indents) > 0)
        if in_section or LIST.match(run[0]) or indents == {0}:
            out += escape("\n".join(run)).split("\n")
        else:
            margin = min(indents)
            out += ["::", "", *(f"    {line[margin:]}" for line in run)]
        out.append("")
    return out


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place, before napoleon reads its sections."""
    made_by_python = lines and lines[0].startswith("Alias for field number")  # of a NamedTuple
    lines[:] = [] if made_by_python else to_rst(lines)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out module-level constants, whose values may be pages long, and bound methods."""
    own = callable(obj) and not inspect.ismethod(obj)
    return True if what == "module" and not own else None


def setup(app: Any) -> dict[str, bool]:
    """Hook into autodoc."""
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
