"""Low-quality texts (Appendix D): which texts are dropped, and why."""

import re
from collections import Counter

_WORD = re.compile(r"\w+")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")
# With fewer characters or words, a share means nothing.
_MIN_CHARACTERS = 10
_MIN_WORDS = 12
_MAX_BROKEN = 0.02
_MIN_PLAIN = 0.5
_MAX_ONE_WORD = 0.5


def text_problem(text: str, min_chars: int) -> str:
    """The reason to drop a text, or "" for one to keep.

    Texts are dropped that are too short, have no letter or digit, are mostly symbols, repeat one
    word, consist of an address, or contain characters that an earlier conversion lost (U+FFFD).
    """
    line = " ".join(text.split())
    if len(line) < min_chars:
        return "too short text"
    plain = sum(c.isalnum() or c == " " for c in line)
    if not any(c.isalnum() for c in line):
        return "low-quality text: no letter or digit"
    if line.count("\ufffd") > _MAX_BROKEN * len(line):
        return "low-quality text: broken characters"
    if len(line) >= _MIN_CHARACTERS and plain < _MIN_PLAIN * len(line):
        return "low-quality text: mostly symbols"
    if _ADDRESS.fullmatch(line):
        return "low-quality text: an address alone"
    words = _WORD.findall(line.casefold())
    if len(words) >= _MIN_WORDS:
        commonest = Counter(words).most_common(1)[0][1]
        if commonest > _MAX_ONE_WORD * len(words):
            return "low-quality text: one word over and over"
    return ""
