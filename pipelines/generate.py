"""Generate with exported weights: pictures from classes or text, text from pictures or dialogue.

  generate.py --checkpoint runs/demo/train/export --task class-to-image --input 0,1,2,3
  generate.py --checkpoint runs/demo/train/export --task text-to-image --input "handwritten seven"
  generate.py --checkpoint runs/demo/train/export --task image-to-text --input a.png,b.jpg
  generate.py --checkpoint runs/demo/train/export --task reply --input "How are you?"
  generate.py --checkpoint runs/demo/train/export --task joint --n 16

Several inputs are separated by commas; for text and dialogue by '|'. Pictures go to --out, one
PNG each and a grid; texts are printed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mdm.config import doc, fail, parse_cli
from mdm.data.autoencoder import Autoencoder
from mdm.data.image import decode_image
from mdm.generate import Generator

TASKS = ("class-to-image", "text-to-image", "image-to-text", "reply", "joint")


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    checkpoint: str = doc("runs/demo/train/export", "folder of an export")
    task: str = doc("joint", ", ".join(TASKS))
    input: str = doc("", "classes, captions, picture files or dialogue turns, as the task needs")
    n: int = doc(1, "results an input (or in all, for joint)")
    guidance: float = doc(3.0, "how strongly pictures follow their condition; 0 for none")
    steps: int = doc(30, "denoising steps")
    seed: int = doc(0, "starting noise")
    out: str = doc("runs/generated", "folder for pictures")
    tokenizer: str = doc("", "SentencePiece model, if not the run's own")
    autoencoder: str = doc("", "first-stage autoencoder, if not the run's own")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.n < 1:
            raise ValueError(f"--n is {self.n}; at least 1 result is needed")
        if not self.input and self.task != "joint":
            raise ValueError(f"--task {self.task} needs --input")


def main() -> int:
    """Run the job; returns its exit code."""
    flags = parse_cli(Flags, description=__doc__ or "")
    try:
        generator = Generator.load(
            flags.checkpoint, tokenizer=flags.tokenizer, autoencoder=flags.autoencoder
        )
        generate(generator, flags)
    except (ValueError, OSError) as error:
        fail(f"generate: {error}")
    return 0


def generate(generator: Generator, flags: Flags) -> None:
    """Do what `flags` ask; print texts, save pictures."""
    seed, steps = flags.seed, flags.steps
    if flags.task == "joint":
        pixels, captions = generator.joint(flags.n, guidance=flags.guidance, steps=steps, seed=seed)
        save(pixels, captions, Path(flags.out))
        return
    separator = "|" if flags.task in ("text-to-image", "reply") else ","
    inputs = [item.strip() for item in flags.input.split(separator) for _ in range(flags.n)]
    if flags.task == "class-to-image":
        classes = [int(item) for item in inputs]
        pixels = generator.class_to_image(classes, guidance=flags.guidance, steps=steps, seed=seed)
        save(pixels, [f"class {item}" for item in inputs], Path(flags.out))
    elif flags.task == "text-to-image":
        pixels = generator.text_to_image(inputs, guidance=flags.guidance, steps=steps, seed=seed)
        save(pixels, inputs, Path(flags.out))
    elif flags.task == "image-to-text":
        autoencoder = generator.autoencoder
        assert isinstance(autoencoder, Autoencoder)  # what `load` gives
        size = autoencoder.image_size
        pictures = [torch.from_numpy(decode_image(Path(i).read_bytes(), size)) for i in inputs]
        latents = autoencoder.encode(torch.stack(pictures))
        tell(inputs, generator.image_to_text(latents, steps=steps, seed=seed))
    else:
        replies = generator.reply([(turn,) for turn in inputs], steps=steps, seed=seed)
        tell(inputs, replies)


def tell(inputs: Sequence[str], texts: Sequence[str]) -> None:
    """Print each input with its text."""
    for given, text in zip(inputs, texts, strict=True):
        print(f"{given}: {text}")


def save(pixels: Tensor, names: Sequence[str], folder: Path) -> None:
    """Write pictures [b, 3, h, w] in [0, 1] as PNGs and as one grid; print what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    b, height, width, _ = arrays.shape
    columns = min(b, 10)
    grid = Image.new("RGB", (columns * width, -(-b // columns) * height), "white")
    for i, (array, name) in enumerate(zip(arrays, names, strict=True)):
        picture = Image.fromarray(array.numpy())
        picture.save(folder / f"{i:04d}.png")
        grid.paste(picture, (i % columns * width, i // columns * height))
        print(f"{folder / f'{i:04d}.png'}: {name}")
    grid.save(folder / "grid.png")
    print(folder / "grid.png")


if __name__ == "__main__":
    sys.exit(main())
