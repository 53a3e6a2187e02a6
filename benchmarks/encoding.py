"""A small real data set, autoencoder and tokenizer for the benchmarks of the encode job."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mdm.first_stage import autoencoder
from mdm.first_stage.folder import describe
from mdm.first_stage.tokenizer import Tokenizer
from mdm.preprocess.encode import Flags, make_recipe
from mdm.preprocess.recipe import Recipe, inputs_sha256
from mdm.sources.record import Unit
from tests.data_sets import NAMES, write_tokenizer

SIZE = 128  # image size of the autoencoder in pixels; the files are 320 x 256


class Inputs:
    """An ImageNet layout of `images` images in `folder`, as different from each other as photos."""

    def __init__(self, folder: Path, images: int, channels: tuple[int, ...]) -> None:
        import torch

        self.root = folder / "raw"
        random = np.random.default_rng(0)
        for label, name in enumerate(NAMES):
            (self.root / "train" / f"n{label:08d}").mkdir(parents=True)
            with open(self.root / "LOC_synset_mapping.txt", "a") as mapping:
                mapping.write(f"n{label:08d} {name}\n")
        for i in range(images):
            coarse = random.integers(0, 255, (16, 20, 3), dtype=np.uint8)
            fine = random.integers(0, 24, (256, 320, 3), dtype=np.uint8)
            large = Image.fromarray(coarse).resize((320, 256), Image.Resampling.BICUBIC)
            pixels = np.asarray(large, np.int16) + fine - 12
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
            wnid = f"n{i % len(NAMES):08d}"
            (self.root / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(file.getvalue())
        self.tokenizer = write_tokenizer(folder / "tokenizer.model")
        torch.manual_seed(0)
        self.autoencoder = folder / "autoencoder"
        model = autoencoder.build(SIZE, channels=channels)
        autoencoder.save(model, self.autoencoder, [0.0] * 4, [1.0] * 4)
        assert describe(self.autoencoder).image_size == SIZE

    def flags(self, out: Path) -> Flags:
        return Flags(
            dataset="imagenet",
            root=str(self.root),
            split="train",
            tokenizer=str(self.tokenizer),
            autoencoder=str(self.autoencoder),
            out=str(out),
            shard_rows=512,
            unit_bytes=4 << 20,
        )

    def recipe(self, units: list[Unit]) -> Recipe:
        recipe = make_recipe(self.flags(Path("unused")), units)
        assert recipe.inputs_sha256 == inputs_sha256(units)
        return recipe

    def tokens(self) -> Tokenizer:
        return Tokenizer(self.tokenizer)
