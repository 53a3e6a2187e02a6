"""Small data sets in their published layouts, which the readers of `mdm.sources` expect.

Every writer takes a folder and returns it. An image's bytes are its name: readers do not decode
images.
"""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

INFO = {"description": "small", "version": "1.0", "year": 2014}


def image_bytes(name: str) -> bytes:
    return f"image {name}".encode()


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_images(root: Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(name))


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)


def tar_bytes(files: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tgz(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(tar_bytes(files)))


def pack(root: Path, archive: str) -> None:
    """Move files into an archive beside them; `archive` is "<archive>:<folder or file to pack>"."""
    path, _, folder = archive.partition(":")
    base = (root / path).parent
    files = {p.relative_to(base).as_posix(): p for p in sorted((base / folder).rglob("*.*"))}
    if (base / folder).is_file():
        files = {folder: base / folder}
    content = {name: p.read_bytes() for name, p in files.items()}
    if path.endswith(".zip"):
        write_zip(root / path, content)
    else:
        write_tgz(root / path, content.items())
    for p in files.values():
        p.unlink()
    if (base / folder).is_dir():
        (base / folder).rmdir()


def coco_name(number: int, edition: str) -> str:
    return f"COCO_{edition}_{number:012d}.jpg" if "2014" in edition else f"{number:012d}.jpg"


def write_coco(root: Path, edition: str = "train2014", count: int = 3) -> Path:
    """Two captions per image."""
    images = [
        {"license": 3, "file_name": coco_name(9 * n, edition), "coco_url": "http://x", "id": 9 * n}
        for n in range(1, count + 1)
    ]
    captions = [
        {"image_id": 9 * n, "id": 100 * n + k, "caption": f"Caption {k} of é {n}."}
        for k in range(2)
        for n in range(count, 0, -1)
    ]
    plain = {"info": INFO, "images": images, "licenses": [{"id": 1}], "annotations": captions}
    write_json(root / f"annotations/captions_{edition}.json", plain)
    write_images(root, (f"{edition}/{image['file_name']}" for image in images))
    return root


def write_karpathy(root: Path, name: str, parts: Sequence[str], folder: str = "") -> Path:
    """An image with two sentences for each part; COCO's images are in val2014."""
    images = []
    for n, part in enumerate(parts):
        place = {"filepath": "val2014", "cocoid": 9 * n} if name == "coco" else {}
        file = coco_name(9 * n, "val2014") if name == "coco" else f"{1000 + n}.jpg"
        sentences = [
            {"tokens": ["a"], "raw": f"Sentence {k} of {n}.", "imgid": n, "sentid": 2 * n + k}
            for k in range(2)
        ]
        ids = [s["sentid"] for s in sentences]
        image = {"filename": file, "imgid": n, "split": part, "sentids": ids}
        images.append({**place, **image, "sentences": sentences})
    write_json(root / f"dataset_{name}.json", {"images": images, "dataset": name})
    write_images(root, (f"{folder or 'val2014'}/{image['filename']}" for image in images))
    return root


def write_flickr30k(root: Path, count: int = 3) -> Path:
    lines = [
        f"{1000 + n}.jpg#{k}\tA caption {k} , of {n} .\n" for n in range(count) for k in range(5)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "results_20130124.token").write_text("".join(lines))
    write_images(root, (f"flickr30k-images/{1000 + n}.jpg" for n in range(count)))
    return root


def write_gqa(root: Path, split: str = "train", count: int = 3) -> Path:
    plain = {
        f"{n:08d}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2)"}],
            "entailed": [],
            "equivalent": [f"{n:08d}"],
            "question": f"What is in {n}?",
            "imageId": f"{2400 + n // 2}" if n % 3 else f"n{n}",
            "isBalanced": True,
            "answer": f"thing {n}",
            "fullAnswer": f"It is thing {n}.",
        }
        for n in range(count)
    }
    write_json(root / f"{split}_balanced_questions.json", plain)
    write_images(root, {f"images/{entry['imageId']}.jpg" for entry in plain.values()})
    return root


def write_ocrvqa(root: Path, books: int = 4) -> Path:
    """Books take the splits in turn; the second book's image has the extension of its URL."""
    plain = {}
    for n in range(books):
        extension = ".png" if n == 1 else ".jpg"
        plain[f"0{n}X"] = {
            "imageURL": f"http://images.example.com/{n}{extension}",
            "questions": ["Who wrote this?", f"Is this book number {n}?"],
            "answers": [f"Author {n}", "Yes"],
            "title": f"Title {n}",
            "split": 1 + n % 3,
        }
        write_images(root, [f"images/0{n}X{extension}"])
    write_json(root / "dataset.json", plain)
    return root


def votes(*answers: str) -> list[dict[str, Any]]:
    return [
        {"answer": a, "raw_answer": f"raw {a}", "answer_confidence": "yes", "answer_id": i + 1}
        for i, a in enumerate(answers)
    ]


def write_textvqa(root: Path, split: str = "train", questions: int = 3) -> Path:
    entries = [
        {
            "question": f"what does sign {n} say?",
            "image_id": f"00{n}a12",
            "image_width": 1024,
            "flickr_original_url": "http://x",
            "answers": ["stop", f"go {n}", "", f"go {n}"] + ["stop", f"go {n}"] * 3,
            "question_tokens": ["what"],
            "question_id": 34602 + n,
            "set_name": split,
        }
        for n in range(questions)
    ]
    plain = {
        "dataset_type": split,
        "dataset_name": "textvqa",
        "dataset_version": "0.5.1",
        "data": entries,
    }
    write_json(root / f"TextVQA_0.5.1_{split}.json", plain)
    write_images(root, (f"train_images/{entry['image_id']}.jpg" for entry in entries))
    return root


def write_visual_genome(root: Path, count: int = 3) -> Path:
    """Images lie in the two folders in turn."""
    qas, regions = [], []
    for n in range(1, count + 1):
        questions = [
            {
                "a_objects": [],
                "question": f"What colour is {n}?",
                "image_id": n,
                "qa_id": 986700 + 10 * n + k,
                "answer": f"Green {k}.",
                "q_objects": [],
            }
            for k in range(2)
        ]
        qas.append({"id": n, "qas": questions})
        box = {"region_id": 1380 + n, "width": 82, "height": 139, "image_id": n, "x": 421, "y": 57}
        regions.append({"regions": [{**box, "phrase": f"the clock {n} is green"}], "id": n})
        write_images(root, [f"VG_100K{'' if n % 2 else '_2'}/{n}.jpg"])
    write_json(root / "question_answers.json", qas)
    write_json(root / "region_descriptions.json", regions)
    return root


def write_mscoco_vqa(root: Path, prefix: str, split: str = "train", questions: int = 4) -> Path:
    """VQAv2 with the prefix "v2_", OK-VQA with ""; two questions an image."""
    edition = f"{split}2014"
    question_entries, annotations = [], []
    for n in range(questions):
        ids = {"image_id": 458752 + n // 2, "question_id": 458752000 + n}
        question_entries.append({**ids, "question": f"What is this number {n}?"})
        answers = {
            "question_type": "what is",
            "answer_type": "other",
            "answers": votes("net", f"ball {n}", f"ball {n}"),
        }
        if prefix:
            answers["multiple_choice_answer"] = f"ball {n}"
        annotations.append({**answers, **ids})
    head = {"info": INFO, "license": {"name": "CC"}, "data_subtype": edition}
    kinds = {"task_type": "Open-Ended", "data_type": "mscoco"}
    write_json(
        root / f"{prefix}OpenEnded_mscoco_{edition}_questions.json",
        {**head, **kinds, "questions": question_entries},
    )
    write_json(
        root / f"{prefix}mscoco_{edition}_annotations.json", {**head, "annotations": annotations}
    )
    names = {coco_name(q["image_id"], edition) for q in question_entries}
    write_images(root, (f"{edition}/{name}" for name in names))
    return root


def write_vizwiz(root: Path, split: str = "train", questions: int = 3) -> Path:
    entries = [
        {
            "image": f"VizWiz_{split}_{n:08d}.jpg",
            "question": f"What's this {n}?",
            "answers": [
                {"answer_confidence": "yes", "answer": a}
                for a in ("basil", f"leaf {n}", f"leaf {n}", "unanswerable")
            ],
            "answer_type": "other",
            "answerable": 1,
        }
        for n in range(questions)
    ]
    write_json(root / f"Annotations/{split}.json", entries)
    write_images(root, (f"{split}/{entry['image']}" for entry in entries))
    return root


def write_llava(root: Path) -> Path:
    places = [
        "coco/train2017/000000033471.jpg",
        "gqa/images/2354786.jpg",
        "ocr_vqa/images/0X.jpg",
        "textvqa/train_images/00a.jpg",
        "vg/VG_100K/2.jpg",
        "vg/VG_100K_2/1.jpg",
    ]
    entries: list[dict[str, Any]] = []
    for n, place in enumerate([*places, places[0]]):
        turns = [
            {"from": "human", "value": f"<image>\nWhat is in {n}?" if n % 2 else "What?\n<image>"},
            {"from": "gpt", "value": f"Thing {n}."},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "No more."},
        ]
        entries.append({"id": Path(place).stem, "image": place, "conversations": turns})
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    entries.insert(2, {"id": "wgByO4Y_0", "model": "", "conversations": talk})
    write_json(root / "llava_v1_5_mix665k.json", entries)
    write_images(root, places)
    return root


ULTRACHAT = pa.schema(
    [
        ("prompt", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
    ]
)


def write_ultrachat_200k(
    root: Path, dialogues: Sequence[Sequence[str]], split: str = "train_sft", group_rows: int = 3
) -> Path:
    rows = [
        {
            "prompt": turns[0],
            "prompt_id": f"{n:064x}",
            "messages": [
                {"content": t, "role": ("user", "assistant")[i % 2]} for i, t in enumerate(turns)
            ],
        }
        for n, turns in enumerate(dialogues)
    ]
    path = root / f"data/{split}-00000-of-00001-a3ecf92756993583.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, ULTRACHAT), path, row_group_size=group_rows)
    return root
