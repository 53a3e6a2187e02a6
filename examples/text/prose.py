"""Docstrings and pages of documentation to paragraphs of plain English.

Code, tables, signatures, lists of parameters and formulas are left out by what their lines look
like, and markup is replaced by the words it marks up.
"""

import re
import string
from collections.abc import Iterator

ALPHABET = frozenset(string.ascii_letters + string.digits + " .,;:!?'\"()-/=_")
MIN_WORDS, MIN_CHARACTERS = 8, 50
MIN_PLAIN = 0.97  # share of letters, spaces and the punctuation of sentences
MIN_COMMON = 0.25  # share of words that every English text is made of
_ROLE = re.compile(r":[\w:+.-]+:`(?:~|!)?(?:[^`<]*?([^`<.]+)(?: <[^`]*>)?)`")  # :func:`~a.b` -> b
_LINK = re.compile(r"`([^`<]+?) ?<[^`>]*>`_{1,2}")  # `text <address>`_ -> text
_MARKDOWN_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_REFERENCE = re.compile(r" ?\[\w+\]_\b|(?<=\w)_(?=\W|$)")  # [1]_ and name_
_QUOTES = re.compile(r"`+|(?<!\w)\*{1,2}(?=\w)|(?<=\w|[.,])\*{1,2}(?!\w)|(?<!\w)_(?=\w)")
_PLAIN = re.compile(r"[A-Za-z ,.;:!?'\"()-]")
_WORD = re.compile(r"[A-Za-z']+")
_NAME = re.compile(r"\w*(?:[_.=/\\<>{}|]|[a-z][A-Z])\w+|\w+\(")  # snake_case, a.b, f(
_LEGAL = re.compile(r"copyright|warrant|licen[cs]e|liabilit", re.IGNORECASE)
_RULE = re.compile(r"[-=~^*#+_.\"' ]{3,}")
_FREQUENT = """
a an and are as at be been but by can could do does each for from had has have he her his how i if
in into is it its may more most must my no not of on one only or other our own same she should so
some such than that the their them then there these they this those to two was we were what when
where which while who will with would you your
"""
_COMMON = frozenset(_FREQUENT.split())


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of English in a docstring or page, each on one line, in their order."""
    for block in _blocks(text):
        plain = _without_markup(" ".join(block))
        if is_prose(plain):
            yield plain


def is_prose(text: str) -> bool:
    """Whether `text` is a paragraph of English: whole sentences, nearly without names of code."""
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS or len(text) < MIN_CHARACTERS:
        return False
    if not text[0].isupper() or text[-1] not in ".!?" or not ALPHABET.issuperset(text):
        return False
    common = sum(word.lower() in _COMMON for word in words)
    return (
        len(_PLAIN.findall(text)) >= MIN_PLAIN * len(text)
        and common >= MIN_COMMON * len(words)
        and len(_NAME.findall(text)) <= len(words) / 12
        and "://" not in text
        and not _LEGAL.search(text)
    )


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines of one indentation, without blank lines between, and without headings."""
    block: list[str] = []
    indent = 0
    for line in [*text.expandtabs().splitlines(), ""]:
        stripped = line.strip()
        here = len(line) - len(line.lstrip())
        if _RULE.fullmatch(stripped):  # the line before it is a heading
            block, stripped = [], ""
        if block and (not stripped or here != indent):
            yield block
            block = []
        if stripped:
            block.append(stripped)
            indent = here


def _without_markup(text: str) -> str:
    text = re.sub(r"^(?:[-*+#.]+|\d+[.)]|note:|NOTE:) +", "", text)
    for pattern, to in (
        (_ROLE, r"\1"),
        (_LINK, r"\1"),
        (_MARKDOWN_LINK, r"\1"),
        (_REFERENCE, ""),
        (_QUOTES, ""),
    ):
        text = pattern.sub(to, text)
    text = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}$", ".", text))
    return " ".join(text.split())
