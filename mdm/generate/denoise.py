"""The denoising loop: both modalities step together, each at its own noise level or held.

Shapes: b batch, n image tokens, m text tokens, c latent width, v vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mdm.diffusion import schedule
from mdm.diffusion.sampler import DPMSolverPP2M, log_snr_grid
from mdm.model.embed import CLEAN, DROPPED
from mdm.objective import Objective

MODES = ("given", "asked", "absent")


@dataclass(frozen=True)
class Request:
    """What is given and what is asked for; `image` and `text` are each given, asked or absent."""

    image: str
    text: str
    class_ids: Tensor  # i64 [b], -1 for none
    noise_txt: Tensor  # [b, m, c] standard normal
    noise_img: Tensor | None = None  # [b, n, c] standard normal; None for a text-only sequence
    latents: Tensor | None = None  # [b, n, c] first-stage latents of a given picture
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
        if self.image != "absent" and self.noise_img is None:
            raise ValueError(f"the image is {self.image} but noise_img is missing")


@torch.no_grad()
def denoise(
    objective: Objective,
    request: Request,
    *,
    steps: int,
    guidance: float = 0.0,
    text_delay: float = 0.0,
) -> tuple[Tensor | None, Tensor]:
    """Sample what the request asks for.

    Guidance acts on estimates of z_0: (1 + w) conditional - w unconditional (Ho & Salimans 2022);
    the unconditional pass drops the class and the other modality.

    Args:
        objective: weights.
        request: conditions and starting noise.
        steps: evaluations of each modality that is asked for.
        guidance: w; 0 takes one network call a step, more takes one more a modality.
        text_delay: where both are asked for, by what share of its steps the text trails the
            picture: it is then said of a picture that is partly there.

    Returns:
        First-stage latents [b, n, c] (None without a picture) and token ids [b, m].
    """
    if not 0 <= text_delay <= 1:
        raise ValueError(f"text_delay is {text_delay}; it is a share between 0 and 1")
    both = request.image == request.text == "asked"
    delay = round(text_delay * steps) if both else 0
    state = _State(objective, request, steps, delay)
    for i in range(steps + delay):
        state.step(i, guidance)
    return state.latents(), state.tokens()


class _Track:
    """One modality's way from noise to data: given, absent, or stepped from `delay` on."""

    def __init__(self, mode: str, table: schedule.Schedule, steps: int, delay: int) -> None:
        self.mode, self.delay = mode, delay
        self.grid = log_snr_grid(table, steps)
        self.solver = DPMSolverPP2M(self.grid)

    def active(self, i: int) -> bool:
        """Whether step i moves it."""
        return self.mode == "asked" and 0 <= i - self.delay < len(self.grid)

    def level(self, i: int) -> float:
        """Its log-SNR at step i, as the network sees it."""
        if self.active(i):
            return float(self.grid[i - self.delay])
        done = self.mode == "given" or (self.mode == "asked" and i >= self.delay)
        return CLEAN if done else DROPPED

    def step(self, i: int, z: Tensor, z_0: Tensor) -> Tensor:
        """Z after step i, given the estimate z_0."""
        return self.solver.step(i - self.delay, z, z_0)


class _State:
    """z of both modalities at one step of the loop."""

    def __init__(self, objective: Objective, request: Request, steps: int, delay: int) -> None:
        self.network, self.vae, self.request = objective.network, objective.vae, request
        self.means, self.bias = self.vae.vocabulary()
        self.image_track = _Track(request.image, schedule.IMAGE, steps, 0)
        self.text_track = _Track(request.text, schedule.TEXT, steps, delay)
        prompt = request.prompt
        if prompt is None:
            prompt = torch.zeros(request.noise_txt.shape[:2], dtype=torch.bool)
        self.prompt = prompt | (request.text == "given")
        self.image, self.text = request.noise_img, request.noise_txt
        if request.tokens is not None:
            given = self.means[request.tokens]
            self.text = torch.where(self.prompt.unsqueeze(-1), given, self.text)
        if request.image == "given":
            assert request.latents is not None
            self.image = self.vae.normalize_image(self.vae.encode_image(request.latents)[0])
        # Fed back only to a network that has met its own estimates in training.
        self.self_conditions = objective.weights.p_self_condition > 0
        self.estimate = torch.zeros_like(self.text)
        self.logits: Tensor | None = None

    def step(self, i: int, guidance: float) -> None:
        """From noise level i to i + 1."""
        draws_image, draws_text = self.image_track.active(i), self.text_track.active(i)
        v, logits = self.predict(i)
        if guidance and draws_image:
            free, _ = self.predict(i, drop="text")
            assert v is not None
            assert free is not None
            v = (1 + guidance) * v - guidance * free
        if guidance and draws_text:
            _, free_logits = self.predict(i, drop="image")
            logits = (1 + guidance) * logits - guidance * free_logits
        if draws_image:
            assert v is not None
            assert self.image is not None
            # v = sqrt(abar) eps - sqrt(1 - abar) z_0, so z_0 = sqrt(abar) z_t - sqrt(1 - abar) v
            abar = float(self.image_track.grid[i].sigmoid())
            z_0 = abar**0.5 * self.image - (1 - abar) ** 0.5 * v
            self.image = self.image_track.step(i, self.image, z_0)
        if draws_text:
            self.logits = logits
            estimate = logits.softmax(-1) @ self.means
            if self.self_conditions:
                self.estimate = estimate
            text = self.text_track.step(i, self.text, estimate)
            self.text = torch.where(self.prompt.unsqueeze(-1), self.text, text)

    def predict(self, i: int, drop: str = "") -> tuple[Tensor | None, Tensor]:
        """(v [b, n, c] or None, logits [b, m, v]); `drop` makes a modality and the class noise."""
        request, class_ids = self.request, self.request.class_ids
        image, text, prompt, estimate = self.image, self.text, self.prompt, self.estimate
        level_img, level_txt = self.image_track.level(i), self.text_track.level(i)
        if drop:
            class_ids = torch.full_like(class_ids, -1)
        if drop == "image" and image is not None:
            image, level_img = request.noise_img, DROPPED
        if drop == "text":
            text, level_txt, estimate = request.noise_txt, DROPPED, torch.zeros_like(estimate)
            prompt = torch.zeros_like(prompt)
        like = class_ids.float()
        said = self.network(
            text,
            torch.full_like(like, level_txt),
            prompt,
            class_ids,
            image,
            None if image is None else torch.full_like(like, level_img),
            estimate,
        )
        v = None if said.image is None else said.image.float()
        return v, said.text.float() @ self.means.T + self.bias

    def latents(self) -> Tensor | None:
        """First-stage latents of the picture, [b, n, c]."""
        if self.image is None:
            return None
        return self.vae.decode_image(self.vae.denormalize_image(self.image))

    def tokens(self) -> Tensor:
        """The text, i64 [b, m]: the given one, or the likeliest tokens at the last step."""
        if self.logits is None:
            given = self.request.tokens
            return given if given is not None else torch.zeros_like(self.prompt).long()
        likeliest = self.logits.argmax(-1)
        if self.request.tokens is None:
            return likeliest
        return torch.where(self.prompt, self.request.tokens, likeliest)
