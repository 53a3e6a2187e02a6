import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from examples.demo import data as demo_data
from examples.dialogues import write_dialogues
from examples.emoji import data as emoji_data
from examples.published import MARKER
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.tokenizer import Tokenizer
from mdm.sources import journeydb
from pipelines import train_autoencoder, train_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert demo_data.main(["--out", str(out), "--limit", "60"]) == 0
    return out


def test_demo_data_are_the_same_bytes_again_and_left_alone_when_done(demo, tmp_path):
    report = demo_data.write(tmp_path / "again", 60)
    assert report == json.loads((demo / MARKER).read_text())
    stamp = (tmp_path / "again" / MARKER).stat().st_mtime_ns
    assert demo_data.write(tmp_path / "again", 60) == report
    assert (tmp_path / "again" / MARKER).stat().st_mtime_ns == stamp
    other = demo_data.write(tmp_path / "again", 50)
    for name in ("digits", "journeydb", "coco", "dialogues"):
        assert other["sets"][name]["sha256"] != report["sets"][name]["sha256"]


def test_interrupted_demo_data_are_finished(demo, tmp_path):
    (tmp_path / "digits" / "train" / "junk").mkdir(parents=True)
    assert demo_data.write(tmp_path, 60)["sets"] == json.loads((demo / MARKER).read_text())["sets"]
    assert not (tmp_path / "digits" / "train" / "junk").exists()


def test_emoji_hold_out_keeps_one_activity_together():
    by_name = {e.name: e.held_out for e in emoji_data.list_emoji()}
    assert len(by_name) > 1500
    assert 40 < sum(by_name.values()) < 160
    assert not [n for n in by_name if "skin tone" in n]
    triples = [n for n in by_name if f"man {n.removeprefix('woman ')}" in by_name]
    assert any(n.startswith("woman ") for n in triples)
    for name in (n for n in triples if n.startswith("woman ")):
        assert by_name[name] == by_name["man " + name.removeprefix("woman ")]


def test_questions_do_not_straddle_the_split(tmp_path):
    write_dialogues(tmp_path / "d", 0)
    asked = {}
    for split in ("train", "test"):
        rows = (tmp_path / "d" / f"{split}_0.jsonl").read_text().splitlines()
        asked[split] = {json.loads(row)["data"][0].lower() for row in rows}
    assert asked["test"]
    assert not asked["train"] & asked["test"]


def test_digits_are_bright_on_black(demo):
    path = next((demo / "digits" / "train" / "n00000003").iterdir())
    digit = Image.open(io.BytesIO(path.read_bytes()))
    assert (digit.size, digit.mode) == ((32, 32), "RGB")
    assert digit.getpixel((0, 0)) < (15, 15, 15)
    assert max(high for _, high in digit.getextrema()) > 200


def test_emoji_are_on_white_and_named(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--limit", "25", "--size", "48"]
    assert emoji_data.main(flags) == 0
    assert "emoji: {'train':" in capsys.readouterr().out
    root = tmp_path / "emoji"
    with tarfile.open(root / "data" / "train" / "imgs" / "000.tgz") as tar:
        info = tar.getmembers()[0]
        image = Image.open(io.BytesIO(tar.extractfile(info).read()))
    assert info.mtime == 0
    assert (image.size, image.mode) == ((48, 48), "RGB")
    assert image.getpixel((0, 0)) > (240, 240, 240)
    units = [unit for split in ("train", "valid") for unit in journeydb.units(root, split)]
    records = [record for unit in units for record in journeydb.read(unit)]
    names = {emoji.name for emoji in emoji_data.list_emoji()}
    assert len(records) == 25
    assert {record.text for record in records} <= names


def test_tokenizer_job(demo, tmp_path):
    data = f"imagenet={demo}/digits,journeydb={demo}/journeydb,ultrachat={demo}/dialogues"
    flags = ["--datasets", data, "--vocab_size", "200"]
    for name in "ab":
        assert train_tokenizer.main([*flags, "--out", str(tmp_path / name)]) == 0
    first, second = (Tokenizer(tmp_path / name / "tokenizer.model") for name in "ab")
    assert first.sha256 == second.sha256
    report = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    assert report["vocab_size"] == first.vocab_size == 200
    kept = report["train_lines"] + report["held_out_lines"]
    assert report["lines"] == kept + sum(report["dropped"].values())
    assert report["held_out"]["tokens_per_word"] >= 1
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "tokenizer.model",
        "tokenizer.json",
    }


def test_autoencoder_job(demo, tmp_path):
    out = tmp_path / "ae"
    data = f"imagenet={demo}/digits,journeydb={demo}/journeydb"
    flags = ["--datasets", data, "--out", str(out), "--steps", "3", "--batch", "4"]
    assert train_autoencoder.main(flags) == 0
    assert train_autoencoder.main(flags) == 0  # replaces what is there
    report = json.loads((out / "autoencoder.json").read_text())
    autoencoder = Autoencoder.load(out)
    assert report["sha256"] == autoencoder.sha256
    assert set(report["psnr"]) == {"digits", "journeydb"}
    assert report["train_images"]["digits"] == 50
    assert autoencoder.encode(torch.rand(2, 3, 32, 32)).shape == (2, 16, 16)
    with Image.open(out / "reconstructions.png") as image:
        assert image.size == (1024, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["ae"]


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        (train_tokenizer, ["--datasets", "laion=."], "unknown dataset 'laion'"),
        (train_tokenizer, ["--datasets", "imagenet=/gone"], "no folder /gone"),
        (train_tokenizer, ["--datasets", "imagenet={demo}/journeydb"], "no class names"),
        (
            train_tokenizer,
            ["--datasets", "ultrachat={demo}/dialogues", "--vocab_size", "9999"],
            "at most",
        ),
        (
            train_autoencoder,
            ["--datasets", "ultrachat={demo}/dialogues"],
            "no usable image in split train",
        ),
        (
            train_autoencoder,
            ["--datasets", "imagenet={demo}/digits", "--image_size", "30"],
            "image_size 30 is not a multiple of 8",
        ),
        (train_autoencoder, ["--steps", "0"], "steps is 0"),
        (demo_data, ["--limit", "-1"], "limit is -1"),
        (demo_data, ["--out", "/proc/nowhere"], "demo_data: /proc/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(job, flags, message, demo, tmp_path, capsys):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        job.main([flag.format(demo=demo) for flag in flags] + out)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert message in last
