import gzip
import io
import tarfile

import numpy as np
import pytest

from mdm.sources import streams, textfile
from mdm.sources.streams import tar_members, tgz_lines, tgz_members
from mdm.sources.textfile import lines_with_offsets, parse_line
from tests.published_sets import tar_bytes


@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_header_after_the_first_member_loses_only_that_member(streaming):
    zeros = b"2" * 600 + bytes(2000)  # here, blocks of zeros do not end the archive
    data = bytearray(tar_bytes([("a", b"1" * 600), ("b.jpg", zeros), ("c", b"3"), ("d", b"")]))
    data[512 + 1024 + 200] ^= 0xFF  # in the header of b
    members = list(tar_members(io.BytesIO(bytes(data)), streaming=streaming))
    assert [m.name for m in members] == ["a", "b.jpg", "c", "d"]
    assert [m.data for m in members] == [b"1" * 600, None, b"3", b""]
    assert members[1].problem.startswith("damaged tar header")


def test_a_truncated_gzip_stream_returns_what_it_unpacked_before_the_error(tmp_path):
    random = np.random.default_rng(0)
    content = [(str(i), random.bytes(3000)) for i in range(20)]
    packed = gzip.compress(tar_bytes(content))
    (tmp_path / "a.tgz").write_bytes(packed[: len(packed) // 2])
    members = tgz_members(tmp_path / "a.tgz")
    names = []
    with pytest.raises(EOFError, match="end-of-stream marker"):
        names.extend(m.name for m in members)
    # extend() keeps the names before the error
    assert names == [str(i) for i in range(len(names))]
    assert len(names) >= 6


@pytest.mark.parametrize("streaming", [True, False])
def test_a_truncated_member_is_an_error(streaming):
    data = tar_bytes([("a", b"1" * 600), ("b", b"2" * 6000)])[: 512 + 1024 + 512 + 1000]
    members = tar_members(io.BytesIO(data), streaming=streaming)
    assert next(members).name == "a"
    with pytest.raises(streams.ARCHIVE_ERRORS):
        list(members)


def test_links_and_outside_names_are_problems_and_later_members_are_read():
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
    members = {m.name: (m.data, m.problem) for m in tar_members(out, streaming=False)}
    assert "link" in members["link.jpg"][1]
    assert "outside" in members["../up.jpg"][1]
    assert members["ok.jpg"] == (b"xx", "")


def test_the_gzip_checksum_is_verified(tmp_path):
    data = bytearray(gzip.compress(tar_bytes([("a", b"1" * 600)]), mtime=0))
    data[-6] ^= 0xFF  # inside the CRC at the end
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(streams.ARCHIVE_ERRORS, match="CRC"):
        list(tgz_members(tmp_path / "a.tgz"))


def test_a_bomb_in_an_archive_loses_only_that_member(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_MEMBER_BYTES", 1 << 20)
    path = tmp_path / "a.tgz"
    content = [("ok", b"1"), ("bomb.jpg", bytes(32 << 20)), ("white.bmp", bytes(1 << 20))]
    path.write_bytes(gzip.compress(tar_bytes(content) + bytes(32 << 20)))  # and endless padding
    members = {m.name: (m.data, m.problem) for m in tgz_members(path)}
    assert members == {
        "ok": (b"1", ""),
        "bomb.jpg": (None, f"tar member of {32 << 20} bytes is too large"),
        "white.bmp": (bytes(1 << 20), ""),
    }


def test_repetitive_annotations_are_read_whatever_their_compression_ratio(tmp_path):
    line = b'{"img_path": "./000/a.jpg", "prompt": "a white square"}\n'
    lines = (40 << 20) // len(line)
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(tar_bytes([("a.jsonl", line * lines)])))
    assert path.stat().st_size * streams.MAX_RATIO < 24 << 20
    assert sum(1 for _ in tgz_lines(path)) == lines


@pytest.mark.parametrize("limit", [10, 1 << 24])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_with_any_ending_and_their_offsets(monkeypatch, limit, end, last):
    monkeypatch.setattr(textfile, "MAX_LINE_BYTES", limit)
    words = [b"one", b"", b"three\t ", b"x" * 33, b"five", b"12345678"]
    data = end.join(words) + end * last
    lines = [(at, line) for at, line in lines_with_offsets(io.BytesIO(data)) if line.strip()]
    assert [line.rstrip(b"\r\n")[:limit] for _, line in lines] == [w[:limit] for w in words if w]
    assert all(data[at:].startswith(line) for at, line in lines)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_header_that_claims_gigabytes_of_names_is_an_error(kind, streaming):
    info = tarfile.TarInfo("a")
    info.type, info.size = kind, 5 << 30
    data = tar_bytes([("ok", b"1")])[:1024] + info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    members = tar_members(io.BytesIO(data), streaming=streaming)
    assert next(members).name == "ok"
    with pytest.raises(tarfile.ReadError, match="tar header claims 5368709120 bytes of names"):
        next(members)


def test_sparse_members_are_problems():
    info = tarfile.TarInfo("sparse.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (200 << 20)  # the size it would have when extracted
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    members = list(tar_members(io.BytesIO(bytes(header) + bytes(1024)), streaming=False))
    assert [(m.name, m.data) for m in members] == [("sparse.jpg", None)]
    assert "sparse" in members[0].problem


def test_members_are_released_after_use():
    data = tar_bytes([(str(i), b"x") for i in range(200)])
    with streams.open_tar(io.BytesIO(data), streaming=True) as tar:
        names = []
        for info in streams.headers(tar):
            names.append(info.name)
            assert len(tar.members) <= 1
    assert names == [str(i) for i in range(200)]


def test_lines_of_all_jsonl_members_are_read_with_their_numbers(tmp_path):
    content = tar_bytes([("x.jsonl", b"{}\n[]\n"), ("readme", b"no\n"), ("y.jsonl", b"1")])
    (tmp_path / "a.tgz").write_bytes(gzip.compress(content))
    assert list(tgz_lines(tmp_path / "a.tgz")) == [
        (1, b"{}\n"),
        (2, b"[]\n"),
        (1, b"1"),
    ]


def test_an_endless_line_is_cut_and_the_next_line_is_read(monkeypatch):
    monkeypatch.setattr(textfile, "MAX_LINE_BYTES", 10)
    data = b"short\n" + b"x" * 1000 + b"\nnext\n"
    lines = [line for _, line in lines_with_offsets(io.BytesIO(data))]
    assert [lines[0], lines[2]] == [b"short\n", b"next\n"]
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        parse_line(lines[1])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
        (b'{"a": ', "invalid JSON"),
        (b"[1]", "a list, not an object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_has_a_reason(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_line(line)
