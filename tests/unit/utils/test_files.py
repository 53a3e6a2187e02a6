"""Small JSON files after crashes: what is read, what is warned of, and how they are written."""

import io
import json

import pytest

from mdm.utils import files


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
