"""The report of a small but complete run."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.demo import poster, report
from examples.scenes import report as scenes_report
from mdm.evaluate.classifier import Classifier
from mdm.evaluate.suite import DemoData, Label, Settings, run_demo, snapshot
from mdm.report.image_grid import save_sheet, save_sheets
from mdm.report.page import save_tiles
from tests.unit.conftest import Digits, Oracle

ORDER = ("encode-digits", "train", "evaluate")


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dump_scenes(folder: Path, digits: Digits) -> None:
    """The evaluation of scenes: images of digits, every other text right."""
    names = (*scenes_report.TASKS, "captions", "answers", "dialogues", "real")
    labels = [Label(f"text {i}", "truth", i % 2 == 0) for i in range(12)]
    images = dict.fromkeys(names, digits.spare.pixels[:12])
    save_tiles(images, dict.fromkeys(names, labels), folder, 12)
    shares = dict.fromkeys((f"geneval_{task}" for task in scenes_report.TASKS), 0.5)
    shares |= {"caption_accuracy": 0.75}
    bounds = {f"{name}_{end}": 0.9 for name in shares for end in ("floor", "ceiling")}
    answers = {"vqa_accuracy": 0.6, "vqa_majority": 0.3}
    dialogues = {"dialogue_accuracy": 0.6, "dialogue_majority": 0.4}
    dump(folder / "metrics.json", shares | bounds | answers | dialogues | {"seconds": 1.0})


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    digits: Digits,
    judge: Classifier,
    demo_data: DemoData,
) -> Path:
    run = tmp_path_factory.mktemp("demo")
    settings = Settings(n=100)
    out = run / "evaluation"
    oracle = Oracle(digits)
    result = run_demo(oracle, judge, demo_data, settings)
    sheets = save_sheets(result.images, out, columns=10)
    shots = []
    for step in (100, 200, 300):
        images, rough = snapshot(
            Oracle(digits, ignores_requests=step < 300), judge, ["digit one"], settings
        )
        sheet = save_sheet(images, out / f"step-{step}.png", columns=10)
        shots.append({"samples_seen": 64 * step, "accuracy": rough, "sheet": vars(sheet)})
    dump(
        out / "evaluation.json",
        result.plain()
        | {"sheets": {name: vars(sheet) for name, sheet in sheets.items()}}
        | {"snapshots": shots, "settings": vars(settings), "samples_seen": 19_200}
        | {"counts": {"digits": {"examples": 3990, "quarantined: truncated image": 7}}},
    )
    dump_scenes(run / "scenes", digits)
    lines = []
    for step in range(10, 301, 10):
        falling = 3.0 * math.exp(-step / 90) + 0.3 + 0.1 * math.sin(7 * step)
        line = {"step": step, "samples_seen": 64 * step, "loss": falling}
        if step % 40:
            line |= {"image_text/se_img": falling / 2, "image_text/se_txt": falling / 3}
        if step % 20:
            line |= {"text/se_txt": falling / 4, "text/kl": 5.0 / step}
        lines.append(line)
    (run / "train").mkdir()
    (run / "train" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    dump(run / "train" / "export" / "config.json", {"model": {"d_model": 128}, "seed": 0})
    for i, name in enumerate(ORDER):
        command = ["/home/someone/.venv/bin/python", f"pipelines/{name}.py", "--seed", "0"]
        dump(
            run / "stages" / f"{name}.json",
            {
                "title": name.replace("-", " ").capitalize(),
                "command": command,
                "seconds": 12.5 * (i + 1),
                "peak_rss_gib": 1.5 + i,
                "attempts": 1 + i // 2,
                "report": {
                    "samples_per_second": 400.0 + i,
                },
            },
        )
    dump(run / "autoencoder" / "autoencoder.json", {"psnr": {"digits": 31.2}, "loss": [1, 2]})
    Image.new("RGB", (64, 64), (40, 90, 160)).save(run / "autoencoder" / "reconstructions.png")
    dump(run / "tokenizer" / "tokenizer.json", {"vocab_size": 2000, "sha256": "0" * 64})
    facts = {"attribution": "Someone & others", "license": "BSD-3-Clause", "package": "p 1.0"}
    facts |= {"layout": "imagenet", "split": "a fifth"}
    dump(run / "data" / "SOURCES.json", {"sets": {"digits": facts | {"records": {"train": 4000}}}})
    return run


@pytest.fixture(scope="session")
def page(run: Path) -> str:
    report.write(run, ORDER)
    return (run / "report.html").read_text()


def test_json_has_metrics_and_totals_at_the_top(run: Path, page: str) -> None:
    plain = json.loads((run / "report.json").read_text())
    assert plain["class2image_accuracy"] > 0.8
    assert plain["wall_seconds"] == pytest.approx(12.5 * 6)
    assert plain["peak_rss_gib"] == 3.5
    assert plain["samples_per_second"] == 401.0
    assert plain["targets"]["class2image_accuracy"] is True
    assert plain["geneval_two"] == 0.5
    wanted = {"two": True, "colours": False, "position": True, "attribution": True}
    assert {task: plain["targets"][f"geneval_{task}"] for task in wanted} == wanted
    assert plain["targets"]["vqa_accuracy"] is True
    assert list(plain["stages"]) == list(ORDER)


@pytest.mark.parametrize(
    "heading",
    [
        "Targets",
        "Learning",
        "Loss",
        "Real and generated",
        "Captions",
        "From text to image",
        "Image and caption at once",
        "Replies",
        "Job stages",
        "First stage",
        "Data",
        "Reproduce",
    ],
)
def test_page_has_every_section(page: str, heading: str) -> None:
    assert f"<h2>{heading}</h2>" in page


def test_page_is_self_contained_and_names_no_folder_of_this_machine(page: str, run: Path) -> None:
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)[^"'\s)>]""", page)
    assert "://" not in page.replace("http://www.w3.org/", "")  # names of XML, not addresses
    assert "<script" not in page
    assert str(run) not in page
    assert "/home/" not in page
    assert page.count("data:image/png;base64,") > 300


def test_page_shows_counts_sources_and_escapes_what_a_model_wrote(page: str) -> None:
    assert "quarantined: truncated image" in page
    assert "Someone &amp; others" in page
    assert "&lt;b&gt;hello&lt;/b&gt;" in page
    assert "<b>hello</b>" not in page
    assert page.count("<svg") == 7  # five losses, the targets, the job stages


def test_the_poster_has_a_row_for_each_way_to_generate(run: Path, page: str) -> None:
    with Image.open(run / "poster.png") as image:
        red, green, _ = np.moveaxis(np.asarray(image.convert("RGB"), np.int64), -1, 0)
        rows = 2 + 2 + 1 + 1 + 1
        height = 5 * poster.TITLE + rows * (poster.TILE + poster.GAP) + 5 * poster.TEXT
        assert image.size == (10 * (poster.TILE + poster.GAP) + poster.GAP, height + poster.GAP)
    sections = (*poster.DIGITS, *poster.SCENES, *poster.JOINT)
    assert all(section.title.isascii() for section in sections), "the font has no other letters"
    assert (red - green > 50).any()  # what the judges find wrong; the images are grey


def test_a_missing_job_stage_is_named(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"decode\.json is missing"):
        report.write(run, ("decode",))
