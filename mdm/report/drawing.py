"""One request to a model, as the command line gives it: saves images, returns lines of text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mdm.config import doc
from mdm.diffusion.sampler import SOLVERS
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.image import decode_image
from mdm.generate import Generator
from mdm.generate.generator import Options
from mdm.generate.selection import draw_map

TASKS = ("class-to-image", "text-to-image", "image-to-text", "reply", "joint")


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    checkpoint: str = doc("runs/demo/train/export", "folder of an export")
    task: str = doc("joint", ", ".join(TASKS))
    input: tuple[str, ...] = doc(
        (), "class, caption, image file or dialogue turns, as the task needs; repeat it for several"
    )
    images: tuple[str, ...] = doc(
        (), "image file that every dialogue is about, for reply; repeat it for several"
    )
    n: int = doc(1, "results an input (or in all, for joint)")
    guidance: float = doc(3.0, "how strongly images follow their condition; 0 for none")
    text_guidance: float | None = doc(
        None, "how strongly captions follow their image; none, or --guidance for joint"
    )
    guidance_from: float = doc(-math.inf, "log-SNR below which guidance rests")
    guidance_to: float = doc(math.inf, "log-SNR above which guidance rests")
    steps: int = doc(30, "denoising steps")
    text_steps: int = doc(0, "denoising steps of texts; 0 for as many as --steps")
    text_blocks: int = doc(1, "blocks of tokens, each denoised after those before it")
    solver: str = doc("dpmpp2m", ", ".join(SOLVERS))
    selection: float = doc(0.0, "nats below which a token has settled and is dropped; 0 for off")
    selection_map: str = doc("", "PNG of the tokens that had settled at each step")
    precision: str = doc("auto", "of matrix products: bf16, fp32, or what this CPU is fast in")
    seed: int = doc(0, "starting noise")
    out: str = doc("runs/generated", "folder for images")
    tokenizer: str = doc("", "SentencePiece model, if not the run's own")
    autoencoder: str = doc("", "first-stage autoencoder, if not the run's own")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.n < 1:
            raise ValueError(f"--n is {self.n}; at least 1 result is needed")
        if not self.input and self.task != "joint":
            raise ValueError(f"--task {self.task} needs --input")
        if self.images and self.task != "reply":
            raise ValueError(f"--images belong to --task reply, not to {self.task}")
        if self.selection_map and not self.selection:
            raise ValueError(
                f"--selection_map {self.selection_map} shows nothing with --selection "
                f"{self.selection}; choose a threshold such as 0.1"
            )


def generate(generator: Generator, flags: Flags) -> list[str]:
    """Draw what `flags` describe and save the images; lines with what was drawn and where it is."""
    lines = draw(generator, flags)
    if flags.selection_map:
        assert generator.selected is not None
        path = Path(flags.selection_map)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_map(generator.selected, generator.grid)).save(path)
        lines.append(str(path))
    return lines


def draw(generator: Generator, flags: Flags) -> list[str]:
    """The task itself; lines with its results."""
    seed, guidance, steps = flags.seed, flags.guidance, flags.steps
    text_steps = flags.text_steps or steps
    options = Options(
        solver=flags.solver,
        interval=(flags.guidance_from, flags.guidance_to),
        text_blocks=flags.text_blocks,
        selection=flags.selection,
    )
    if flags.task == "joint":
        pixels, captions = generator.joint(
            flags.n,
            guidance=guidance,
            steps=steps,
            seed=seed,
            text_guidance=flags.text_guidance,
            text_steps=text_steps,
            **options,
        )
        return save(pixels, captions, Path(flags.out))
    inputs = [item for item in parts(flags) for _ in range(flags.n)]
    if flags.task == "class-to-image":
        classes = [int(item) for item in inputs]
        pixels = generator.class_to_image(
            classes, guidance=guidance, steps=steps, seed=seed, **options
        )
        return save(pixels, [f"class {item}" for item in inputs], Path(flags.out))
    if flags.task == "text-to-image":
        pixels = generator.text_to_image(
            inputs, guidance=guidance, steps=steps, seed=seed, **options
        )
        return save(pixels, inputs, Path(flags.out))
    if flags.task == "image-to-text":
        texts = generator.image_to_text(
            encode(generator, inputs),
            guidance=flags.text_guidance or 0.0,
            steps=text_steps,
            seed=seed,
            **options,
        )
        return paired(inputs, texts)
    dialogues = [[turn.strip() for turn in item.split("=>")] for item in inputs]
    shown = None
    if flags.images:
        latents = encode(generator, flags.images)
        shown = latents.expand(len(inputs), *latents.shape)
    texts = generator.reply(
        dialogues,
        images=shown,
        guidance=flags.text_guidance or 0.0,
        steps=text_steps,
        seed=seed,
        **options,
    )
    return paired(inputs, texts)


def parts(flags: Flags) -> list[str]:
    """The inputs one by one."""
    if flags.task == "image-to-text":
        return list(flags.input)
    separator = "," if flags.task == "class-to-image" else "|"
    return [part.strip() for item in flags.input for part in item.split(separator)]


def encode(generator: Generator, files: Sequence[str]) -> Tensor:
    """First-stage latents [b, n, c] of image files."""
    autoencoder = generator.autoencoder
    if not isinstance(autoencoder, Autoencoder):
        raise ValueError("the model was trained on text alone: it takes no images")
    size = autoencoder.image_size
    images = [torch.from_numpy(decode_image(read(i), size)) for i in files]
    return autoencoder.encode(torch.stack(images))


def read(file: str) -> bytes:
    """An image file's bytes; ValueError if there is none."""
    try:
        return Path(file).read_bytes()
    except FileNotFoundError:
        several = "; give several files by repeating the flag" if "," in file else ""
        raise ValueError(f"there is no file {file}{several}") from None


def paired(inputs: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Each input with its text."""
    return [f"{given}: {text}" for given, text in zip(inputs, texts, strict=True)]


def save(pixels: Tensor, names: Sequence[str], folder: Path) -> list[str]:
    """Write images [b, 3, h, w] in [0, 1] as PNGs and as one grid; lines with what each shows."""
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    b, height, width, _ = arrays.shape
    columns = min(b, 10)
    grid = Image.new("RGB", (columns * width, -(-b // columns) * height), "white")
    for i, (array, name) in enumerate(zip(arrays, names, strict=True)):
        image = Image.fromarray(array.numpy())
        image.save(folder / f"{i:04d}.png")
        grid.paste(image, (i % columns * width, i // columns * height))
        lines.append(f"{folder / f'{i:04d}.png'}: {name}")
    grid.save(folder / "grid.png")
    return [*lines, str(folder / "grid.png")]
