import io
import json
import random
import re

import pytest

from mdm.sources import jsoncursor, textfile
from mdm.sources.jsoncursor import BrokenFileError
from mdm.sources.jsonfile import elements, line_elements


def read(data, section="", **options):
    if isinstance(data, str):
        data = data.encode()
    return list(elements(io.BytesIO(data), section, **options))


def pairs(data, section=""):
    return [(e.name, e.value) for e in read(data, section)]


@pytest.fixture(params=[1, 7, 64, 1 << 18])
def window(request, monkeypatch):
    """Text windows that end anywhere: within a number, an escape, a key."""
    monkeypatch.setattr(jsoncursor, "_WINDOW", request.param)


def values(seed, depth=3):
    """A JSON value of any kind."""
    draw = random.Random(seed)
    kind = draw.randrange(8 if depth else 5)
    if kind >= 5:
        items = [values(draw.random(), depth - 1) for _ in range(draw.randrange(4))]
        return items if kind == 5 else {f'k"{i}]': item for i, item in enumerate(items)}
    return [
        None,
        True,
        draw.randrange(-(10**12), 10**12),
        draw.uniform(-1e9, 1e-9),
        "".join(draw.choice('ab"\\{}[],: \n\té漢\U0001f600') for _ in range(draw.randrange(20))),
    ][kind]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_files_are_read_as_by_the_standard_parser(window, ascii_only):
    for seed in range(12):
        items = [values(f"{seed} {i}") for i in range(9)]
        indent = seed % 3 or None
        text = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
        assert pairs(text) == [("", item) for item in items]
        named = {f"key {i} é": item for i, item in enumerate(items)}
        text = json.dumps(named, ensure_ascii=ascii_only, indent=indent)
        assert pairs(text) == list(named.items())
        sections = {
            "info": {"a": [1]},
            "first": items,
            "n": -12.5e3,
            "second": items[::-1],
            "z": [],
        }
        text = json.dumps(sections, ensure_ascii=ascii_only, indent=indent)
        assert pairs(text, "second") == [("", item) for item in items[::-1]]
        assert pairs(text, "z") == []


def test_reading_can_start_and_stop_at_any_entry(window):
    data = json.dumps({"a": [1], "b": [{"id": i, "é": "é" * i} for i in range(20)]}).encode()
    whole = read(data, "b")
    for at in range(1, 20):
        start, stop = whole[at].offset, whole[-1].offset
        assert data[start : start + 5] == b'{"id"'
        assert read(data, "b", start=start) == whole[at:]
        assert read(data, "b", stop=start) == whole[:at]
        assert read(data, "b", start=start, stop=stop) == whole[at:-1]
    named = json.dumps({f"q{i}": {"n": i} for i in range(9)}).encode()
    whole = read(named)
    assert read(named, start=whole[4].offset) == whole[4:]


def test_only_one_window_is_held_in_memory(monkeypatch):
    monkeypatch.setattr(jsoncursor, "_WINDOW", 1000)
    data = json.dumps([{"id": i, "text": "x" * 50} for i in range(2000)]).encode()
    read_sizes = []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            read_sizes.append(size)
            return super().read(size)

    entries = elements(Counted(data))
    assert [next(entries).value["id"] for _ in range(10)] == list(range(10))
    assert len(read_sizes) <= 2
    assert len(list(entries)) == 1990
    assert max(read_sizes) == 1000


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"id": 1 "c": "x"}', "invalid JSON: Expecting ',' delimiter at byte 19 of the file"),
        ('{"c": "bad \\q escape ]}"}', r"invalid JSON: Invalid \\escape"),
        ('{"c": "line\nbreak, \\" ["}', "invalid JSON: Invalid control character"),
        ("{'c': 'x'}", "invalid JSON: Expecting property name"),
        ("nan", "invalid JSON: Expecting value"),
        ("", "invalid JSON: Expecting value"),
        ('{"c": [1, {"d": tru}]}', "invalid JSON: Expecting value"),
        ("[" * 5000 + "]" * 5000, "invalid JSON: nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "invalid JSON: Exceeds the limit"),
        (b'{"c": "caf\xe9"}', "invalid UTF-8 at byte 10 of the entry"),
    ],
)
def test_a_damaged_entry_is_reported_and_later_entries_are_read(window, broken, reason):
    broken = broken if isinstance(broken, bytes) else broken.encode()
    elements_read = read(b'[{"a": 1},' + broken + b', {"b": "{"}, 3]')
    assert [e.value for e in elements_read] == [{"a": 1}, None, {"b": "{"}, 3]
    assert elements_read[1].problem.startswith(reason.replace("\\\\", "\\"))
    assert elements_read[1].offset == 10


@pytest.mark.parametrize(
    ("text", "good", "reason"),
    [
        ('[{"a": 1}, {"a": 2', 1, "entry at byte 11 has no end: invalid JSON"),
        ('[{"a": 1}, {"a": "2', 1, "entry at byte 11 has no end: invalid JSON: Unterminated"),
        ('[{"a": 1}, {"a": 2}', 2, "the file ends at byte 19, before its last bracket"),
        ('[{"a": 1}, {"a": 2, {"b": [3}]', 1, "entry at byte 11 has no end: invalid JSON"),
        ('[{"a": 1}} , 2]', 1, "invalid JSON at byte 9: '}' after an entry"),
        ("[1] [2]", 1, "invalid JSON at byte 2: ']' between entries"),
        ('{"a": 1, 2: 3}', 1, "invalid JSON at byte 9: a key is missing"),
    ],
)
def test_damage_that_hides_the_rest_of_the_file_is_an_error(window, text, good, reason):
    entries = elements(io.BytesIO(text.encode()))
    for _ in range(good):
        assert next(entries).problem == ""
    with pytest.raises(BrokenFileError, match=re.escape(reason)):
        next(entries)


ENTRIES = [
    {"image_id": i, "caption": f'a "[dog]" {{{i}}} \\ b', "answers": [{"answer": "no"}], "id": -i}
    for i in range(5)
]


@pytest.mark.parametrize("damaged", range(1, 5))
@pytest.mark.parametrize("form", ["list", "section", "object"])
def test_no_change_of_one_byte_of_an_entry_loses_another_entry(form, damaged):
    """Each byte is removed, doubled or replaced."""
    parts = [json.dumps(entry) for entry in ENTRIES]
    section, head, tail = "", "[", "]"
    if form == "section":
        section, head, tail = "s", '{"n": [], "s": [', '], "t": [{"x": 1}]}'
    if form == "object":
        head, tail = "{", "}"
        parts = [f'"key {i}": {part}' for i, part in enumerate(parts)]
    text, others = parts[damaged], ENTRIES[:damaged] + ENTRIES[damaged + 1 :]
    for at in range(len(text)):
        for new in ("", text[at] * 2, *'{}[]",:\\\n'):
            parts[damaged] = text[:at] + new + text[at + 1 :]
            data = head + ", ".join(parts) + tail
            values, valid = [], True
            try:
                for element in elements(io.BytesIO(data.encode()), section):
                    values += [] if element.problem else [element.value]
                    valid = valid and not element.problem
            except BrokenFileError:
                valid = damaged < 4 and pytest.fail(f"the rest is lost: {data}")
            assert [value for value in values if value in others] == others, data
            assert not valid or len(values) == 5, data  # a changed value that is valid JSON


def test_damage_before_a_list_is_skipped_and_a_missing_list_is_an_error():
    assert pairs('{"a": [1}, "b": [2]}', "b") == [("", 2)]
    assert pairs('{"info": {"a": "x}, "a": [{"n": 1}], "b" : [2]}', "b") == [("", 2)]
    with pytest.raises(BrokenFileError, match="no list 'c'"):
        read('{"a": [1], "b": {"c": [1]}}', "c")
    with pytest.raises(BrokenFileError, match="'a' is not a list"):
        read('{"a": {}}', "a")


def test_an_endless_entry_is_reported_and_the_next_one_is_read(monkeypatch):
    monkeypatch.setattr(textfile, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(jsoncursor, "_WINDOW", 16)
    for endless in ('"' + "x" * 5000 + '"', "[" + "1," * 900 + "1]"):
        elements_read = read(f"[1, {endless}, 2]")
        assert [e.value for e in elements_read] == [1, None, 2]
        assert elements_read[1].problem == "entry is longer than 100 bytes"


def test_a_byte_order_mark_is_not_part_of_the_text():
    assert pairs(b"\xef\xbb\xbf[1, 2]") == [("", 1), ("", 2)]


def test_lines_are_elements_and_invalid_utf8_is_reported():
    data = "first\n\nzweite \xe9\n".encode() + b"caf\xe9\r\nlast"
    lines = list(line_elements(io.BytesIO(data)))
    assert [e.value for e in lines] == ["first", "zweite é", None, "last"]
    assert lines[2].problem == "invalid UTF-8 at byte 3 of the line"
    assert list(line_elements(io.BytesIO(data), lines[1].offset, lines[3].offset)) == lines[1:3]
