"""The generation job: images as files, texts as lines; also the samples of a run in training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mdm.diffusion.sampler import SOLVERS
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.image import decode_image
from mdm.generate import Generator
from mdm.generate.selection import draw_map
from mdm.report.image_grid import cut_sheet, save_sheet
from mdm.utils.fields import POSITIVE, check_fields, doc, one_of

TASKS = ("class-to-image", "text-to-image", "image-to-text", "reply", "joint")


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    checkpoint: str = doc("runs/demo/train/export", "folder of an export")
    task: str = doc("joint", "what is generated from what", one_of(*TASKS))
    input: tuple[str, ...] = doc((), "class, caption, image file or dialogue; repeat for several")
    images: tuple[str, ...] = doc(
        (), "image files: for all replies, or one for each joint sample to begin with"
    )
    classes: tuple[int, ...] = doc((), "classes for joint samples to begin with")
    image_noise: float = doc(0.6, "share of noise that an image to begin with gets")
    max_new_tokens: int = doc(
        0, "room for a caption or reply, in tokens; 0: as in training, half a text for a reply"
    )
    n: int = doc(1, "results for each input, or in all for joint", POSITIVE)
    guidance: float = doc(3.0, "how strongly images follow their condition; 0 for none")
    text_guidance: float | None = doc(None, "the same of captions; for joint, default --guidance")
    candidates: int = doc(
        1, "captions or replies drawn for each result; the most typical is returned", POSITIVE
    )
    guidance_from: float = doc(-math.inf, "log-SNR below which guidance is off")
    guidance_to: float = doc(math.inf, "log-SNR above which guidance is off")
    steps: int = doc(30, "denoising steps")
    text_steps: int = doc(
        0,
        "denoising steps of each block of text; 0: 20, or 1 of a token alone; for joint twice "
        "--steps",
    )
    text_blocks: int | None = doc(
        None,
        "blocks of text, denoised one after the other; 0: each token alone, the default of models "
        "that were trained so (objective.p_prefix); else 1",
    )
    solver: str = doc("dpmpp2m", ", ".join(SOLVERS))
    selection: float = doc(0.0, "nats below which a token has settled and is dropped; 0 for off")
    selection_map: str = doc("", "PNG to write: the tokens that had settled at each step")
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")
    seed: int = doc(0, "seed of the noise")
    out: str = doc("runs/generated", "folder for images")
    tokenizer: str = doc("", "SentencePiece model, if not the run's own")
    autoencoder: str = doc("", "first-stage autoencoder, if not the run's own")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.input and self.task != "joint":
            raise ValueError(f"--task {self.task} needs --input")
        if self.images and self.task not in ("reply", "joint"):
            raise ValueError(f"--images belong to --task reply or joint, not to {self.task}")
        if self.classes and self.task != "joint":
            raise ValueError(f"--classes belong to --task joint; {self.task} takes --input")
        if self.candidates > 1 and self.task not in ("image-to-text", "reply"):
            raise ValueError(
                f"--candidates {self.candidates} belongs to --task image-to-text or reply, not to "
                f"{self.task}"
            )
        if self.text_blocks is not None and self.task not in ("image-to-text", "reply"):
            raise ValueError(
                f"--text_blocks {self.text_blocks} belongs to --task image-to-text or reply, not "
                f"to {self.task}"
            )
        begin = {len(given) for given in (self.input, self.images, self.classes) if given}
        if self.task == "joint" and len(begin) > 1:
            raise ValueError(
                f"joint samples begin with {len(self.input)} dialogues, {len(self.images)} images "
                f"and {len(self.classes)} classes; give as many of each, or none"
            )
        if self.selection_map and not self.selection:
            raise ValueError(
                f"--selection_map {self.selection_map} shows nothing with --selection "
                f"{self.selection}; choose a threshold such as 0.1"
            )


def generate(generator: Generator, flags: Flags) -> list[str]:
    """Generate what `flags` describe and save the images; lines with the results and files."""
    common: dict[str, Any] = {
        "seed": flags.seed,
        "solver": flags.solver,
        "interval": (flags.guidance_from, flags.guidance_to),
        "selection": flags.selection,
    }
    image = common | {"guidance": flags.guidance, "steps": flags.steps}
    text = common | {
        "guidance": flags.text_guidance or 0.0,
        "steps": flags.text_steps or None,
        "text_blocks": flags.text_blocks,
        "candidates": flags.candidates,
    }
    inputs = [item for item in split_inputs(flags) for _ in range(flags.n)]
    pixels = None
    match flags.task:
        case "joint":
            pixels, names = generator.joint(**image, **_joint(generator, flags))
        case "class-to-image":
            pixels = generator.class_to_image([int(item) for item in inputs], **image)
            names = [f"class {item}" for item in inputs]
        case "text-to-image":
            pixels, names = generator.text_to_image(inputs, **image), inputs
        case "image-to-text":
            names = generator.image_to_text(
                encode(generator, inputs), max_new_tokens=flags.max_new_tokens, **text
            )
        case "reply":
            images = encode(generator, flags.images) if flags.images else None
            if images is not None:
                images = images.expand(len(inputs), *images.shape)
            dialogues = split_turns(inputs)
            names = generator.reply(
                dialogues, images=images, max_new_tokens=flags.max_new_tokens, **text
            )
    if pixels is None:
        lines = [f"{item}: {reply}" for item, reply in zip(inputs, names, strict=True)]
    else:
        lines = save(pixels, names, Path(flags.out))
    if flags.selection_map:
        assert generator.selected is not None
        path = Path(flags.selection_map)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_map(generator.selected, generator.grid)).save(path)
        lines.append(str(path))
    return lines


def _joint(generator: Generator, flags: Flags) -> dict[str, Any]:
    """Further arguments of `Generator.joint`: `flags.n` samples for each beginning."""

    def repeated(items: Sequence[Any]) -> list[Any]:
        return [item for item in items for _ in range(flags.n)]

    dialogues = split_turns(repeated(flags.input))
    images = encode(generator, flags.images) if flags.images else None
    classes = repeated(flags.classes)
    return {
        "n": len(dialogues) or len(classes) or flags.n * max(len(flags.images), 1),
        "class_ids": classes or None,
        "dialogues": dialogues or None,
        "images": None if images is None else images.repeat_interleave(flags.n, 0),
        "image_noise": flags.image_noise,
        "text_guidance": flags.text_guidance,
        "text_steps": flags.text_steps or None,
    }


def split_turns(items: Sequence[str]) -> list[list[str]]:
    """The turns of dialogues in which `=>` separates them."""
    return [[turn.strip() for turn in item.split("=>")] for item in items]


def split_inputs(flags: Flags) -> list[str]:
    """The inputs one by one: classes are separated by commas, texts by '|', files not at all."""
    if flags.task == "image-to-text":
        return list(flags.input)
    separator = "," if flags.task == "class-to-image" else "|"
    return [part.strip() for item in flags.input for part in item.split(separator)]


def encode(generator: Generator, files: Sequence[str]) -> Tensor:
    """First-stage latents [B, N, C] of image files.

    Raises ValueError if the model was trained on text alone, or a file does not exist.
    """
    autoencoder = generator.autoencoder
    if not isinstance(autoencoder, Autoencoder):
        raise ValueError("the model was trained on text alone and takes no images")
    images = []
    for file in files:
        if not Path(file).exists():
            advice = "; repeat the flag for each file" if "," in file else ""
            raise ValueError(f"there is no file {file}{advice}")
        pixels = decode_image(Path(file).read_bytes(), autoencoder.image_size)
        images.append(torch.from_numpy(pixels))
    return autoencoder.encode(torch.stack(images))


def save(pixels: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write images [B, 3, H, W] in [0, 1] as PNGs and as one grid; lines with what each shows."""
    grid = save_sheet(pixels, folder / "grid.png", columns=10)
    files = [folder / f"{i:04d}.png" for i in range(len(pixels))]
    for image, file in zip(cut_sheet(grid, folder), files, strict=True):
        image.save(file)
    lines = [f"{file}: {name}" for file, name in zip(files, names, strict=True)]
    return [*lines, str(folder / "grid.png")]


def draw_samples(folder: Path, path: Path, n: int) -> dict[str, Any]:
    """Generate a row of `n` images of classes above one of `n` with captions, from an export.

    `folder` holds the export with its tokenizer, `path` is the PNG to write. All snapshots of a run
    start from the same noise, so that they can be compared. Returns the classes of the first row
    and the captions of the second.

    Raises:
        FileNotFoundError: the export is not complete.
        ValueError: the tokenizer or the first stage is not the run's, or cannot be loaded.
    """
    generator = Generator.from_pretrained(folder, local_files_only=True)
    config = generator.config
    classes = [i % config.model.n_classes for i in range(n)]
    sampling: dict[str, Any] = {"guidance": 3.0, "steps": 20, "seed": config.seed}
    images = generator.class_to_image(classes, **sampling)
    joint_images, captions = generator.joint(n, **sampling)
    save_sheet(torch.cat([images, joint_images]), path, columns=n)
    return {"classes": classes, "captions": captions}
