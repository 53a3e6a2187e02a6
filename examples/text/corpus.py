"""A corpus of real English that installed packages bring: their documentation, and dialogues.

Paragraphs of prose are taken from the docstrings of the packages below and of Python's standard
library, and from Python's help pages; the dialogues are the chatterbot corpus. The same versions
give the same corpus. A paragraph that nearly repeats an earlier one is left out, and files are
either in the training or in the held-out part, never in both.
"""

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageMetadata, distribution
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from tqdm import tqdm

from examples.dialogues import list_dialogues
from examples.text.prose import ALPHABET, paragraphs
from mdm.preprocess import similar
from mdm.sources.record import RawRecord

PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "scikit-learn", "scipy")
DIALOGUES = "chatterbot-corpus"
FOLDERS = {"scikit-learn": "sklearn"}  # of packages whose folder has another name
SKIPPED = {"tests", "test", "testing", "site-packages", "externals", "extern", "_vendor", "idlelib"}
HELD_OUT = 12  # one file in so many, by a hash of its name, and one question of the dialogues


@dataclass(frozen=True)
class Document:
    """The prose of one docstring, page or conversation."""

    source: str  # the package
    file: str  # below the package; all documents of a file are on the same side of the split
    turns: tuple[str, ...]  # one for prose, its paragraphs on lines; two or more for a dialogue

    @property
    def is_held_out(self) -> bool:
        """Whether the document serves for measurements alone."""
        return _hash(f"{self.source}/{self.file}") % HELD_OUT == 0

    @property
    def characters(self) -> int:
        """Characters of all turns."""
        return sum(map(len, self.turns))


def read() -> list[Document]:
    """All documents, in a fixed order that mixes the sources."""
    every = [*_prose(), *_dialogues()]
    return sorted(every, key=lambda document: (_hash("\n".join(document.turns)), document.turns))


def summary(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """Version, licence, documents and characters of each source, training and held out."""
    documents = list(documents)
    rows = []
    for source in sorted({document.source for document in documents}):
        version, licence = platform.python_version(), "PSF-2.0"
        if source != "python":
            about = distribution(source)
            version, licence = about.version, _licence(about.metadata)
        row: dict[str, Any] = {"package": source, "version": version, "licence": licence}
        for side, held_out in (("train", False), ("held_out", True)):
            part = [d for d in documents if d.source == source and d.is_held_out == held_out]
            characters = sum(document.characters for document in part)
            row[side] = {"documents": len(part), "characters": characters}
        rows.append(row)
    return rows


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without paragraphs that are nearly the same as one of an earlier document."""
    seen: dict[int, list[similar.Signature]] = {}
    for document in documents:
        kept = []
        for text in document.turns[0].split("\n"):
            one, keys = similar.signature(RawRecord("", "", "", "", text=text))
            near = [other for key in keys for other in seen.get(key, [])]
            if near and similar.alike(one, np.stack(near), images=False):
                continue
            for key in keys:
                seen.setdefault(key, []).append(one)
            kept.append(text)
        if kept:
            yield Document(document.source, document.file, ("\n".join(kept),))


def _prose() -> Iterator[Document]:
    pages = [*_documented_files("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        folder = Path(str(distribution(package).locate_file(FOLDERS.get(package, package))))
        pages += _documented_files(package, folder)
    shown = tqdm(pages, desc="documentation", unit=" files", leave=False)
    found = (
        Document(source, file, ("\n".join(prose),))
        for source, file, path in shown
        for text in (_docstrings(path) if path else [topics.topics[file.rpartition(":")[2]]])
        if (prose := list(paragraphs(text)))
    )
    yield from without_repeats(found)


def _documented_files(source: str, folder: Path) -> Iterator[tuple[str, str, Path | None]]:
    """(source, file, its path) of all Python files; no path for a page of Python's help."""
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        if not SKIPPED.intersection(place.parts[:-1]) and not place.name.startswith("test_"):
            yield source, place.as_posix(), path
    if source == "python":
        for topic in sorted(topics.topics):
            yield source, f"topics:{topic}", None


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's string escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # templates, and files in other encodings
        return
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def _dialogues() -> Iterator[Document]:
    for turns in list_dialogues():
        if ALPHABET.issuperset("".join(turns)):
            yield Document(DIALOGUES, turns[0].lower(), turns)


def _licence(metadata: PackageMetadata) -> str:
    """The licence that a package states: as an expression, a classifier or in words."""
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    for line in metadata.get_all("Classifier") or []:
        if line.startswith("License ::"):
            return str(line.rpartition(":: ")[2])
    return metadata["License"].splitlines()[0] if "License" in metadata else "not stated"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
