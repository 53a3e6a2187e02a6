"""Fields of published rows: each is what it should be, or a ValueError says what it is instead."""

import re
from collections import Counter
from typing import Any

Turns = tuple[str, ...]  # question, reply, question, ...
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # all but white space


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }.get(type(value), type(value).__name__)


def text_field(value: Any, name: str) -> str:
    """`value` as usable text; ValueError for an absent, wrong, empty or damaged one."""
    _present(value, name)
    if not isinstance(value, str):
        raise ValueError(f"field {name} is {kind(value)}, not text")
    if not value.strip():
        raise ValueError(f"field {name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name} holds half a surrogate pair, not valid Unicode") from None
    if control := _CONTROL.search(value):
        raise ValueError(f"field {name} holds the control character U+{ord(control[0]):04X}")
    return value


def number_field(value: Any, name: str) -> int:
    """`value` as a whole number that fits in 64 bits."""
    _present(value, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"field {name} is {kind(value)}, not a whole number")
    if abs(value) >= 1 << 63:
        raise ValueError(
            f"field {name} is a number of {value.bit_length()} bits; ids have up to 63"
        )
    return value


def id_field(value: Any, name: str) -> str:
    """An id, published as text or as a whole number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(number_field(value, name))
    return text_field(value, name)


def list_field(value: Any, name: str) -> list[Any]:
    """`value` as a list, empty or not."""
    _present(value, name)
    if not isinstance(value, list):
        raise ValueError(f"field {name} is {kind(value)}, not a list")
    return value


def object_field(value: Any, name: str) -> dict[str, Any]:
    """`value` as a JSON object."""
    _present(value, name)
    if not isinstance(value, dict):
        raise ValueError(f"field {name} is {kind(value)}, not an object")
    return value


def commonest(value: Any, name: str, key: str = "") -> str:
    """The answer that most people gave; of equally many, the one given first.

    `value` is a list of texts, or of objects whose `key` is one. Empty answers have no vote.
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
    return max(votes, key=votes.__getitem__)  # the first of the highest: a Counter keeps order


def exchange(entry: dict[str, Any]) -> tuple[str, str]:
    """An entry's fields `question` and `answer` as a dialogue of two turns."""
    question = text_field(entry.get("question"), "question")
    return question, text_field(entry.get("answer"), "answer")


def dialogue(turns: list[Any], name: str, keys: tuple[str, str], roles: tuple[str, str]) -> Turns:
    """The texts of turns that are objects, with fields for role and text of the names `keys`.

    `roles` are those of questions and replies. Replies before the first question are cut, and so is
    a last question without a reply; all between have to alternate.
    """
    said: list[tuple[str, Any]] = []
    for i, turn in enumerate(turns):
        where = f"{name}[{i}]"
        turn = object_field(turn, where)
        role = text_field(turn.get(keys[0]), f"{where}.{keys[0]}")
        if role == roles[1] and not said:
            continue
        if role != (due := roles[len(said) % 2]):
            raise ValueError(f"field {where}.{keys[0]} is {role[:80]!r}, not {due!r}")
        said.append((f"{where}.{keys[1]}", turn.get(keys[1])))
    return answered(said, len(turns))


def answered(said: list[tuple[str, Any]], turns: int) -> Turns:
    """Questions and replies as (name of the field, text), without a last question of no reply.

    `turns` is how many were published.
    """
    if not turns:
        raise ValueError("empty dialogue")
    if len(said) < 2:
        raise ValueError(f"dialogue of {turns} turns: no question has a reply")
    return tuple(text_field(text, name) for name, text in said[: len(said) // 2 * 2])


def _present(value: Any, name: str) -> None:
    if value is None:
        raise ValueError(f"field {name} is absent")
