"""The contents of each annotated data set, and the reasons given for its damaged entries."""

import json

import pytest

from mdm import sources
from mdm.sources.record import BadRecord, RawRecord
from tests import published_sets as sets


def change(path, edit):
    """Rewrite a JSON file after `edit` has changed its value in place."""
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))


def read(name, root, split):
    """({id below the split: text or turns}, {id: reason})."""
    records = list(sources.records(name, root, split))
    short = lambda r: r.id.split("/", 2)[2]  # noqa: E731
    good = {short(r): r.text or r.turns for r in records if isinstance(r, RawRecord)}
    bad = {short(r): r.reason for r in records if isinstance(r, BadRecord)}
    assert len(good) + len(bad) == len(records)
    return good, bad


def test_coco_captions_come_image_by_image_and_an_ambiguous_split_is_an_error(tmp_path):
    root = sets.write_coco(tmp_path, "val2017")
    good, _ = read("coco", root, "val2017")
    assert list(good) == ["300", "301", "200", "201", "100", "101"]  # image by image
    assert good["301"] == "Caption 1 of é 3."
    assert next(sources.records("coco", root, "val")).id == "coco/val2017/300"
    record = next(sources.records("coco", root, "val2017"))
    assert record.origin.endswith(", val2017/000000000027.jpg")
    sets.write_coco(root, "val2014")
    with pytest.raises(ValueError, match="holds val2017 and val2014; choose one as the split"):
        sources.get("coco").units(root, "val")


def test_damaged_coco_entries_have_a_reason(tmp_path):
    root = sets.write_coco(tmp_path, count=8)

    def damage(plain):
        captions, images = plain["annotations"], plain["images"]
        captions[0]["image_id"] = 999
        captions[1]["image_id"] = "63"
        captions[2]["caption"] = None
        captions[3]["caption"] = "\ud800 half"
        captions[11]["id"] = captions[10]["id"]
        del captions[5]["id"]
        captions.append("no object")
        captions.append({"id": 7, "image_id": True, "caption": "x"})
        del images[0]["file_name"]
        images[1]["id"] = images[2]["id"]
        images.append([])

    change(root / "annotations/captions_train2014.json", damage)
    good, bad = read("coco", root, "train2014")
    assert list(good) == ["400", "401", "801", "701", "601"]  # image by image
    assert {key: reason for key, reason in bad.items() if "@" not in key} == {
        "800": "no entry in images for image_id 999",
        "700": "field image_id is text, not a whole number",
        "600": "field caption is absent",
        "500": "field caption holds half a surrogate pair, not valid Unicode",
        "601": "duplicate id",
        "200": "no entry in images for image_id 18",
        "100": "images entry of image_id 9: field file_name is absent",
        "301": "images entry of image_id 27: two entries with this id that differ",
        "201": "no entry in images for image_id 18",
        "101": "images entry of image_id 9: field file_name is absent",
        "7": "field image_id is a boolean, not a whole number",
    }
    assert sorted(reason for key, reason in bad.items() if "@" in key) == [
        "entry is text, not an object",
        "field id is absent",
        "images entry: duplicate id 27",
        "images entry: entry is a list, not an object",
    ]


def test_karpathy_splits_are_read_and_their_damaged_entries_reported(tmp_path):
    root = sets.write_karpathy(tmp_path, "coco", ["train", "val", "restval", "test", "train"])
    assert list(read("coco", root, "karpathy-train")[0]) == ["0", "1", "4", "5", "8", "9"]
    assert read("coco", root, "train")[0]["5"] == "Sentence 1 of 2."
    assert list(read("coco", root, "karpathy-val")[0]) == ["2", "3"]
    change(root / "dataset_coco.json", lambda p: p["images"][0].update(split="tr"))
    change(root / "dataset_coco.json", lambda p: p["images"][2]["sentences"][0].pop("sentid"))
    change(root / "dataset_coco.json", lambda p: p["images"][4]["sentences"][1].pop("raw"))
    good, bad = read("coco", root, "karpathy-train")
    assert list(good) == ["5", "8"]
    assert sorted(bad.values()) == [
        "field raw is absent",
        "field sentences[0].sentid is absent",
        "field split is 'tr', not train, restval, val or test",
    ]
    assert read("coco", root, "karpathy-test")[1] == {}
    root = sets.write_karpathy(tmp_path / "f", "flickr30k", ["test", "train"], "flickr30k-images")
    assert list(read("flickr30k", root, "test")[0]) == ["0", "1"]
    assert list(read("flickr30k", root, "train")[0]) == ["2", "3"]
    sets.pack(root, "flickr30k-images.tar.gz:flickr30k-images")
    assert list(read("flickr30k", root, "train")[0]) == ["2", "3"]


def test_flickr30k_lines_are_read_and_damaged_ones_reported(tmp_path):
    root = sets.write_flickr30k(tmp_path, 1)
    assert read("flickr30k", root, "all")[0]["1000.jpg#4"] == "A caption 4 , of 0 ."
    with pytest.raises(ValueError, match="without it, the split is all"):
        sources.get("flickr30k").units(root, "train")
    path = root / "results_20130124.token"
    path.write_bytes(
        path.read_bytes().replace(b"#0\t", b"#0 ").replace(b"#1\tA", b"#1\t\xe9")
        + b"1000.jpg#2\tagain\n1000.jpg#9\t \n"
    )
    good, bad = read("flickr30k", root, "all")
    assert list(good) == ["1000.jpg#2", "1000.jpg#3", "1000.jpg#4"]
    assert "line begins '1000.jpg#0 A caption 0" in bad["@0"]
    assert sorted(bad.values())[0] == "duplicate id"
    assert bad["1000.jpg#9"] == "field raw is empty"
    assert any(reason == "invalid UTF-8 at byte 11 of the line" for reason in bad.values())


def test_a_truncated_image_archive_reports_its_missing_images(tmp_path):
    root = sets.write_flickr30k(tmp_path, 40)
    complete, _ = read("flickr30k", root, "all")
    sets.pack(root, "flickr30k-images.tar.gz:flickr30k-images")
    path = root / "flickr30k-images.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    good, bad = read("flickr30k", root, "all")
    assert 0 < len(good) < len(complete)
    assert {*good, *bad} == set(complete)
    assert all("unreadable archive: " in reason for reason in bad.values())


def test_damaged_gqa_entries_have_a_reason(tmp_path):
    root = sets.write_gqa(tmp_path, count=6)
    assert read("gqa", root, "train")[0]["00000004"] == ("What is in 4?", "thing 4")
    path = root / "train_balanced_questions.json"

    def damage(plain):
        del plain["00000000"]["answer"]
        plain["00000001"]["imageId"] = 2.5
        plain["00000002"] = []
        plain["00000003"]["question"] = ["?"]

    change(path, damage)
    path.write_text(path.read_text().replace('"00000005":', '"00000004":'))
    good, bad = read("gqa", root, "train")
    assert list(good) == ["00000004"]
    assert list(bad.values()) == [
        "field answer is absent",
        "field imageId is a number, not a whole number",
        "entry is a list, not an object",
        "field question is a list, not text",
        "duplicate id",
    ]


def test_ocrvqa_splits_are_read_and_their_damaged_entries_reported(tmp_path):
    root = sets.write_ocrvqa(tmp_path, 5)
    assert list(read("ocrvqa", root, "train")[0]) == ["00X/0", "00X/1", "03X/0", "03X/1"]
    assert read("ocrvqa", root, "val")[0]["01X/1"] == ("Is this book number 1?", "Yes")
    (root / "images/01X.png").rename(root / "images/01X.jpg")
    assert len(read("ocrvqa", root, "val")[0]) == 4

    def damage(plain):
        plain["00X"]["answers"].pop()
        plain["01X"]["split"] = 4
        plain["02X"]["questions"] = "one"
        plain["03X"]["questions"][1] = None

    change(root / "dataset.json", damage)
    good, bad = read("ocrvqa", root, "train")
    assert list(good) == ["03X/0"]
    assert sorted(bad.values()) == [
        "2 questions, but 1 answers",
        "field question is absent",
        "field split is 4, not 1, 2 or 3",
    ]
    assert list(read("ocrvqa", root, "test")[1].values()) == ["field questions is text, not a list"]


def test_textvqa_and_vizwiz_use_the_most_frequent_answer(tmp_path):
    root = sets.write_textvqa(tmp_path)
    assert read("textvqa", root, "train")[0]["34603"] == ("what does sign 1 say?", "go 1")
    change(root / "TextVQA_0.5.1_train.json", lambda p: p["data"][0].update(answers=["", " "]))
    change(root / "TextVQA_0.5.1_train.json", lambda p: p["data"][1].update(answers=["a", 1]))
    assert read("textvqa", root, "train")[1] == {
        "34602": "field answers holds no answer",
        "34603": "field answers[1] is a number, not text",
    }
    root = sets.write_vizwiz(tmp_path)
    name = "VizWiz_train_00000002.jpg"
    assert read("vizwiz", root, "train")[0][name] == ("What's this 2?", "leaf 2")
    change(root / "Annotations/train.json", lambda p: p[0]["answers"].append("basil"))
    change(root / "Annotations/train.json", lambda p: p[1].update(image=p[2]["image"]))
    _, bad = read("vizwiz", root, "train")
    assert bad["VizWiz_train_00000000.jpg"] == "field answers[4] is text, not an object"
    assert list(bad.values())[1] == "duplicate id"


def test_visual_genome_questions_and_regions_are_read_and_damaged_ones_reported(tmp_path):
    root = sets.write_visual_genome(tmp_path)
    good, _ = read("visual_genome", root, "qa")
    assert good["986721"] == ("What colour is 2?", "Green 1.")
    assert read("visual_genome", root, "regions")[0]["1382"] == "the clock 2 is green"

    def damage(plain):
        del plain[0]["qas"][0]["qa_id"]
        plain[1]["qas"][0] = None
        plain[2]["qas"] = {}

    change(root / "question_answers.json", damage)
    good, bad = read("visual_genome", root, "qa")
    assert list(good) == ["986711", "986721"]
    assert list(bad.values()) == [
        "field qas[0].qa_id is absent",
        "field qas[0] is absent",
        "field qas is an object, not a list",
    ]


def test_vqav2_and_okvqa_join_questions_and_answers(tmp_path):
    root = sets.write_mscoco_vqa(tmp_path / "v", "v2_")
    key = "458752001"
    assert read("vqav2", root, "train")[0][key] == ("What is this number 1?", "ball 1")
    annotations = root / "v2_mscoco_train2014_annotations.json"
    change(annotations, lambda p: p["annotations"].reverse())
    assert len(read("vqav2", root, "train")[0]) == 4
    change(annotations, lambda p: [a.pop("multiple_choice_answer") for a in p["annotations"]])
    assert not read("vqav2", root, "train")[0]  # the ten answers do not replace it
    root = sets.write_mscoco_vqa(tmp_path / "ok", "")
    assert read("okvqa", root, "train")[0][key] == ("What is this number 1?", "raw ball 1")


def test_damaged_vqav2_questions_and_answers_have_a_reason(tmp_path):
    root = sets.write_mscoco_vqa(tmp_path, "v2_", questions=9)

    def damage_questions(plain):
        entries = plain["questions"]
        entries[0]["question_id"] = "9" * 30
        entries[1]["question_id"] = entries[2]["question_id"]
        entries[2]["question"] = {}
        entries[3]["question"] = " "

    def damage_answers(plain):
        entries = plain["annotations"]
        entries[4]["answers"] = []
        entries[5]["multiple_choice_answer"] = 3
        entries[6]["image_id"] = 1
        del entries[7]["question_id"]
        entries[8]["answers"][1] = {"answer": None}

    change(root / "v2_OpenEnded_mscoco_train2014_questions.json", damage_questions)
    change(root / "v2_mscoco_train2014_annotations.json", damage_answers)
    records = list(sources.records("vqav2", root, "train"))
    assert not any(isinstance(r, RawRecord) for r in records)
    bad = [(r.id.rsplit("/", 1)[1], r.reason) for r in records if isinstance(r, BadRecord)]
    n = 458752000
    assert [b for b in bad if "@" not in b[0]] == [
        (f"{n}", "annotations entry that nothing refers to"),
        (f"{n + 1}", "annotations entry that nothing refers to"),
        ("9" * 30, "field question_id is text, not a whole number"),
        (f"{n + 2}", "question is about image_id 458752, its annotation about 458753"),
        (f"{n + 2}", "field question is an object, not text"),
        (f"{n + 3}", "field question is empty"),
        (
            f"{n + 4}",
            f"annotations entry of question_id {n + 4}: field answers holds no answer",
        ),
        (
            f"{n + 5}",
            f"annotations entry of question_id {n + 5}: "
            "field multiple_choice_answer is a number, not text",
        ),
        (f"{n + 6}", "question is about image_id 458755, its annotation about 1"),
        (f"{n + 7}", f"no entry in annotations for question_id {n + 7}"),
        (
            f"{n + 8}",
            f"annotations entry of question_id {n + 8}: field answers[1].answer is absent",
        ),
    ]
    ((place, reason),) = [b for b in bad if "@" in b[0]]
    assert place.startswith("annotations@")
    assert reason == "annotations entry: field question_id is absent"


def test_truncated_answers_are_reported_once_and_with_each_question(tmp_path):
    root = sets.write_mscoco_vqa(tmp_path, "")
    path = root / "mscoco_train2014_annotations.json"
    text = path.read_text()
    path.write_text(text[: text.index('"image_id": 458753')])
    units = sources.get("okvqa").units(root, "train", unit_bytes=200)
    assert len(units) > 1
    records = [r for u in units for r in sources.get("okvqa").read(u)]
    assert sum(isinstance(r, RawRecord) for r in records) == 2
    reasons = [r.reason for r in records if isinstance(r, BadRecord)]
    assert sum(r.startswith("unreadable annotations: the entry at byte") for r in reasons) == 1
    assert sum("question_id 45875200" in r and "(unreadable: " in r for r in reasons) == 2


def test_llava_dialogues_are_read_and_damaged_ones_reported(tmp_path):
    root = sets.write_llava(tmp_path)
    records = list(sources.records("llava", root, "train"))
    # The first and the last entry are about one image, and come together.
    assert [r.turns[0] for r in records[:3]] == ["What?", "What?", "What is in 1?"]
    assert records[0].turns[1:] == ("Thing 0.", "And?", "No more.")
    assert records[0].image == records[1].image
    assert records[0].id != records[1].id
    assert [r.turns for r in sources.records("llava", root, "train-text")] == [("Hi", "Hello")]

    def damage(plain):
        plain[0]["conversations"].reverse()
        plain[1]["conversations"].pop()
        plain[3]["conversations"] = []
        plain[4]["conversations"][0]["value"] = "<image>\n"
        plain[5]["image"] = None
        plain[6] = "x"

    change(root / "llava_v1_5_mix665k.json", damage)
    good, bad = read("llava", root, "train")
    assert list(good.values()) == [
        ("And?", "Thing 0."),  # without the reply before it and the unanswered question after it
        ("What?", "Thing 6.", "And?", "No more."),
        ("What is in 1?", "Thing 1."),  # its last question has no reply
    ]
    assert list(bad.values()) == [
        "empty dialogue",
        "field conversations[0].value is empty",
        "field image is absent",
        "entry is text, not an object",
    ]
