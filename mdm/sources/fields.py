"""Fields of published records, checked: a ValueError says what a wrong one holds instead."""

import re
from collections import Counter
from typing import Any, TypeVar

T = TypeVar("T")
Turns = tuple[str, ...]  # question, reply, question, ...
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # except white space


def kind(value: Any) -> str:
    """The kind of a JSON value, in words."""
    return {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }.get(type(value), type(value).__name__)


def _typed(value: Any, name: str, wanted: type[T], noun: str) -> T:
    if value is None:
        raise ValueError(f"field {name} is absent")
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"field {name} is {kind(value)}, not {noun}")
    return value


def text_field(value: Any, name: str) -> str:
    """`value` as usable text; ValueError if it is absent, empty, damaged or not text."""
    text = _typed(value, name, str, "text")
    if not text.strip():
        raise ValueError(f"field {name} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name} holds half a surrogate pair, not valid Unicode") from None
    if control := _CONTROL.search(text):
        raise ValueError(f"field {name} holds the control character U+{ord(control[0]):04X}")
    return text


def number_field(value: Any, name: str) -> int:
    """`value` as a whole number that fits in 64 bits."""
    number = _typed(value, name, int, "a whole number")
    if abs(number) >= 1 << 63:
        bits = number.bit_length()
        raise ValueError(f"field {name} is a number of {bits} bits; ids have up to 63")
    return number


def id_field(value: Any, name: str) -> str:
    """An id, published as text or as a whole number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(number_field(value, name))
    return text_field(value, name)


def list_field(value: Any, name: str) -> list[Any]:
    """`value` as a list, empty or not."""
    return _typed(value, name, list, "a list")


def object_field(value: Any, name: str) -> dict[str, Any]:
    """`value` as a JSON object."""
    return _typed(value, name, dict, "an object")


def commonest(value: Any, name: str, key: str = "") -> str:
    """The most frequent answer; the first given breaks a tie.

    `value` is a list of texts, or of objects with a text under `key`. Empty answers do not count.
    """
    votes: Counter[str] = Counter()
    for i, item in enumerate(list_field(value, name)):
        where = f"{name}[{i}]"
        if key:
            item, where = object_field(item, where).get(key), f"{where}.{key}"
        if not isinstance(item, str) or item.strip():
            votes[text_field(item, where)] += 1
    if not votes:
        raise ValueError(f"field {name} holds no answer")
    return max(votes, key=votes.__getitem__)  # a Counter keeps order, so ties go to the first


def exchange(entry: dict[str, Any]) -> tuple[str, str]:
    """The fields `question` and `answer` of an entry as a dialogue of two turns."""
    question = text_field(entry.get("question"), "question")
    return question, text_field(entry.get("answer"), "answer")


def dialogue(turns: list[Any], name: str, keys: tuple[str, str], roles: tuple[str, str]) -> Turns:
    """The texts of `turns`, the objects in the field `name`.

    Replies before the first question are dropped, and so is a last question without a reply. All
    others must alternate. `keys` are the names of the fields for role and text, `roles` those of
    questions and replies. Raises ValueError if a field is wrong, roles do not alternate, or no
    question has a reply.
    """
    texts: list[tuple[str, Any]] = []
    for i, turn in enumerate(turns):
        where = f"{name}[{i}]"
        turn = object_field(turn, where)
        role = text_field(turn.get(keys[0]), f"{where}.{keys[0]}")
        if role == roles[1] and not texts:
            continue
        if role != (expected := roles[len(texts) % 2]):
            raise ValueError(f"field {where}.{keys[0]} is {role[:80]!r}, not {expected!r}")
        texts.append((f"{where}.{keys[1]}", turn.get(keys[1])))
    return answered_turns(texts, len(turns))


def answered_turns(texts: list[tuple[str, Any]], published: int) -> Turns:
    """The checked texts of alternating questions and replies, without a last unanswered question.

    `texts` are pairs (name of the field, text); `published` is the number of turns before any were
    dropped. ValueError if a text is wrong or no question has a reply.
    """
    if not published:
        raise ValueError("empty dialogue")
    if len(texts) < 2:
        raise ValueError(f"dialogue of {published} turns: no question has a reply")
    return tuple(text_field(text, name) for name, text in texts[: len(texts) // 2 * 2])
