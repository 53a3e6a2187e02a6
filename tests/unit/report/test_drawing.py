"""The generation job, with a generator that records its calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mdm.first_stage.autoencoder import Autoencoder
from mdm.generate.selection import Selected
from mdm.report import drawing
from mdm.report.drawing import Flags, generate


class Recorder:
    """Generates grey images and numbered texts; keeps the arguments of the last call."""

    grid = (2, 2)
    selected = Selected(torch.tensor([[0, 1, -1, 2]]), torch.tensor([[0, -1, 1]]), 3)

    def __init__(self) -> None:
        self.autoencoder = object.__new__(Autoencoder)
        self.inputs: Any = None
        self.options: dict[str, Any] = {}

    def _images(self, inputs: Any, n: int, options: dict[str, Any]) -> torch.Tensor:
        self.inputs, self.options = inputs, options
        return torch.linspace(0, 1, n).reshape(n, 1, 1, 1).expand(n, 3, 4, 4)

    def class_to_image(self, classes, **options):
        return self._images(classes, len(classes), options)

    def text_to_image(self, texts, **options):
        return self._images(texts, len(texts), options)

    def joint(self, n, **options):
        return self._images(None, n, options), [f"text {i}" for i in range(n)]

    def image_to_text(self, latents, **options):
        self.inputs, self.options = latents, options
        return [f"text {i}" for i in range(len(latents))]

    def reply(self, dialogues, **options):
        self.inputs, self.options = dialogues, options
        return [f"reply {i}" for i in range(len(dialogues))]


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    latents = torch.zeros(2, 4, 8)
    monkeypatch.setattr(drawing, "encode", lambda _, files: latents[: len(files)])
    return Recorder()


def test_images_are_saved_alone_and_in_a_grid(recorder: Recorder, tmp_path: Path):
    flags = Flags(
        task="class-to-image", input=("3, 5", "7"), guidance=2.0, steps=9, out=str(tmp_path)
    )
    lines = generate(recorder, flags)
    assert recorder.inputs == [3, 5, 7]
    assert (recorder.options["guidance"], recorder.options["steps"]) == (2.0, 9)
    names = ["class 3", "class 5", "class 7"]
    assert lines == [
        *(f"{tmp_path}/{i:04d}.png: {name}" for i, name in enumerate(names)),
        f"{tmp_path}/grid.png",
    ]
    with Image.open(tmp_path / "0002.png") as image:
        assert (image.size, image.getpixel((0, 0))) == ((4, 4), (255, 255, 255))


def test_each_input_is_repeated(recorder: Recorder, tmp_path: Path):
    flags = Flags(task="text-to-image", input=("a cat | a dog",), n=2, out=str(tmp_path))
    assert generate(recorder, flags)[1].endswith("0001.png: a cat")
    assert recorder.inputs == ["a cat", "a cat", "a dog", "a dog"]


def test_joint_generation_has_two_guidances_and_two_step_counts(recorder: Recorder, tmp_path: Path):
    flags = Flags(n=2, guidance=3.0, steps=5, text_steps=8, out=str(tmp_path))
    assert generate(recorder, flags)[0].endswith("0000.png: text 0")
    options = recorder.options
    assert (options["guidance"], options["text_guidance"]) == (3.0, None)
    assert (options["steps"], options["text_steps"]) == (5, 8)


def test_joint_samples_begin_with_what_is_given(recorder: Recorder, tmp_path: Path):
    flags = Flags(
        n=2,
        input=("Draw => What? => It", "Name"),
        classes=(4, 5),
        images=("a.png", "b.png"),
        image_noise=0.4,
        out=str(tmp_path),
    )
    assert len(generate(recorder, flags)) == 5
    options = recorder.options
    assert options["dialogues"] == [["Draw", "What?", "It"]] * 2 + [["Name"]] * 2
    assert options["class_ids"] == [4, 4, 5, 5]
    assert options["images"].shape == (4, 4, 8)
    assert options["image_noise"] == 0.4
    generate(recorder, Flags(n=3, out=str(tmp_path)))
    options = recorder.options
    assert options["text_steps"] is options["images"] is options["class_ids"] is None


def test_captions_take_the_settings_of_texts(recorder: Recorder):
    flags = Flags(
        task="image-to-text", input=("a,1.png", "b.png"), text_guidance=1.5, text_steps=5,
        text_blocks=3, max_new_tokens=7, candidates=4,
    )  # fmt: skip
    assert generate(recorder, flags) == ["a,1.png: text 0", "b.png: text 1"]
    assert (recorder.options["guidance"], recorder.options["steps"]) == (1.5, 5)
    assert (recorder.options["max_new_tokens"], recorder.options["candidates"]) == (7, 4)
    assert recorder.options["text_blocks"] == 3
    generate(recorder, Flags(task="image-to-text", input=("b.png",), steps=5))
    assert recorder.options["steps"] is recorder.options["text_blocks"] is None


def test_candidates_and_blocks_are_of_texts_alone():
    with pytest.raises(ValueError, match=r"--candidates 2 belongs to .* not to text-to-image"):
        Flags(task="text-to-image", input=("a two",), candidates=2)
    with pytest.raises(ValueError, match=r"--text_blocks 0 belongs to .* not to joint"):
        Flags(text_blocks=0)


def test_dialogues_are_split_into_turns_and_share_their_images(recorder: Recorder):
    flags = Flags(task="reply", input=("Hi => Hello => How?", "Bye"), images=("a.png",))
    assert generate(recorder, flags) == ["Hi => Hello => How?: reply 0", "Bye: reply 1"]
    assert recorder.inputs == [["Hi", "Hello", "How?"], ["Bye"]]
    assert recorder.options["images"].shape == (2, 1, 4, 8)
    assert (recorder.options["guidance"], recorder.options["max_new_tokens"]) == (0.0, 0)
    generate(recorder, Flags(task="reply", input=("Bye",)))
    assert recorder.options["images"] is None


def test_the_selection_map_is_saved(recorder: Recorder, tmp_path: Path):
    path = tmp_path / "maps" / "map.png"
    flags = Flags(n=1, selection=0.1, selection_map=str(path), out=str(tmp_path))
    assert generate(recorder, flags)[-1] == str(path)
    with Image.open(path) as image:
        assert image.size[0] > image.size[1] > 0


def test_a_missing_image_file_is_named(tmp_path: Path):
    recorder = Recorder()
    with pytest.raises(
        ValueError, match=r"there is no file x\.png,y\.png; repeat the flag for each"
    ):
        drawing.encode(recorder, ["x.png,y.png"])
    with pytest.raises(ValueError, match=r"there is no file x\.png$"):
        drawing.encode(recorder, ["x.png"])
