"""Data sets as people keep them on their disks give the same records as the published ones."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from mdm import sources
from mdm.sources import imagenet, imagenet_classes
from mdm.sources.record import RawRecord
from mdm.sources.textfile import decode_line, is_clutter
from mdm.sources.ultrachat import _turns
from tests import published_sets as sets

MARK = b"\xef\xbb\xbf"


def devkit(root: Path) -> Path:
    """Flat validation images, with labels and class names in the extracted devkit."""
    synsets = np.empty(
        (3, 1), [(n, "O") for n in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    )
    for i, wnid in enumerate(("n00000003", "n00000001", "n00000002")):
        synsets[i, 0] = (i + 1, wnid, f"name {wnid}", 0)
    (root / imagenet_classes.DEVKIT / "data").mkdir(parents=True)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    (root / imagenet_classes.DEVKIT / "data/meta.mat").write_bytes(file.getvalue())
    (root / imagenet_classes.DEVKIT / "data" / imagenet_classes.TRUTH).write_text(
        "1\n2\n3\n3\n2\n1\n"
    )
    sets.write_images(root, [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)])
    return root


def folders(root: Path) -> Path:
    names = (
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\nn01484850 great white shark\n"
    )
    root.mkdir(exist_ok=True)
    (root / imagenet_classes.MAPPING).write_text(names)
    wnids = [line.split()[0] for line in names.splitlines()]
    sets.write_images(root, [f"train/{w}/{w}_{i}.JPEG" for w in wnids for i in range(3)])
    return root


def journey(root: Path) -> Path:
    names = [f"00{a}/{i}.jpg" for a in range(2) for i in range(3)]
    lines = [json.dumps({"img_path": f"./{n}", "prompt": f"prompt {n}"}) for n in names]
    text = "\n".join(lines) + "\n"
    annotations = root / "data/train/train_anno_realease_repath.jsonl.tgz"
    sets.write_tgz(annotations, [("train.jsonl", text.encode())])
    for archive in ("000", "001"):
        files = [(n, sets.image_bytes(n)) for n in names if n.startswith(archive)]
        sets.write_tgz(root / f"data/train/imgs/{archive}.tgz", files)
    return root


def dialogues(root: Path) -> Path:
    entries = [{"id": n, "data": [f"q {n}", f"a\n\n\tb {n} "]} for n in range(5)]
    root.mkdir(exist_ok=True)
    (root / "train_0.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return root


LAYOUTS: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "imagenet folders": ("imagenet", "train", folders),
    "imagenet devkit": ("imagenet", "val", devkit),
    "journeydb": ("journeydb", "train", journey),
    "ultrachat": ("ultrachat", "train", dialogues),
    "coco": ("coco", "train2014", sets.write_coco),
    "coco karpathy": (
        "coco",
        "karpathy-train",
        lambda root: sets.write_karpathy(root, "coco", ("train", "restval", "val")),
    ),
    "flickr30k": ("flickr30k", "all", sets.write_flickr30k),
    "flickr30k karpathy": (
        "flickr30k",
        "train",
        lambda root: sets.write_karpathy(root, "flickr30k", ("train", "val"), "flickr30k-images"),
    ),
    "gqa": ("gqa", "train", sets.write_gqa),
    "ocrvqa": ("ocrvqa", "train", sets.write_ocrvqa),
    "textvqa": ("textvqa", "train", sets.write_textvqa),
    "visual_genome": ("visual_genome", "qa", sets.write_visual_genome),
    "vqav2": ("vqav2", "train", lambda root: sets.write_mscoco_vqa(root, "v2_")),
    "okvqa": ("okvqa", "train", lambda root: sets.write_mscoco_vqa(root, "")),
    "vizwiz": ("vizwiz", "train", sets.write_vizwiz),
    "llava": ("llava", "train", sets.write_llava),
    "llava text": ("llava", "train-text", sets.write_llava),
}

TEXTS = (".json", ".jsonl", ".token", ".txt")


def change_texts(root: Path, change: Callable[[bytes], bytes]) -> int:
    """Change all text files below `root`, also those in gzipped tars; returns their number."""
    changed = 0
    for path in [*root.rglob("*")]:
        if path.suffix in TEXTS:
            path.write_bytes(change(path.read_bytes()))
            changed += 1
        elif path.name.endswith(".jsonl.tgz"):
            with tarfile.open(path) as tar:
                files = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
            sets.write_tgz(path, [(name, change(data)) for name, data in files])
            changed += len(files)
    return changed


def contents(name: str, root: Path, split: str) -> list[tuple[object, ...]]:
    """All records and texts of the split, without their positions in files."""
    imagenet_classes.classes.cache_clear()
    imagenet_classes.devkit_classes.cache_clear()
    imagenet_classes.ground_truth.cache_clear()
    records = []
    for r in sources.records(name, root, split):
        assert isinstance(r, RawRecord), r.reason
        records.append((r.id.partition("@")[0], r.image, r.text, r.turns, r.label))
    texts = sorted(sources.get(name).texts(root, split))
    return [*sorted(records, key=repr), tuple(texts)]


def windows(data: bytes) -> bytes:
    return MARK + data.replace(b"\n", b"\r\n")


VARIANTS: dict[str, Callable[[bytes], bytes]] = {
    "windows": windows,
    "two marks": lambda data: MARK + windows(data),
    "old mac": lambda data: data.replace(b"\n", b"\r"),
    "old mac with a final line feed": lambda data: data.rstrip(b"\n").replace(b"\n", b"\r") + b"\n",
    "blanks at line ends": lambda data: data.rstrip(b"\n").replace(b"\n", b" \t \r\n") + b"\t \r\n",
    "blank lines": lambda data: b"\n\r\n" + data.replace(b"\n", b"\n \n") + b"\n\n \t\n",
    "no final line ending": lambda data: MARK + data.rstrip(b"\n"),
    "end of file mark": lambda data: data + b"\x1a",
    "other white space at line ends": lambda data: data.replace(b"\n", b" \xc2\xa0\x0c\n"),
    "lines of other white space": lambda data: data.replace(b"\n", b"\n\xc2\xa0 \n"),
    "a blank line before the mark": lambda data: b"\r\n" + MARK + data,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_byte_order_marks_and_line_endings_change_no_record(tmp_path: Path, layout: str) -> None:
    name, split, write = LAYOUTS[layout]
    plain = contents(name, write(tmp_path / "plain"), split)
    assert len(plain) > 1
    for number, change in enumerate(VARIANTS.values()):
        root = write(tmp_path / str(number))
        assert change_texts(root, change)
        assert contents(name, root, split) == plain, list(VARIANTS)[number]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_utf16_is_an_error_that_names_the_file_and_the_fix(
    tmp_path: Path, layout: str, encoding: str
) -> None:
    name, split, write = LAYOUTS[layout]
    root = write(tmp_path / "set")
    change_texts(root, lambda data: data.decode().encode(encoding))
    imagenet_classes.ground_truth.cache_clear()
    with pytest.raises(ValueError, match=r"the file is UTF-16.*iconv -f UTF-16 -t UTF-8") as error:
        sources.get(name).units(root, split)
    assert any(mark in str(error.value) for mark in (*TEXTS, ".tgz"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clutter_of_file_managers_adds_no_record(tmp_path: Path, layout: str) -> None:
    name, split, write = LAYOUTS[layout]
    plain = contents(name, write(tmp_path / "plain"), split)
    root = write(tmp_path / "cluttered")
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        for path in [p for p in folder.iterdir() if not is_clutter(p.name)]:
            (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7")
            (folder / "__MACOSX").mkdir(exist_ok=True)
            (folder / "__MACOSX" / f"._{path.name}").write_bytes(b"\0\5\x16\7")
        for clutter in (".DS_Store", "Thumbs.db", "THUMBS.DB", "Desktop.ini", ".directory"):
            (folder / clutter).write_bytes(b"\0\1")
    units = sources.get(name).units(root, split)
    assert [u.fingerprint for u in units] == [
        u.fingerprint for u in sources.get(name).units(tmp_path / "plain", split)
    ]
    assert contents(name, root, split) == plain


def test_clutter_in_tars_adds_no_record(tmp_path: Path) -> None:
    junk = b"\0\5\x16\7"
    root = journey(tmp_path / "journey")
    plain = contents("journeydb", root, "train")
    for path in root.rglob("*.tgz"):
        with tarfile.open(path) as tar:
            files = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        members = [("x/Thumbs.db", junk)]
        for name, data in files:
            beside = Path(name).with_name("._" + Path(name).name).as_posix()
            members += [(beside, junk), (name, data), (f"__MACOSX/{beside}", junk)]
        sets.write_tgz(path, members)
    assert contents("journeydb", root, "train") == plain
    root = folders(tmp_path / "tars")
    plain = contents("imagenet", root, "train")
    outer: list[tuple[str, bytes]] = [("._n01440764.tar", junk), (".DS_Store", junk)]
    for folder in sorted((root / "train").iterdir()):
        inner: list[tuple[str, bytes]] = []
        for path in sorted(folder.iterdir()):
            inner += [(f"._{path.name}", junk), (path.name, path.read_bytes())]
        outer.append((f"{folder.name}.tar", sets.tar_bytes(inner)))
    (root / "train").rename(root / "away")
    outer.append(("__MACOSX/._x.tar", junk))
    (root / imagenet.TRAIN_TAR).write_bytes(sets.tar_bytes(outer))
    assert contents("imagenet", root, "train") == plain


@pytest.mark.parametrize(
    "extension", [".jpeg", ".png", ".gif", ".PNG", ".JPG", ".Jpg", ".webp", ""]
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_is_found_under_any_extension(
    tmp_path: Path, extension: str, packed: bool
) -> None:
    root = sets.write_ocrvqa(tmp_path)
    plain = contents("ocrvqa", root, "train")
    for path in [*(root / "images").iterdir()]:
        path.rename(path.with_suffix(extension))
    if packed:
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for path in [*(root / "images").iterdir()]:
                archive.write(path, f"images/{path.name}")
                path.unlink()
    assert contents("ocrvqa", root, "train") == plain


def test_images_of_llava_and_in_a_tar_are_found_under_any_extension(
    tmp_path: Path,
) -> None:
    root = sets.write_llava(tmp_path / "llava")
    plain = contents("llava", root, "train")
    (root / "ocr_vqa/images/0X.jpg").rename(root / "ocr_vqa/images/0X.gif")
    assert contents("llava", root, "train") == plain
    root = sets.write_flickr30k(tmp_path / "flickr")
    plain = contents("flickr30k", root, "all")
    for path in [*(root / "flickr30k-images").iterdir()]:
        path.rename(path.with_suffix(".png"))
    sets.pack(root, "flickr30k-images.tar.gz:flickr30k-images")
    assert contents("flickr30k", root, "all") == plain


@pytest.mark.parametrize(
    "before", ["", "./", "imgs/", "data/train/imgs/", "/mnt/x/imgs/", "mnt\\x\\imgs\\"]
)
@pytest.mark.parametrize("loose", [False, True])
def test_journeydb_images_are_found_below_any_folders(
    tmp_path: Path, before: str, loose: bool
) -> None:
    root = journey(tmp_path)
    plain = contents("journeydb", root, "train")

    def moved(data: bytes) -> bytes:
        annotations = [json.loads(line) for line in data.splitlines()]
        for annotation in annotations:
            annotation["img_path"] = before + annotation["img_path"].removeprefix("./")
        return "\n".join(map(json.dumps, annotations)).encode()

    change_texts(root, moved)
    for path in [*(root / "data/train/imgs").iterdir()]:
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        path.unlink()
        for name, data in files.items():
            (root / "data/train/imgs" / name).parent.mkdir(exist_ok=True)
            (root / "data/train/imgs" / name).write_bytes(data)
        if not loose:
            inside = before.replace("\\", "/").lstrip("/")
            sets.write_tgz(path, [(f"{inside}{name}", data) for name, data in files.items()])
            for name in files:
                (root / "data/train/imgs" / name).unlink()
    assert contents("journeydb", root, "train") == plain


def llava(root: Path, turns: list[tuple[str, str]], image: bool) -> list[tuple[str, ...]]:
    entry = {"id": "x", "conversations": [{"from": r, "value": v} for r, v in turns]}
    sets.write_json(
        root / "llava_v1_5_mix665k.json",
        [entry | ({"image": "coco/train2017/1.jpg"} if image else {})],
    )
    sets.write_images(root, ["coco/train2017/1.jpg"])
    records = sources.records("llava", root, "train" if image else "train-text")
    return [r.turns if isinstance(r, RawRecord) else (r.reason,) for r in records]


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("<image>\nWhat is <image> in HTML?", "What is <image> in HTML?"),
        ("What is it?\n<image>", "What is it?"),
        ("<image>\r\n\r\n    indented", "    indented"),
        ("<image> What?", "What?"),
        ("What? <image>", "What?"),
        ("<image> is a tag.\n<image>\n", "<image> is a tag."),
        ("Is there an <image> in it?", "Is there an <image> in it?"),
    ],
)
def test_only_the_placeholder_of_the_image_is_removed(
    tmp_path: Path, question: str, kept: str
) -> None:
    answer = "<image>\nis the <image> tag of SVG.\n<image>"
    turns = [
        ("human", question),
        ("gpt", answer),
        ("human", "<image>\nAgain?"),
        ("gpt", "  No.\n"),
    ]
    again = "<image>\nAgain?" if kept != question else "Again?"
    assert llava(tmp_path, turns, True) == [(kept, answer, again, "  No.\n")]
    assert llava(tmp_path, turns, False) == [tuple(text for _, text in turns)]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("hg", "hg"),
        ("ghg", "hg"),
        ("gghghg", "hghg"),
        ("hgh", "hg"),
        ("gh", ""),
        ("h", ""),
        ("g", ""),
        ("hhg", ""),
        ("hgg", ""),
    ],
)
def test_unpaired_turns_at_either_end_of_a_dialogue_are_dropped(
    tmp_path: Path, roles: str, kept: str, image: bool
) -> None:
    names = {"h": "human", "g": "gpt"}
    turns = [(names[role], f"{role}{i}") for i, role in enumerate(roles)]
    (texts,) = llava(tmp_path, turns, image)
    assert "".join(text[0] for text in texts if text[1:].isdecimal()) == kept
    messages = [
        {"role": {"h": "user", "g": "assistant"}[role], "content": f"{role}{i}"}
        for i, role in enumerate(roles)
    ]
    if kept:
        assert _turns({"messages": messages}, "rows") == texts
    else:
        with pytest.raises(ValueError, match=r"no question has a reply|field messages"):
            _turns({"messages": messages}, "rows")


def test_dos_end_of_file_and_backslashes_in_names_are_recognized() -> None:
    assert decode_line(b"\xef\xbb\xbfgoldfish\r\n\x1a") == "goldfish"
    assert is_clutter("folder\\._a.jpg")
    assert not is_clutter("folder\\a._jpg")
