"""Objects are read as the standard parser reads them; damage loses only the damaged entry."""

import io
import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.sources import jsoncursor, textfile
from mdm.sources.jsoncursor import BrokenFileError
from mdm.sources.jsonfile import elements

WINDOWS = st.sampled_from([1, 3, 17, 100, 1 << 18])
SPACES = st.sampled_from(["", " ", "\n\t ", " \r\n" * 20])
TEXTS = st.lists(
    st.sampled_from(
        ['"', "\\", "{", "}", "[", "]", ":", ",", " ", "a", "é", "漢", '"k9": {"', "}, "]
    )
).map("".join)
NESTED = st.fixed_dictionaries(
    {"b": TEXTS, "c": st.lists(st.dictionaries(TEXTS, TEXTS, max_size=2))}
)
ENTRY = st.fixed_dictionaries(
    {
        "question": TEXTS,
        "id": st.integers(),
        "meta": NESTED,
        "answers": st.lists(NESTED, max_size=2),
    },
    optional={"note": TEXTS},
)
# Trees, like comments with replies: an entry contains others with the same keys.
TREE = st.recursive(
    st.just({}),
    lambda below: st.fixed_dictionaries({"id": TEXTS, "replies": st.dictionaries(TEXTS, below)}),
    max_leaves=6,
)


def read(data: bytes, window: int, **options: int) -> tuple[list[tuple[str, object, str]], str]:
    """(name, value, problem) of every element, and the problem of the file."""
    elements_read: list[tuple[str, object, str]] = []
    try:
        with mock.patch.object(jsoncursor, "_WINDOW", window):
            for element in elements(io.BytesIO(data), **options):
                elements_read.append((element.name, element.value, element.problem))
    except BrokenFileError as error:
        return elements_read, str(error)
    return elements_read, ""


def member(number: int, entry: object, ascii_only: bool = True) -> str:
    return f'"k\\"{number}": {json.dumps(entry, ensure_ascii=ascii_only)}'


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(TEXTS, st.one_of(ENTRY, TREE, st.none(), TEXTS), max_size=6),
    SPACES,
    SPACES,
    WINDOWS,
    st.booleans(),
)
def test_a_valid_object_is_read_as_by_the_standard_parser(named, one, other, window, plain):
    text = json.dumps(
        named,
        ensure_ascii=plain,
        separators=(f"{one},{other}", f"{other}:{one}"),
        indent=one or None,
    )
    elements_read, problem = read((one + text + other).encode(), window)
    assert not problem
    assert elements_read == [(name, value, "") for name, value in named.items()]


DAMAGE = {
    "no closing brace": lambda text, at: text[:-1],
    "no opening brace": lambda text, at: text.replace("{", "", 1),
    "no bracket": lambda text, at: without_mark(text, at, "{}[]"),
    "an unterminated string": lambda text, at: without_mark(text, at, '"'),
    "no colon": lambda text, at: text.replace(":", "", 1),
    "stray bytes": lambda text, at: text[:at] + "\0\0\x7f" + text[at:],
    "a stray brace": lambda text, at: text[:at] + "}" + text[at:],
}


def without_mark(text: str, at: int, marks: str) -> str:
    """The text without the first mark at or after position `at`."""
    at = next(i for i in [*range(at, len(text)), *range(at)] if text[i] in marks)
    return text[:at] + text[at + 1 :]


@pytest.mark.parametrize("kind", DAMAGE)
@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, min_size=4, max_size=7), st.data(), WINDOWS, SPACES)
def test_damage_loses_only_the_damaged_entry(kind, entries, data, window, space):
    entries = [{**entry, "number": i} for i, entry in enumerate(entries)]
    damaged = data.draw(st.integers(1, len(entries) - 2))
    members = [member(i, entry) for i, entry in enumerate(entries)]
    at = data.draw(st.integers(0, len(members[damaged]) - 1))
    members[damaged] = DAMAGE[kind](members[damaged], at)
    text = "{" + f",{space}".join(members) + space + "}" + space
    elements_read, problem = read(text.encode(), window)
    assert not problem, text
    others = entries[:damaged] + entries[damaged + 1 :]
    assert [value for _, value, _ in elements_read if value in others] == others, text
    if kind in ("no closing brace", "no opening brace", "no colon"):
        assert any(problem for _, _, problem in elements_read)
    if kind == "no closing brace":
        following = text.index(members[damaged + 1])
        reason = f"invalid JSON: no end before the next entry at byte {following} of the file"
        assert elements_read[damaged] == (f'k"{damaged}', None, reason)


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, min_size=3, max_size=6), st.data(), WINDOWS)
def test_all_complete_entries_of_a_truncated_object_are_read(entries, data, window):
    text = "{" + ", ".join(member(i, entry) for i, entry in enumerate(entries)) + "}"
    at = data.draw(st.integers(len("{" + member(0, entries[0])), len(text) - 1))
    elements_read, problem = read(text[:at].encode(), window)
    complete = sum(at >= len("{" + ", ".join(map(member, range(i), entries))) for i in range(1, 9))
    complete = min(complete, len(entries))
    assert [value for _, value, _ in elements_read] == entries[:complete]
    assert "has no end" in problem or "before its last bracket" in problem or "byte" in problem


def numbered_members(count: int) -> list[str]:
    return [f'"q{i}": {{"n": {i}, "text": "}} {{", "of": {{"x": 1}}}}' for i in range(count)]


def numbers(elements_read: list[tuple[str, object, str]]) -> list[int]:
    return [
        value["n"] for _, value, problem in elements_read if not problem and isinstance(value, dict)
    ]


@pytest.mark.parametrize("window", [1, 50, 1 << 18])
@pytest.mark.parametrize("suffix", ["", " \n" * 40, "\0" * 99], ids=["", "space", "zeros"])
@pytest.mark.parametrize("damaged", [[0], [1], [8], [0, 1], [2, 5], [0, 4, 8], list(range(1, 9))])
def test_entries_without_closing_brace_are_reported_one_by_one(damaged, suffix, window):
    parts = numbered_members(10)
    for number in damaged:
        parts[number] = parts[number][:-1]
    text = "{" + ", ".join(parts) + "}"
    elements_read, problem = read((text + suffix).encode(), window)
    assert bool(problem) == ("\0" in suffix)
    assert numbers(elements_read) == [i for i in range(10) if i not in damaged]
    for number in damaged:
        name, value, reason = elements_read[number]
        assert (name, value) == (f"q{number}", None)
        assert reason.endswith(f"next entry at byte {text.index(parts[number + 1])} of the file")
    # The same when reading starts at the damaged entry.
    start = text.index(parts[damaged[-1]])
    assert numbers(read(text.encode(), window, start=start)[0]) == list(range(damaged[-1] + 1, 10))


def test_a_missing_comma_damages_no_entry():
    text = "{" + ", ".join(numbered_members(9)).replace(', "q5"', '"q5"') + "}"
    elements_read, problem = read(text.encode(), 64)
    assert (numbers(elements_read), problem) == (list(range(9)), "")


def test_the_search_for_a_missing_brace_is_limited(monkeypatch):
    monkeypatch.setattr(textfile, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(jsoncursor, "_REACH", 300)
    parts = numbered_members(500)
    parts[7] = parts[7][:-1]
    read_sizes = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read_sizes.append(size)
            return super().read(size)

    with mock.patch.object(jsoncursor, "_WINDOW", 100):
        elements_read = list(elements(Counted(("{" + ", ".join(parts) + "}").encode())))
    assert [e.value["n"] for e in elements_read if not e.problem] == [
        i for i in range(500) if i != 7
    ]
    assert "no end before the next entry" in elements_read[7].problem
    assert max(read_sizes) < 5000
