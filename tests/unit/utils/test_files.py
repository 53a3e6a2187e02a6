"""Small JSON files after crashes: what is read, what is warned of, and how they are written."""

import io
import json
import logging

import pytest

from mdm.utils import files
from mdm.utils.journal import Journal


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mdm"]


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (bytes(100), "zero bytes"),
        (b'{"a": 1, \0\0\0', "zero bytes"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1', "cut short, or not JSON"),
        (b"[" * 100_000, "cut short, or not JSON"),
        (b"[1]", "a list, not an object"),
        (b"null", "a NoneType, not an object"),
        (b"{}", "no 'a'"),
        (b'{"a": "1"}', "'a' is not a finite number"),
        (b'{"a": NaN}', "'a' is not a finite number"),
        (b'{"a": true}', "'a' is not a finite number"),
        (b'{"a": 1' + b"0" * 400 + b"}", "'a' is not a finite number"),
    ],
)
def test_a_damaged_object_is_ignored_with_one_warning(tmp_path, caplog, data, wrong):
    path = tmp_path / "state.json"
    path.write_bytes(data)
    for _ in range(3):
        assert files.read_json(path, {"a": float}) == {}
    assert warnings(caplog) == [f"{path} is damaged: {wrong}; it is ignored"]
    with pytest.raises(files.DamagedFileError, match=str(path)):
        files.load_json(path, {"a": float})


def test_a_missing_file_is_empty_and_no_damage(tmp_path, caplog):
    assert files.read_json(tmp_path / "none.json") == {}
    assert files.read_lines(tmp_path / "none.jsonl") == []
    assert warnings(caplog) == []


def test_undamaged_lines_are_read_and_damaged_ones_counted(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    good = [json.dumps({"a": n}).encode() for n in range(5)]
    bad = [b'{"a": 1, "b', bytes(4096), b'{"a": "\xfe"}', b"7", b'{"b": 1}']
    data = b"\n".join(x for pair in zip(bad, good, strict=True) for x in pair)
    path.write_bytes(data + b"\n" + bytes(512) + b'{"a": 5}\n')  # appended after a power cut
    assert files.read_lines(path, {"a": int}) == [{"a": n} for n in range(6)]
    line = f"{path}: 6 damaged lines skipped; line 1: cut short, or not JSON"
    assert warnings(caplog) == [line]
    assert files.read_lines(path, {"a": int}, repair=True) == [{"a": n} for n in range(6)]
    assert path.read_bytes() == b"".join(json.dumps({"a": n}).encode() + b"\n" for n in range(6))


@pytest.mark.parametrize("tail", [b'{"a": 1', b'{"a": 1}', bytes(10_000), b"\xff"])
@pytest.mark.parametrize("whole", [b"", b'{"a": 0}\n'])
def test_appending_cuts_a_torn_last_line(tmp_path, tail, whole):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + tail)
    files.append_line(path, {"a": 2})
    assert path.read_bytes() == whole + b'{"a": 2}\n'


def test_a_last_line_without_its_newline_is_not_read(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n{"a": 12}')  # perhaps of {"a": 123}
    assert files.read_lines(path) == [{"a": 0}]
    assert warnings(caplog) == [f"{path}: 1 damaged line skipped; line 2: cut short"]


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    files.append_line(path, {"a": 0})

    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            return super().write(data[:4])

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", lambda self, *args, **options: FullDisk(self, "a+"))
        with pytest.raises(OSError, match="No space left"):
            files.append_line(path, {"a": 1})
    assert path.read_bytes() == b'{"a": 0}\n'


def test_a_folder_in_a_files_place_is_set_aside(tmp_path, caplog):
    for name in ("one.json", "two.jsonl"):
        (tmp_path / name / "inside").mkdir(parents=True)
    assert files.read_json(tmp_path / "one.json") == {}
    assert files.read_lines(tmp_path / "two.jsonl") == []
    files.write_json(tmp_path / "one.json", {"a": 1})
    files.append_line(tmp_path / "two.jsonl", {"a": 1})
    assert files.read_json(tmp_path / "one.json") == {"a": 1}
    assert files.read_lines(tmp_path / "two.jsonl") == [{"a": 1}]
    assert (tmp_path / "one.json.folder-1" / "inside").is_dir()
    assert len(warnings(caplog)) == 4


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "state.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, object())
    with pytest.raises(FileExistsError):
        files.write_json(path / "below", {})
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def entries(journal: Journal) -> list[int]:
    waiting = journal.waiting()
    if waiting:
        journal.take(waiting[-1][1])
    return [entry["n"] for entry, _, _ in waiting]


def written(folder, count: int) -> None:
    journal = Journal(folder)
    for n in range(count):
        assert journal.append({"kind": "x", "n": n})
    journal.close()


@pytest.mark.parametrize("tail", [b'{"kind": "x', bytes(4096), b"\xff\n", b"[]\n", b"5", b"{}\n"])
def test_a_journal_passes_over_damage_and_nothing_else(tmp_path, caplog, tail):
    written(tmp_path, 3)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(tail)
    journal = Journal(tmp_path)
    journal.append({"kind": "x", "n": 3})
    journal.append({"kind": "x", "n": 4})
    assert entries(journal) == [0, 1, 2, 3, 4]
    assert not journal.waiting()
    assert len(journal) == 0
    journal.close()
    assert len(warnings(caplog)) == 1
    assert "journal.jsonl: 1 damaged line skipped" in warnings(caplog)[0]
    again = Journal(tmp_path)
    assert entries(again) == []
    again.close()


@pytest.mark.parametrize(
    "note", [b"", b"x", bytes(2), b"-5", b"\xff", b"5", b"999999", b"9" * 5000]
)
def test_entries_are_brought_again_where_the_offset_is_damaged(tmp_path, caplog, note):
    written(tmp_path, 3)
    (tmp_path / "taken").write_bytes(note)
    journal = Journal(tmp_path)
    assert entries(journal) == [0, 1, 2]
    journal.close()
    assert len(warnings(caplog)) == 1
    assert f"{tmp_path}/taken" in warnings(caplog)[0]


def test_what_was_damaged_alone_does_not_wait_for_ever(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "journal.jsonl").write_bytes(b'{"ki\n\n' + bytes(100))
    journal = Journal(tmp_path)
    assert journal.waiting() == []
    assert len(journal) == 0
    journal.close()
