"""What is asked of the denoising loop, and how it is to be drawn.

Shapes: b batch, n image tokens, m text tokens, c latent width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mdm.diffusion.noise import Draws
from mdm.diffusion.sampler import SOLVERS

MODES = ("given", "asked", "absent")


@dataclass(frozen=True)
class Request:
    """What is given and what is asked for; `image` and `text` are each given, asked or absent."""

    image: str
    text: str
    class_ids: Tensor  # i64 [b], -1 for none
    noise: Callable[[int], Draws]  # normals of number 0, to start from, 1, 2, ...
    latents: Tensor | None = None  # [b, n, c] first-stage latents of a given image, or of several
    image_at: Tensor | None = None  # i64 [b, images], as in `mdm.data.batch.Batch`
    tokens: Tensor | None = None  # i64 [b, m] given text, or text of which `prompt` is given
    prompt: Tensor | None = None  # bool [b, m]

    def __post_init__(self) -> None:
        for name, mode in (("image", self.image), ("text", self.text)):
            if mode not in MODES:
                raise ValueError(f"{name} is {mode!r}; choose one of {', '.join(MODES)}")
        if self.image == "given" and self.latents is None:
            raise ValueError("the image is given but latents are missing")
        if self.text == "given" and self.tokens is None:
            raise ValueError("the text is given but tokens are missing")


@dataclass(frozen=True)
class Sampling:
    """How both modalities are drawn. A step is one evaluation, whatever the solver's order."""

    image_steps: int = 20
    text_steps: int = 20  # of each block of text
    image_guidance: float = 0.0  # w of (1 + w) conditional - w unconditional
    text_guidance: float = 0.0
    interval: tuple[float, float] = (-math.inf, math.inf)  # log-SNR between which guidance acts
    solver: str = "dpmpp2m"
    text_delay: float = 0.0  # of the image's steps, by which the text trails where both are drawn
    text_blocks: int = 1  # of tokens, denoised one after the other
    selection: float = 0.0  # nats below which a token has settled; 0 turns selection off

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        for name in ("image_guidance", "text_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if not 0 <= self.text_delay <= 1:
            raise ValueError(f"text_delay is {self.text_delay}; it is a share between 0 and 1")
        if self.text_blocks < 1:
            raise ValueError(f"text_blocks is {self.text_blocks}; it must be at least 1")
        if not self.selection >= 0:
            raise ValueError(f"selection is {self.selection} nats; it must be 0 (off) or more")
        low, high = self.interval
        if not low <= high:
            raise ValueError(f"the guidance interval runs from {low} to {high}; it must not fall")

    def guides(self, w: float, level: float) -> bool:
        """Whether guidance of weight `w` acts at log-SNR `level`."""
        return w != 0 and self.interval[0] <= level <= self.interval[1]
