"""Objects of entries: a sound file is read as the standard parser does, damage costs its entry."""

import io
import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.sources import jsoncursor, streams
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
# Trees, as of comments with replies: an entry holds others of its own shape.
TREE = st.recursive(
    st.just({}),
    lambda below: st.fixed_dictionaries({"id": TEXTS, "replies": st.dictionaries(TEXTS, below)}),
    max_leaves=6,
)


def read(data: bytes, window: int, **options: int) -> tuple[list[tuple[str, object, str]], str]:
    """Name, value and problem of every element, and the problem of the file."""
    found = []
    try:
        with mock.patch.object(jsoncursor, "_WINDOW", window):
            for element in elements(io.BytesIO(data), **options):
                found.append((element.name, element.value, element.problem))
    except BrokenFileError as error:
        return found, str(error)
    return found, ""


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
def test_a_sound_object_is_read_as_the_standard_parser_reads_it(named, one, other, window, plain):
    text = json.dumps(
        named,
        ensure_ascii=plain,
        separators=(f"{one},{other}", f"{other}:{one}"),
        indent=one or None,
    )
    found, problem = read((one + text + other).encode(), window)
    assert not problem
    assert found == [(name, value, "") for name, value in named.items()]


DAMAGE = {
    "no closing brace": lambda text, at: text[:-1],
    "no opening brace": lambda text, at: text.replace("{", "", 1),
    "no bracket": lambda text, at: cut(text, at, "{}[]"),
    "an unterminated string": lambda text, at: cut(text, at, '"'),
    "no colon": lambda text, at: text.replace(":", "", 1),
    "stray bytes": lambda text, at: text[:at] + "\0\0\x7f" + text[at:],
    "a stray brace": lambda text, at: text[:at] + "}" + text[at:],
}


def cut(text: str, at: int, marks: str) -> str:
    """Without the mark that stands at or behind that place."""
    at = next(i for i in [*range(at, len(text)), *range(at)] if text[i] in marks)
    return text[:at] + text[at + 1 :]


@pytest.mark.parametrize("kind", DAMAGE)
@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, min_size=4, max_size=7), st.data(), WINDOWS, SPACES)
def test_damage_costs_the_damaged_entry_alone(kind, entries, data, window, space):
    entries = [{**entry, "number": i} for i, entry in enumerate(entries)]
    victim = data.draw(st.integers(1, len(entries) - 2))
    members = [member(i, entry) for i, entry in enumerate(entries)]
    at = data.draw(st.integers(0, len(members[victim]) - 1))
    members[victim] = DAMAGE[kind](members[victim], at)
    text = "{" + f",{space}".join(members) + space + "}" + space
    found, problem = read(text.encode(), window)
    assert not problem, text
    others = entries[:victim] + entries[victim + 1 :]
    assert [value for _, value, _ in found if value in others] == others, text
    if kind in ("no closing brace", "no opening brace", "no colon"):
        assert any(problem for _, _, problem in found)
    if kind == "no closing brace":
        behind = text.index(members[victim + 1])
        reason = f"invalid JSON: no end before the next entry at byte {behind} of the file"
        assert found[victim] == (f'k"{victim}', None, reason)


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, min_size=3, max_size=6), st.data(), WINDOWS)
def test_of_a_truncated_object_all_whole_entries_are_read(entries, data, window):
    text = "{" + ", ".join(member(i, entry) for i, entry in enumerate(entries)) + "}"
    at = data.draw(st.integers(len("{" + member(0, entries[0])), len(text) - 1))
    found, problem = read(text[:at].encode(), window)
    whole = sum(at >= len("{" + ", ".join(map(member, range(i), entries))) for i in range(1, 9))
    whole = min(whole, len(entries))
    assert [value for _, value, _ in found] == entries[:whole]
    assert "has no end" in problem or "before its last bracket" in problem or "byte" in problem


def rows(count: int) -> list[str]:
    return [f'"q{i}": {{"n": {i}, "text": "}} {{", "of": {{"x": 1}}}}' for i in range(count)]


def numbers(found: list[tuple[str, object, str]]) -> list[int]:
    return [value["n"] for _, value, problem in found if not problem and isinstance(value, dict)]


@pytest.mark.parametrize("window", [1, 50, 1 << 18])
@pytest.mark.parametrize("behind", ["", " \n" * 40, "\0" * 99], ids=["", "space", "zeros"])
@pytest.mark.parametrize("victims", [[0], [1], [8], [0, 1], [2, 5], [0, 4, 8], list(range(1, 9))])
def test_entries_without_their_last_brace_are_told_one_by_one(victims, behind, window):
    parts = rows(10)
    for victim in victims:
        parts[victim] = parts[victim][:-1]
    text = "{" + ", ".join(parts) + "}"
    found, problem = read((text + behind).encode(), window)
    assert bool(problem) == ("\0" in behind)
    assert numbers(found) == [i for i in range(10) if i not in victims]
    for victim in victims:
        name, value, reason = found[victim]
        assert (name, value) == (f"q{victim}", None)
        assert reason.endswith(f"next entry at byte {text.index(parts[victim + 1])} of the file")
    # The same when reading begins there.
    start = text.index(parts[victims[-1]])
    assert numbers(read(text.encode(), window, start=start)[0]) == list(range(victims[-1] + 1, 10))


def test_a_missing_comma_damages_no_entry():
    text = "{" + ", ".join(rows(9)).replace(', "q5"', '"q5"') + "}"
    found, problem = read(text.encode(), 64)
    assert (numbers(found), problem) == (list(range(9)), "")


def test_an_entry_without_its_last_brace_is_given_up_where_entries_may_not_be_so_long(monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(jsoncursor, "_REACH", 300)
    parts = rows(500)
    parts[7] = parts[7][:-1]
    asked = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    with mock.patch.object(jsoncursor, "_WINDOW", 100):
        found = list(elements(Counted(("{" + ", ".join(parts) + "}").encode())))
    assert [e.value["n"] for e in found if not e.problem] == [i for i in range(500) if i != 7]
    assert "no end before the next entry" in found[7].problem
    assert max(asked) < 5000
