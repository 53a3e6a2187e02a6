import gc
import os
import weakref
import zipfile

import pytest

from mdm.sources import packed, streams
from mdm.sources.packed import Images, listing, locate, open_file, unpacked_size
from mdm.sources.streams import Member
from tests.published_sets import write_tgz, write_zip


def reason(root, name, archives=("p.zip",)):
    with Images(root, archives) as images:
        image = images.read((name,))
    assert image.data is None
    return image.problem


def test_folders_come_before_archives_and_the_first_existing_name_is_read(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.jpg").write_bytes(b"loose")
    write_zip(tmp_path / "p.zip", {"p/1.jpg": b"packed", "p/2.jpg": b"two"})
    write_zip(tmp_path / "far/q.zip", {"q/3.jpg": b"three"})
    with Images(tmp_path, ("p.zip", "far/q.zip", "none.zip")) as images:
        assert images.read(("p/1.jpg",)) == Member("p/1.jpg", b"loose")
        assert images.read(("p/0.jpg", "p/2.jpg")) == Member("p.zip::p/2.jpg", b"two")
        assert images.read(("far/q/3.jpg",)) == Member("far/q.zip::q/3.jpg", b"three")
        assert images.read(("q/3.jpg",)) == Member("", None, "missing file: q/3.jpg")


def test_each_archive_is_opened_once_and_a_repeated_image_is_read_once(tmp_path, monkeypatch):
    write_zip(tmp_path / "p.zip", {f"p/{n}.jpg": b"%d" % n for n in range(9)})
    opened, unzipped = [], []
    unzip = packed._unzip

    class Counted(zipfile.ZipFile):
        def __init__(self, *arguments):
            opened.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(packed.zipfile, "ZipFile", Counted)
    monkeypatch.setattr(packed, "_unzip", lambda *a: unzipped.append(a) or unzip(*a))
    with Images(tmp_path, ("p.zip",)) as images:
        for n in range(9):
            for _ in range(5):
                assert images.read((f"p/{n}.jpg",)).data == b"%d" % n
    assert (len(opened), len(unzipped)) == (1, 9)


def test_a_list_of_archive_members_is_freed_as_soon_as_its_images_are_read(tmp_path):
    write_zip(tmp_path / "p.zip", {"p/1.jpg": b"one"})
    gc.disable()  # a list of a hundred thousand members does not wait for it
    try:
        with Images(tmp_path, ("p.zip",)) as images:
            images.read(("p/1.jpg",))
        archive = weakref.ref(images._zips[0][1])
        del images
        assert archive() is None
    finally:
        gc.enable()


def test_files_too_large_for_memory_are_refused_before_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(streams, "MAX_MEMBER_BYTES", 3 << 20)
    files = {
        "p/bomb.jpg": bytes(2 << 20),
        "p/one colour.jpg": bytes(1 << 20),
        "p/incompressible.jpg": os.urandom(2 << 20),
        "p/huge.jpg": os.urandom(4 << 20),
    }
    write_zip(tmp_path / "p.zip", files)
    assert reason(tmp_path, "p/bomb.jpg").startswith("decompression bomb: ")
    assert reason(tmp_path, "p/huge.jpg") == f"archive member of {4 << 20} bytes is too large"
    with Images(tmp_path, ("p.zip",)) as images:
        for name in ("p/one colour.jpg", "p/incompressible.jpg"):
            assert images.read((name,)).data == files[name]


@pytest.mark.parametrize("archive", ["a.zip", "a.tar.gz"])
def test_highly_compressible_annotations_are_read_as_a_stream(tmp_path, archive):
    size = 40 << 20
    write = write_zip if archive.endswith(".zip") else lambda p, f: write_tgz(p, f.items())
    write(tmp_path / archive, {"a.json": b" " * size + b"7"})
    with open_file(tmp_path, f"{archive}::a.json") as file:
        while len(data := file.read(1 << 20)) == 1 << 20:
            pass
        assert data == b"7"


def test_no_more_than_the_claimed_size_of_a_member_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "p.zip"
    write_zip(path, {"p/large.jpg": bytes(8 << 20)})
    data = path.read_bytes()
    path.write_bytes(data.replace((8 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    assert reason(tmp_path, "p/large.jpg").startswith("damaged archive member: Bad CRC-32")


def test_unreadable_zip_members_have_a_reason(tmp_path, monkeypatch):
    path = tmp_path / "p.zip"
    write_zip(path, {"p/good.jpg": b"good" * 99})
    data = bytearray(path.read_bytes())
    data[40 + len("p/good.jpg")] ^= 0xFF  # in the packed bytes, after header and name
    path.write_bytes(data)
    assert reason(tmp_path, "p/good.jpg").startswith("damaged archive member: ")
    write_zip(path, {"p/odd.jpg": b"x" * 99}, zipfile.ZIP_BZIP2)
    assert "packed by method 12" in reason(tmp_path, "p/odd.jpg")
    write_zip(path, {"p/good.jpg": b"good"})
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    path.write_bytes(data[: central + 8] + b"\x01" + data[central + 9 :])
    assert reason(tmp_path, "p/good.jpg") == "archive member is encrypted"
    monkeypatch.setattr(streams, "MAX_MEMBER_BYTES", 3)
    write_zip(path, {"p/good.jpg": b"good"})
    assert reason(tmp_path, "p/good.jpg") == "archive member of 4 bytes is too large"
    path.write_bytes(b"no zip at all")
    assert reason(tmp_path, "p/x.jpg") == (
        "missing file: p/x.jpg; archive p.zip is unreadable: File is not a zip file"
    )


def test_image_paths_outside_the_data_set_are_refused(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    write_zip(root / "p.zip", {"../secret": b"from the zip", "/etc/x": b"x"})
    for name in ("../secret", str(tmp_path / "secret"), "p/../../secret", ".."):
        assert reason(root, name).startswith("image path points outside the data set: ")
    assert reason(root, "p\0").startswith("image path holds a zero byte: ")
    assert not list(tmp_path.glob("**/etc"))


def test_pipes_folders_and_broken_links_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path, "pipe.jpg") == "not a regular file"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path, "folder.jpg") == "a folder in place of an image"
    os.symlink("nowhere", tmp_path / "dangling.jpg")
    assert reason(tmp_path, "dangling.jpg") == "missing file: broken symbolic link"
    monkeypatch.setattr(streams, "MAX_MEMBER_BYTES", 2)
    (tmp_path / "big.jpg").write_bytes(b"big")
    assert reason(tmp_path, "big.jpg") == "file of 3 bytes is too large"


@pytest.mark.parametrize("name", ["a.json", "a.zip::in/a.json", "a.tar.gz::in/a.json"])
def test_a_text_file_reads_the_same_loose_and_packed(tmp_path, name):
    data = bytes(range(256)) * 4000
    (tmp_path / "a.json").write_bytes(data)
    write_zip(tmp_path / "a.zip", {"other": b"x" * 9999, "in/a.json": data})
    write_tgz(tmp_path / "a.tar.gz", [("other", b"x" * 9999), ("in/a.json", data)])
    assert locate("set", tmp_path, "gone.json", "a.zip::gone.json", name) == name
    assert unpacked_size(tmp_path, name) == len(data)
    with open_file(tmp_path, name) as file:
        file.seek(700_001)
        assert file.read(300) == data[700_001:700_301]
        file.seek(5)
        assert file.read(9) == data[5:14]


def test_damaged_packed_annotations_raise_an_error_when_read(tmp_path):
    write_zip(tmp_path / "a.zip", {"a.json": b"[1, 2]" * 999})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[30 + len("a.json") + 5] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(streams.ARCHIVE_ERRORS), open_file(tmp_path, "a.zip::a.json") as file:
        file.read()
    (tmp_path / "a.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.zip: unreadable: File is not a zip file"):
        locate("set", tmp_path, "a.zip::a.json")
    write_tgz(tmp_path / "a.tgz", [("b.json", b"")])
    with (
        pytest.raises(OSError, match=r"there is no a\.json in it"),
        open_file(tmp_path, "a.tgz::a.json"),
    ):
        pass


def test_listing_depends_on_names_and_sizes(tmp_path):
    (tmp_path / "p/deep").mkdir(parents=True)
    (tmp_path / "p/deep/1.jpg").write_bytes(b"1234")
    write_zip(tmp_path / "q.zip", {"q/1.jpg": b"x"})
    first, size = listing("set", tmp_path, ("p", "q"), ("q.zip", "r.zip"))
    assert size == 4 + (tmp_path / "q.zip").stat().st_size
    assert listing("set", tmp_path, ("p", "q"), ("q.zip", "r.zip"))[0] == first
    (tmp_path / "p/deep/1.jpg").rename(tmp_path / "p/deep/2.jpg")
    assert listing("set", tmp_path, ("p", "q"), ("q.zip", "r.zip"))[0] != first
    with pytest.raises(ValueError, match=r"set: no images in .*: x/, y\.zip"):
        listing("set", tmp_path, ("x",), ("y.zip",))
