"""Generation from an export of untrained weights: shapes, determinism, clear mistakes."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from mdm.config import Config, DataConfig, ModelConfig
from mdm.first_stage import autoencoder
from mdm.first_stage.tokenizer import train_model
from mdm.generate import Generator
from mdm.generate import generator as module
from mdm.generate.prompts import dialogue_prompt
from mdm.generate.request import Request
from mdm.loss import Loss
from mdm.utils.saved_config import to_dict

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    lines = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in ("cat", "dog", "house")]
    (folder / "tokenizer.model").write_bytes(train_model(lines, 29))
    torch.manual_seed(0)
    model = autoencoder.build(image_size=16, channels=(8, 8))
    autoencoder.save(model, folder / "autoencoder", [0.0] * 4, [1.0] * 4)
    config = Config(
        model=ModelConfig(
            d_model=32,
            n_layer=4,
            d_state=8,
            headdim=16,
            chunk_size=16,
            vocab_size=29,
            n_classes=3,
            image_height=4,
            image_width=4,
            text_length=12,
        ),
        data=DataConfig(caption_length=8, dialogue_length=12),
        tokenizer=str(folder / "tokenizer.model"),
        autoencoder=str(folder / "autoencoder"),
    )
    objective = Loss(config)
    torch.nn.init.normal_(objective.network.image_out.weight, std=0.02)
    torch.nn.init.normal_(objective.network.text_out.weight, std=0.1)
    save_file(objective.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


@pytest.fixture(scope="module")
def generator(export):
    return Generator.from_pretrained(export)


def test_weights_trained_with_cuda_kernels_generate_the_same_without(export, generator):
    config = json.loads((export / "config.json").read_text())
    config["model"]["kernel"] = "fused"
    other = export.parent / "fused"
    shutil.copytree(export, other)
    (other / "config.json").write_text(json.dumps(config))
    fused = Generator.from_pretrained(other)
    assert fused.config.model.kernel == "fused"
    images = generator.class_to_image([0, 1], steps=2)
    assert torch.equal(fused.class_to_image([0, 1], steps=2), images)


def test_weights_trained_on_packed_samples_read_captions_without_padding(export):
    images = {}
    for per_row in (1, 2):
        for length in (8, 12):
            config = json.loads((export / "config.json").read_text())
            config["data"] |= {"images_per_row": per_row, "caption_length": length}
            other = export.parent / f"packed-{per_row}-{length}"
            shutil.copytree(export, other)
            (other / "config.json").write_text(json.dumps(config))
            model = Generator.from_pretrained(other, precision="fp32")
            images[per_row, length] = model.text_to_image(["one two"], steps=2)
    torch.testing.assert_close(images[2, 8], images[2, 12], rtol=0, atol=1e-4)
    assert not torch.allclose(images[1, 8], images[1, 12], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, inside its own compiler
def test_compiled_blocks_generate_the_same(export, generator):
    eager = generator.class_to_image([0, 1, 2], steps=3)
    config = json.loads((export / "config.json").read_text())
    config["model"]["kernel"] = "compiled"
    other = export.parent / "compiled"
    shutil.copytree(export, other)
    (other / "config.json").write_text(json.dumps(config))
    compiled = Generator.from_pretrained(other, compiled=True)
    assert compiled.compiled
    assert not Generator.from_pretrained(other).compiled
    torch.testing.assert_close(
        compiled.class_to_image([0, 1, 2], steps=3), eager, rtol=0, atol=0.05
    )
    assert compiled.selected.text.shape[0] == 3


def test_a_generator_is_saved_and_loaded_by_the_hubs_methods(generator, tmp_path):
    """Other files in the folder are kept, and the tokenizer is saved too."""
    (tmp_path / "notes.txt").write_text("ours")
    generator.save_pretrained(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.model", "README.md", "notes.txt"}
    assert names == expected
    config = json.loads((tmp_path / "config.json").read_text())
    config["tokenizer"] = "gone.model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = Generator.from_pretrained(tmp_path)
    assert again.config.model == generator.config.model
    ours, theirs = again.model.state_dict(), generator.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mdm"
    assert "Generator.from_pretrained" in card.text
    pixels = generator.class_to_image([1], steps=2)
    assert torch.equal(again.class_to_image([1], steps=2), pixels)


def test_images_have_the_autoencoders_size(generator):
    pixels = generator.class_to_image([0, 1, 2, -1], steps=3)
    assert pixels.shape == (4, 3, 16, 16)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_seed_decides_and_conditions_matter(generator):
    one = generator.text_to_image(["one", "two"], steps=3, seed=1)
    assert torch.equal(one, generator.text_to_image(["one", "two"], steps=3, seed=1))
    assert not torch.equal(one, generator.text_to_image(["one", "two"], steps=3, seed=2))
    assert not torch.equal(one, generator.text_to_image(["two", "one"], steps=3, seed=1))


def test_guidance_changes_images(generator):
    plain = generator.class_to_image([0], steps=3, guidance=0.0)
    assert not torch.equal(plain, generator.class_to_image([0], steps=3, guidance=2.0))


def test_every_other_task_answers(generator):
    latents = torch.randn(2, 16, 16)
    assert len(generator.image_to_text(latents, steps=3)) == 2
    assert len(generator.reply([("one cat",), ("one", "two", "three")], steps=3)) == 2
    pixels, texts = generator.joint(3, steps=3)
    assert pixels.shape[0] == len(texts) == 3


def test_every_method_takes_solver_interval_and_selection(generator):
    options = {"solver": "eq9", "interval": (-5.0, 5.0), "selection": 0.2}
    assert generator.class_to_image([0], steps=3, **options).shape == (1, 3, 16, 16)
    assert generator.text_to_image(["one"], steps=3, **options).shape == (1, 3, 16, 16)
    assert len(generator.image_to_text(torch.randn(2, 16, 16), steps=3, **options)) == 2
    assert len(generator.reply([("one cat",)], steps=3, **options)) == 1
    assert len(generator.joint(2, steps=3, text_steps=4, text_guidance=0.5, **options)[1]) == 2
    assert generator.selected.image.shape == (2, 16)
    with pytest.raises(ValueError, match="choose one of dpmpp2m, eq9, ddpm"):
        generator.class_to_image([0], solver="heun")


@pytest.mark.parametrize("solver", ["dpmpp2m", "ddpm"])
def test_results_do_not_depend_on_the_batch_size(generator, monkeypatch, solver):
    whole = generator.class_to_image([0, 1, 2], steps=4, solver=solver)
    monkeypatch.setattr(module, "BATCH", 2)
    parts = generator.class_to_image([0, 1, 2], steps=4, solver=solver)
    torch.testing.assert_close(whole, parts, rtol=0, atol=0.02)  # bf16
    assert generator.selected.text.shape[0] == 3


@pytest.mark.parametrize("task", ["captions", "replies"])
def test_the_most_typical_of_several_candidates_is_returned(generator, monkeypatch, task):
    """A typical one of random weights means nothing: what is compared and returned is tested."""
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))

    dialogues = [("one cat",), ("one", "two", "three")]

    def draw(n: int = 2, **options: int) -> list[str]:
        if task == "captions":
            return generator.image_to_text(latents[:n], steps=3, **options)
        return generator.reply(dialogues[:n], steps=3, **options)

    compared = []
    for at in range(3):
        seen = []
        monkeypatch.setattr(
            module, "most_typical", lambda texts, a=at, s=seen: s.append(texts) or a
        )
        texts = draw(candidates=3)
        assert [generator.tokenizer.decode(row[at]) for row in seen] == texts
        assert generator.selected.text.shape[0] == 2
        compared.append(seen)
    assert compared[0] == compared[1] == compared[2]
    seen = []
    monkeypatch.setattr(module, "most_typical", lambda texts: seen.append(texts) or 0)
    draw(1, candidates=3)
    assert seen == compared[0][:1], "candidates of other samples"
    monkeypatch.undo()
    first, others = [row[0] for row in compared[0]], [row[1:] for row in compared[0]]
    assert [generator.tokenizer.decode(ids) for ids in first] == draw()
    assert all(one not in rest for one, rest in zip(first, others, strict=True))
    with pytest.raises(ValueError, match="candidates is 0; at least 1 is needed"):
        draw(candidates=0)


def test_long_captions_are_cut_with_a_warning(generator, caplog):
    long = "one two three four five six seven eight nine"
    assert generator.text_to_image([long], steps=3).shape == (1, 3, 16, 16)
    assert "1 captions cut to 8 tokens" in caplog.text
    assert long in caplog.text


def test_mistakes_name_both_values(generator, export, tmp_path):
    with pytest.raises(ValueError, match=r"sample 0 has 5 in class_ids; it lies in -1 \.\.\. 2"):
        generator.class_to_image([5])
    with pytest.raises(ValueError, match="0 samples are requested"):
        generator.class_to_image([])
    with pytest.raises(ValueError, match="0 samples are requested"):
        generator.text_to_image([])
    with pytest.raises(FileNotFoundError, match="no/such/folder is not a folder"):
        Generator.from_pretrained("no/such/folder", local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Generator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="choose one of given, generated, absent"):
        Request("given", "wished", torch.zeros(1), 0, 8, latents=torch.zeros(1))
    config = json.loads((export / "config.json").read_text())
    config["model"]["vocab_size"] = 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed = Loss(generator.config).state_dict()
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="29 pieces but the model was trained with 30"):
        Generator.from_pretrained(tmp_path)


def test_a_reply_depends_on_images_and_their_positions(generator):
    """The weights are random: conditions must change the outputs, not make sense."""
    images = torch.randn(1, 2, 4 * 4, 16, generator=torch.Generator().manual_seed(0))
    outputs = []

    def first_h(turns, shown):
        outputs.clear()
        generator.reply([turns], images=shown, steps=2)
        return [v.clone() for v in outputs]

    hook = generator.model.network.register_forward_hook(
        lambda module, args, prediction: outputs.append(prediction.text)
    )
    try:
        beside = first_h(("o t",), images)
        assert not torch.equal(beside[0], first_h(("o t",), images.flip(1))[0])
        first = first_h(("<image> o <image> t",), images)
        assert not torch.equal(beside[0], first[0])
        assert not torch.equal(first[0], first_h(("o <image> t <image>",), images)[0])
    finally:
        hook.remove()


def test_places_of_images_count_tokens(generator):
    pieces = generator.tokenizer
    turns = ("one <image>", "two", "<image> three")
    ids, places = dialogue_prompt(pieces, turns, 2, 40)
    assert ids == pieces.encode_prompt(("one", "two", "three"))
    one, two = len(pieces.encode("one")), len(pieces.encode("two"))
    assert places == [1 + one, 1 + one + 1 + two + 1]
    cut, moved = dialogue_prompt(pieces, turns, 2, len(ids) - 2)
    assert cut == ids[2:]
    assert moved == [at - 2 for at in places]
    assert dialogue_prompt(pieces, ("one",), 2, 40)[1] == [-1, -1]


def test_captions_have_the_room_that_is_asked_for(generator, monkeypatch):
    lengths = []
    run = generator._run
    monkeypatch.setattr(
        generator,
        "_run",
        lambda request, how: (lengths.append(request.length), run(request, how))[1],
    )
    generator.image_to_text(torch.zeros(1, 16, 16))
    generator.image_to_text(torch.zeros(1, 16, 16), max_new_tokens=3)
    assert lengths == [generator.config.data.caption_length, 3]


def test_a_long_dialogue_leaves_room_for_the_reply(generator, monkeypatch):
    shown = []
    run = generator._run
    monkeypatch.setattr(
        generator, "_run", lambda request, how: (shown.append(request.prompt), run(request, how))[1]
    )
    long = ("one two three four five six seven eight nine",)  # texts have 12 tokens
    assert len(generator.tokenizer.encode_prompt(long)) > 11
    short = len(generator.tokenizer.encode_prompt(("one",)))
    generator.reply([long, ("one",)])
    generator.reply([long], max_new_tokens=9)
    assert [int(n) for prompts in shown for n in prompts.sum(1)] == [6, short, 3]
    for room in (12, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens is {room}; texts have 12 tokens"):
            generator.reply([long], max_new_tokens=room)


def test_joint_samples_begin_with_a_class_a_dialogue_or_an_image(generator):
    latents = torch.randn(2, 16, 16)
    plain, _ = generator.joint(2, steps=3)
    for begin in (
        {"class_ids": [0, 2]},
        {"dialogues": [("one",), ("two cat",)]},
        {"images": latents},
    ):
        images, texts = generator.joint(2, steps=3, **begin)
        assert images.shape == plain.shape
        assert not torch.equal(images, plain), begin
        assert len(texts) == 2
    close = generator.joint(2, steps=3, images=latents, image_noise=0.01)[0]
    wanted = generator.autoencoder.decode(latents, (4, 4))
    torch.testing.assert_close(close, wanted, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="from one image of 16 tokens, not from 32"):
        generator.joint(2, images=torch.zeros(2, 32, 16))


def test_marks_without_images_are_refused(generator):
    with pytest.raises(ValueError, match="marks 2 places with <image> but has 1 images"):
        generator.reply([("<image> one <image>",)], images=torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="marks 1 places with <image> but has 0 images"):
        generator.reply([("<image> one",)])
    with pytest.raises(ValueError, match="1 sets of images for 2 dialogues"):
        generator.reply([("one",), ("two",)], images=torch.zeros(1, 1, 16, 16))
