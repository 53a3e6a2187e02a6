import gzip
import io
import tarfile

import pytest

from mdm.sources import streams
from mdm.sources.streams import bounded_lines, parse_row, tar_members, tgz_lines, tgz_members


def tar_bytes(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_damaged_header_after_the_first_member_is_an_error_not_an_end():
    data = bytearray(tar_bytes([("a", b"1" * 600), ("b", b"2" * 600), ("c", b"3")]))
    data[512 + 1024 + 20] ^= 0xFF  # in the header of b
    members = tar_members(io.BytesIO(bytes(data)), streaming=True)
    assert next(members).name == "a"
    with pytest.raises(tarfile.ReadError):
        list(members)


@pytest.mark.parametrize("streaming", [True, False])
def test_truncated_member_is_an_error(streaming):
    data = tar_bytes([("a", b"1" * 600), ("b", b"2" * 6000)])[: 512 + 1024 + 512 + 1000]
    members = tar_members(io.BytesIO(data), streaming=streaming)
    assert next(members).name == "a"
    with pytest.raises(streams.ARCHIVE_ERRORS):
        list(members)


def test_links_and_names_outside_are_problems_and_later_members_still_come():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("../up.jpg", "ok.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"xx"))
    out.seek(0)
    found = {m.name: (m.data, m.problem) for m in tar_members(out, streaming=False)}
    assert "link" in found["link.jpg"][1]
    assert "outside" in found["../up.jpg"][1]
    assert found["ok.jpg"] == (b"xx", "")


def test_gzip_checksum_is_verified(tmp_path):
    data = bytearray(gzip.compress(tar_bytes([("a", b"1" * 600)]), mtime=0))
    data[-6] ^= 0xFF  # inside the CRC at the end
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(streams.ARCHIVE_ERRORS, match="CRC"):
        list(tgz_members(tmp_path / "a.tgz"))


def test_lines_of_jsonl_members_with_numbers(tmp_path):
    content = tar_bytes([("x.jsonl", b"{}\n[]\n"), ("readme", b"no\n"), ("y.jsonl", b"1")])
    (tmp_path / "a.tgz").write_bytes(gzip.compress(content))
    assert list(tgz_lines(tmp_path / "a.tgz")) == [
        ("x.jsonl", 1, b"{}\n"),
        ("x.jsonl", 2, b"[]\n"),
        ("y.jsonl", 1, b"1"),
    ]


def test_endless_line_is_cut_and_the_next_line_survives(monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 10)
    lines = list(bounded_lines(io.BytesIO(b"short\n" + b"x" * 1000 + b"\nnext\n")))
    assert [lines[0], lines[2]] == [b"short\n", b"next\n"]
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        parse_row(lines[1])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
        (b'{"a": ', "invalid JSON"),
        (b"[1]", "a list, not an object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_rows_say_why(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(line)
