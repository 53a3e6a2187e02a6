"""What to generate from what, and how to sample it.

Shapes: b samples, i images a sample, n image tokens of all of them, m text tokens, c latent width.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.diffusion import noise
from mdm.diffusion.sampler import SOLVERS
from mdm.model.inputs import check

GIVEN, GENERATED, ABSENT = MODES = ("given", "generated", "absent")


@dataclass(frozen=True)
class Request:
    """The conditions of `b` samples; `image` and `text` are each given, generated or absent."""

    image: str
    text: str
    keys: Tensor  # i64 [b], numbers of the samples: with the seed they decide their noise
    seed: int
    length: int  # m
    class_ids: Tensor | None = None  # i64 [b], -1 for none
    # [b, n, c] first-stage latents of given images, or of the ones that generated images begin with
    latents: Tensor | None = None
    image_at: Tensor | None = None  # i64 [b, i], as in `mdm.data.batch.Batch`
    tokens: Tensor | None = None  # i64 [b, m] given text, or text of which `prompt` is given
    prompt: Tensor | None = None  # bool [b, m]
    reads_padding: bool = True  # of given text; not of a model that was trained on packed samples

    def __post_init__(self) -> None:
        for name, mode in (("image", self.image), ("text", self.text)):
            if mode not in MODES:
                raise ValueError(f"{name} is {mode!r}; choose one of {', '.join(MODES)}")
        if self.image == GIVEN and self.latents is None:
            raise ValueError("the image is given but latents are missing")
        if self.text == GIVEN and self.tokens is None:
            raise ValueError("the text is given but tokens are missing")

    def take(self, index: Tensor) -> "Request":
        """The samples at `index` i64 [...]."""
        tensors: dict[str, Any] = {
            name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def complete(self, model: ModelConfig) -> "Request":
        """The request with every text and class tensor, checked.

        Raises:
            ValueError: shapes, kinds or ranges that are not those of `model`, with both values.
        """
        b, m = len(self.keys), self.length
        tokens = torch.zeros(b, m, dtype=torch.long) if self.tokens is None else self.tokens
        prompt = torch.zeros(b, m, dtype=torch.bool) if self.prompt is None else self.prompt
        class_ids = torch.full((b,), -1) if self.class_ids is None else self.class_ids
        filled = dataclasses.replace(self, tokens=tokens, prompt=prompt, class_ids=class_ids)
        names = ("tokens", "prompt", "class_ids", "latents", "image_at")
        fields = {name: getattr(filled, name) for name in names}
        check(model, [str(key) for key in self.keys.tolist()], **fields)
        n = model.image_height * model.image_width
        if self.image == GENERATED and self.latents is not None and self.latents.shape[1] != n:
            raise ValueError(
                f"an image is generated from one image of {n} tokens, not from "
                f"{self.latents.shape[1]}"
            )
        return filled

    def noise(self, number: int, model: ModelConfig) -> tuple[Tensor | None, Tensor]:
        """Normals [b, n, c], None without an image, and [b, m, c]; number 0 is the start."""
        n = model.image_height * model.image_width
        n = {GIVEN: 0 if self.latents is None else self.latents.shape[1], ABSENT: 0}.get(
            self.image, n
        )
        epochs = torch.full_like(self.keys, number)
        draws = noise.draw(self.seed, self.keys, epochs, n, self.length, model.latent_dim)
        return None if draws.image is None else draws.image[:, 0], draws.text[:, 0]


@dataclass(frozen=True)
class Sampling:
    """How both modalities are sampled. A step is one evaluation, whatever the solver's order."""

    image_steps: int = 20
    text_steps: int = 20  # of each block of text
    image_guidance: float = 0.0  # w of (1 + w) conditional - w unconditional
    text_guidance: float = 0.0
    interval: tuple[float, float] = (-math.inf, math.inf)  # log-SNR between which guidance acts
    solver: str = "dpmpp2m"
    image_noise: float = 0.6  # share of the noise that an image to begin with gets
    text_blocks: int = 1  # of tokens, denoised one after the other; 0: each token is one
    selection: float = 0.0  # nats below which a token has settled; 0 turns selection off

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        for name in ("image_guidance", "text_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if not 0 < self.image_noise <= 1:
            raise ValueError(
                f"image_noise is {self.image_noise}; it is a share above 0 and at most 1"
            )
        if self.text_blocks < 0:
            raise ValueError(
                f"text_blocks is {self.text_blocks}; it must be 0, for one a token, or more"
            )
        if not self.selection >= 0:
            raise ValueError(f"selection is {self.selection} nats; it must be 0 (off) or more")
        low, high = self.interval
        if not low <= high:
            raise ValueError(f"the guidance interval runs from {low} to {high}; it must not fall")

    def guides(self, w: float, level: float) -> bool:
        """Whether guidance of weight `w` acts at log-SNR `level`."""
        return w != 0 and self.interval[0] <= level <= self.interval[1]
