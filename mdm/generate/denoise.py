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
    objective: Objective, request: Request, *, steps: int, guidance: float = 0.0
) -> tuple[Tensor | None, Tensor]:
    """Sample what the request asks for.

    Guidance acts on estimates of z_0: (1 + w) conditional - w unconditional (Ho & Salimans 2022);
    the unconditional pass drops the class and every given modality.

    Args:
        objective: weights.
        request: conditions and starting noise.
        steps: evaluations.
        guidance: w; 0 takes one network call a step, more takes two.

    Returns:
        First-stage latents [b, n, c] (None without a picture) and token ids [b, m].
    """
    state = _State(objective, request, steps)
    for i in range(steps):
        state.step(i, guidance)
    return state.latents(), state.tokens()


class _State:
    """z of both modalities at one step of the loop."""

    def __init__(self, objective: Objective, request: Request, steps: int) -> None:
        self.network, self.vae, self.request = objective.network, objective.vae, request
        self.means, self.bias = self.vae.vocabulary()
        self.grid_img = log_snr_grid(schedule.IMAGE, steps)
        self.grid_txt = log_snr_grid(schedule.TEXT, steps)
        self.solver_img, self.solver_txt = (
            DPMSolverPP2M(self.grid_img),
            DPMSolverPP2M(self.grid_txt),
        )
        prompt = request.prompt
        if prompt is None:
            prompt = torch.zeros(request.noise_txt.shape[:2], dtype=torch.bool)
        self.prompt = prompt | (request.text == "given")
        self.image, self.text = request.noise_img, request.noise_txt
        if request.tokens is not None:
            self.given_text = self.means[request.tokens]
            self.text = torch.where(self.prompt.unsqueeze(-1), self.given_text, self.text)
        if request.image == "given":
            assert request.latents is not None
            self.image = self.vae.normalize_image(self.vae.encode_image(request.latents)[0])
        # Fed back only to a network that has met its own estimates in training.
        self.self_conditions = objective.weights.p_self_condition > 0
        self.estimate = torch.zeros_like(self.text)
        self.logits: Tensor | None = None

    def step(self, i: int, guidance: float) -> None:
        """From noise level i to i + 1."""
        request = self.request
        v, logits = self.predict(i, self.image, self.text, request.class_ids, self.prompt)
        if guidance:
            free_v, free_logits = self.predict_unconditional(i)
            logits = (1 + guidance) * logits - guidance * free_logits
            if v is not None and free_v is not None:
                v = (1 + guidance) * v - guidance * free_v
        if request.text == "asked":
            self.logits = logits
            estimate = logits.softmax(-1) @ self.means
            if self.self_conditions:
                self.estimate = estimate
            text = self.solver_txt.step(i, self.text, estimate)
            self.text = torch.where(self.prompt.unsqueeze(-1), self.text, text)
        if request.image == "asked":
            assert v is not None
            assert self.image is not None
            # v = sqrt(abar) eps - sqrt(1 - abar) z_0, so z_0 = sqrt(abar) z_t - sqrt(1 - abar) v
            abar = float(self.grid_img[i].sigmoid())
            z_0 = abar**0.5 * self.image - (1 - abar) ** 0.5 * v
            self.image = self.solver_img.step(i, self.image, z_0)

    def predict(
        self, i: int, image: Tensor | None, text: Tensor, class_ids: Tensor, prompt: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """(v [b, n, c] or None, logits [b, m, v]) at level i."""
        level_img = _level(self.request.image, self.grid_img[i], class_ids)
        level_txt = _level(self.request.text, self.grid_txt[i], class_ids)
        if image is not None and image is not self.image:
            level_img = torch.full_like(level_img, DROPPED)
        if text is not self.text:
            level_txt = torch.full_like(level_txt, DROPPED)
        said = self.network(
            text,
            level_txt,
            prompt,
            class_ids,
            image,
            None if image is None else level_img,
            self.estimate,
        )
        v = None if said.image is None else said.image.float()
        return v, said.text.float() @ self.means.T + self.bias

    def predict_unconditional(self, i: int) -> tuple[Tensor | None, Tensor]:
        """`predict` with the class and every given modality replaced by pure noise."""
        request = self.request
        image = request.noise_img if request.image == "given" else self.image
        text = request.noise_txt if request.text == "given" else self.text
        prompt = self.prompt & (request.text != "given")
        return self.predict(i, image, text, torch.full_like(request.class_ids, -1), prompt)

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


def _level(mode: str, log_snr: Tensor, like: Tensor) -> Tensor:
    level = {"given": CLEAN, "absent": DROPPED}.get(mode, float(log_snr))
    return torch.full(like.shape, level, dtype=torch.float32, device=like.device)
