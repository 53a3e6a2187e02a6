"""The denoising loop: both modalities step together, each at its own noise level or held.

Shapes: b batch, n image tokens, m text tokens, c latent width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mdm.diffusion import schedule
from mdm.diffusion.sampler import DPMSolverPP2M, log_snr_grid
from mdm.model.embed import CLEAN, DROPPED
from mdm.objective import Objective


@dataclass(frozen=True)
class Request:
    """What is given and what is asked for. A modality is `given`, `asked` or `absent`."""

    image: str
    text: str
    class_ids: Tensor  # i64 [b], -1 for none
    noise_txt: Tensor  # [b, m, c] standard normal
    noise_img: Tensor | None = None  # [b, n, c] standard normal; None for a text-only sequence
    latents: Tensor | None = None  # [b, n, c] first-stage latents of a given picture
    tokens: Tensor | None = None  # i64 [b, m] given text; where `prompt`, a given beginning
    prompt: Tensor | None = None  # bool [b, m]

    def __post_init__(self) -> None:
        for name in (self.image, self.text):
            if name not in ("given", "asked", "absent"):
                raise ValueError(f"a modality is {name!r}; choose given, asked or absent")


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
        First-stage latents [b, n, c] or None, and token ids [b, m].
    """
    means, bias = objective.vae.vocabulary()
    image, text = _start(objective, request, means)
    prompt = request.prompt
    if prompt is None:
        prompt = torch.zeros(request.noise_txt.shape[:2], dtype=torch.bool)
    grid_img = log_snr_grid(schedule.IMAGE, steps)
    grid_txt = log_snr_grid(schedule.TEXT, steps)
    solver_img, solver_txt = DPMSolverPP2M(grid_img), DPMSolverPP2M(grid_txt)
    estimate = torch.zeros_like(text)
    logits = None
    clean_text = text
    for i in range(steps):
        levels = _level(request.image, grid_img[i]), _level(request.text, grid_txt[i])

        def predict(
            z_img: Tensor | None, z_txt: Tensor, class_ids: Tensor, levels: tuple[float, float]
        ) -> tuple[Tensor | None, Tensor]:
            b = len(z_txt)
            said = objective.network(
                z_txt,
                torch.full((b,), levels[1]),
                prompt,
                class_ids,
                z_img,
                None if z_img is None else torch.full((b,), levels[0]),
                estimate,  # noqa: B023  (called within this step only)
            )
            return said.image, said.text.float() @ means.T + bias

        v, said = predict(image, text, request.class_ids, levels)
        if guidance:
            held = [
                DROPPED if m == "given" else level
                for m, level in zip((request.image, request.text), levels, strict=True)
            ]
            z_img = request.noise_img if request.image == "given" else image
            z_txt = request.noise_txt if request.text == "given" else text
            nothing = torch.full_like(request.class_ids, -1)
            v_free, said_free = predict(z_img, z_txt, nothing, (held[0], held[1]))
            said = (1 + guidance) * said - guidance * said_free
            if v is not None and v_free is not None:
                v = (1 + guidance) * v - guidance * v_free
        if request.text == "asked":
            logits = said
            estimate = said.softmax(-1) @ means
            stepped = solver_txt.step(i, text, estimate)
            text = torch.where(prompt.unsqueeze(-1), clean_text, stepped)
        if request.image == "asked":
            assert v is not None
            assert image is not None
            abar = float(grid_img[i].sigmoid())
            z_0 = abar**0.5 * image - (1 - abar) ** 0.5 * v
            image = solver_img.step(i, image, z_0)
    latents = None
    if image is not None:
        latents = objective.vae.decode_image(objective.vae.denormalize_image(image))
    tokens = request.tokens if request.text == "given" else None
    if logits is not None:
        tokens = logits.argmax(-1)
        if request.tokens is not None:
            tokens = torch.where(prompt, request.tokens, tokens)
    return latents, tokens if tokens is not None else torch.zeros_like(prompt).long()


def _start(objective: Objective, request: Request, means: Tensor) -> tuple[Tensor | None, Tensor]:
    """Z at the first step: conditions are clean, the rest is noise."""
    text = request.noise_txt
    if request.tokens is not None:
        given = means[request.tokens]
        if request.text == "given":
            text = given
        elif request.prompt is not None:
            text = torch.where(request.prompt.unsqueeze(-1), given, text)
    image = request.noise_img
    if request.image == "given":
        assert request.latents is not None
        image = objective.vae.normalize_image(objective.vae.encode_image(request.latents)[0])
    return image, text


def _level(modality: str, log_snr: Tensor) -> float:
    return {"given": CLEAN, "absent": DROPPED}.get(modality, float(log_snr))
