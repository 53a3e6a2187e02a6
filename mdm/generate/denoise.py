"""The denoising loop: both modalities step together, each at its own noise level or held.

Shapes: b batch, n image tokens, m text tokens, c latent width, v vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mdm.diffusion import schedule
from mdm.diffusion.sampler import Solver, make_solver
from mdm.first_stage.tokenizer import EOS, PAD
from mdm.generate.request import ABSENT, GENERATED, GIVEN, Request, Sampling
from mdm.generate.selection import Selected, Selection, image_score_entropy, text_score_entropy
from mdm.model.embedding import CLEAN, DROPPED
from mdm.model.inputs import ImageInput, TextInput
from mdm.model.mdm import MDM, text_logits
from mdm.model.sequence import Layout, Rows, pack_rows


class Generated(NamedTuple):
    """The samples of a request."""

    latents: Tensor | None  # [b, n, c] of the first stage; None without an image
    tokens: Tensor  # i64 [b, m]; PAD after the first EOS
    selected: Selected


@torch.no_grad()
def denoise(
    model: MDM, request: Request, sampling: Sampling, *, self_conditions: bool = False
) -> Generated:
    """Sample what is requested.

    Guidance acts on estimates of z_0: (1 + w) conditional - w unconditional (Ho & Salimans 2022),
    within an interval of noise levels (Kynkäänniemi et al. 2024); the unconditional pass drops the
    class and the other modality, and takes one more network call for each modality.

    Args:
        model: the weights.
        request: the conditions.
        sampling: the solver and its settings.
        self_conditions: feed the model's last estimate of the text back to it; for a model that was
            trained so.

    Raises:
        ValueError: a request that does not fit the model, with both values.
    """
    state = _State(model, request.complete(model.network.config), sampling, self_conditions)
    i = 0
    while i < max(state.image_track.end, state.text_track.end):
        state.step(i)
        i += 1
    latents = settled = None
    if state.image is not None:
        latents = model.vae.decode_image(model.vae.denormalize_image(state.image))
        settled = state.settled_img.when
    return Generated(latents, state.known, Selected(settled, state.settled_txt.when, i))


class _Track:
    """The path of one modality from noise to data: given, absent, or moved by a solver.

    Text may take the path several times, once for each block, each with a solver of its own.
    """

    def __init__(self, mode: str, solvers: list[Solver]) -> None:
        self.mode, self.solvers = mode, solvers  # no solvers: not generated
        self.round = len(solvers[0].levels) if solvers else 0  # evaluations of a block
        self.end = len(solvers) * self.round

    def active(self, i: int) -> bool:
        """Whether evaluation i moves it."""
        return i < self.end

    def level(self, i: int) -> float:
        """Its log-SNR at evaluation i, as the network reads it."""
        if self.active(i):
            return float(self.solvers[0].levels[i % self.round])
        return DROPPED if self.mode == ABSENT else CLEAN

    def step(self, i: int, z: Tensor, z_0: Tensor) -> Tensor:
        """Z after evaluation i, given the estimate z_0."""
        block, inside = divmod(i, self.round)
        return self.solvers[block].step(inside, z, z_0)

    def finished_block(self, i: int) -> int | None:
        """The block whose last evaluation is i."""
        block, inside = divmod(i, self.round)
        return block if inside == self.round - 1 else None


class _State:
    """Both modalities at one evaluation of the loop."""

    def __init__(
        self, model: MDM, request: Request, sampling: Sampling, self_conditions: bool
    ) -> None:
        self.network, self.vae, self.config = model.network, model.vae, model.network.config
        self.request, self.sampling, self.self_conditions = request, sampling, self_conditions
        self.means, self.bias = self.vae.vocabulary()
        self.noise_img, self.noise_txt = request.noise(0, self.config)
        self._set_text()
        self.image_track = _Track(request.image, self._solvers(0))
        self.text_track = _Track(request.text, self._solvers(1))
        self.image = self.noise_img
        if request.latents is not None:
            z_0 = self.vae.normalize_image(self.vae.encode_image(request.latents)[0])
            abar = torch.tensor(self.image_track.level(0)).sigmoid()
            self.image = z_0
            if request.image == GENERATED and self.noise_img is not None:
                self.image = schedule.noised(z_0, self.noise_img, abar)
        self.rows = None if request.reads_padding or request.text != GIVEN else self._rows()
        b, m = self.prompt.shape
        n = 0 if self.image is None else self.image.shape[1]
        self.settled_img = Selection(sampling.selection, b, n)
        self.settled_txt = Selection(sampling.selection, b, m)
        self.last_z_0: Tensor | None = None

    def _solvers(self, modality: int) -> list[Solver]:
        """A solver for each pass of the image (0) or text (1); none if it is not generated."""
        request, sampling = self.request, self.sampling

        def noise(i: int) -> Tensor:
            normals = request.noise(1 + i, self.config)[modality]
            assert normals is not None
            return normals

        mode = (request.image, request.text)[modality]
        table = (schedule.IMAGE, schedule.TEXT)[modality]
        steps = (sampling.image_steps, sampling.text_steps)[modality]
        passes = (1, self.blocks)[modality] if mode == GENERATED else 0
        begins = modality == 0 and request.latents is not None
        share = sampling.image_noise if begins else 1.0
        return [make_solver(sampling.solver, table, steps, noise, share) for _ in range(passes)]

    def _set_text(self) -> None:
        request = self.request
        assert request.prompt is not None
        assert request.tokens is not None
        self.given = request.prompt | (request.text == GIVEN)
        self.prompt = self.given  # grows by the tokens that are done
        self.known = request.tokens  # where `prompt`
        free = ~self.given
        rank, count = free.cumsum(1) - 1, free.sum(1, keepdim=True).clamp(min=1)
        blocks = self.sampling.text_blocks
        self.blocks = blocks or int(count.max())
        self.block = torch.where(free, rank * blocks // count if blocks else rank, -1)
        self._restart_text()

    def _images(self) -> int:
        n = 0 if self.image is None else self.image.shape[1]
        return n // Layout.of(self.config, 0, 1).image

    def _rows(self) -> Rows:
        """Rows of one sample each, whose texts end where their padding begins."""
        b, m = self.known.shape
        text_of = torch.where(self.known == PAD, -1, torch.arange(b).unsqueeze(1))
        layout = Layout.of(self.config, m, self._images())
        return pack_rows(text_of, b, layout, self.network.trunk.scans)

    def _restart_text(self) -> None:
        """Known tokens clean, all others at their starting noise, nothing estimated yet."""
        self.text = torch.where(self.prompt.unsqueeze(-1), self.means[self.known], self.noise_txt)
        self.estimate = torch.zeros_like(self.text)
        self.last_tokens: Tensor | None = None

    def step(self, i: int) -> None:
        """Evaluation i: from each active modality's noise level to its next."""
        moves_image, moves_text = self.image_track.active(i), self.text_track.active(i)
        if not (moves_image or moves_text):
            return
        guides = self.sampling.guides
        v, logits = self.predict(i)
        if moves_image:
            assert v is not None
            w = self.sampling.image_guidance
            if guides(w, self.image_track.level(i)):
                free_v, _ = self.predict(i, drop="text")
                assert free_v is not None
                v = (1 + w) * v - w * free_v
        if moves_text and self.image is not None:
            w = self.sampling.text_guidance
            if guides(w, self.text_track.level(i)):
                _, free_logits = self.predict(i, drop="image")
                logits = (1 + w) * logits - w * free_logits
        if moves_image and v is not None:
            self._step_image(i, v)
        if moves_text:
            self._step_text(i, logits)

    def _step_image(self, i: int, v: Tensor) -> None:
        assert self.image is not None
        level = self.image_track.level(i)
        # v = sqrt(abar) eps - sqrt(1 - abar) z_0, so z_0 = sqrt(abar) z_t - sqrt(1 - abar) v
        abar = float(torch.tensor(level, dtype=torch.float64).sigmoid())
        z_0 = abar**0.5 * self.image - (1 - abar) ** 0.5 * v
        held = self.settled_img.settled.unsqueeze(-1)
        moved = torch.where(held, self.image, self.image_track.step(i, self.image, z_0))
        if self._selects(i) and self.last_z_0 is not None:
            new = self.settled_img.update(i, image_score_entropy(z_0, self.last_z_0, level))
            moved = torch.where(new.unsqueeze(-1), z_0, moved)
            if self.settled_img.settled.all():
                self.image_track.end = i + 1
        self.image, self.last_z_0 = moved, z_0

    def _step_text(self, i: int, logits: Tensor) -> None:
        estimate = logits.softmax(-1) @ self.means
        if self.self_conditions:
            self.estimate = estimate
        text = self.text_track.step(i, self.text, estimate)
        self.text = torch.where(self.prompt.unsqueeze(-1), self.text, text)
        tokens = logits.argmax(-1)
        if self._selects(i) and self.last_tokens is not None:
            level = self.text_track.level(i)
            entropy = text_score_entropy(logits, self.last_tokens, level)
            self._fix(self.settled_txt.update(i, entropy.where(~self.prompt, torch.inf)), tokens)
        self.last_tokens = tokens
        block = self.text_track.finished_block(i)
        if block is not None:
            self._fix(self.block <= block, tokens)
            self._end_texts()
        if self.prompt.all():
            self.text_track.end = i + 1
        elif block is not None:
            self._restart_text()

    def _fix(self, done: Tensor, tokens: Tensor) -> None:
        """From now on the tokens that are `done` [b, m] are a clean condition."""
        new = done & ~self.prompt
        self.known = torch.where(new, tokens, self.known)
        self.prompt = self.prompt | new
        self.text = torch.where(new.unsqueeze(-1), self.means[self.known], self.text)

    def _end_texts(self) -> None:
        """Set every token after the first generated EOS to PAD."""
        ends = self.prompt & ~self.given & (self.known == EOS)
        after = ~self.given & (ends.cumsum(1) - ends.long() > 0)
        self.known = torch.where(after, PAD, self.known)
        self.prompt = self.prompt | after

    def _selects(self, i: int) -> bool:
        """Whether settled tokens may be dropped: not while both modalities move and need them.

        Rows without padding are read as they are.
        """
        both = self.image_track.active(i) and self.text_track.active(i)
        return self.sampling.selection > 0 and not both and self.rows is None

    def _keep(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens of the text and of the image the scans read; (None, None) for all.

        Settled tokens are read again, as conditions, once their modality is complete; a sample in
        which nothing moves any more is left out whole.
        """
        any_settled = self.settled_img.settled.any() or self.settled_txt.settled.any()
        if not (any_settled and self._selects(i)):
            return None, None
        keep_txt = torch.ones_like(self.prompt)
        moving = torch.zeros(len(keep_txt), 1, dtype=torch.bool)
        if self.text_track.active(i):
            keep_txt = ~self.settled_txt.settled
            moving = moving | (~self.prompt).any(1, keepdim=True)
        if self.image is None:
            return keep_txt & moving, None
        keep_img = torch.ones_like(self.settled_img.settled)
        if self.image_track.active(i):
            keep_img = ~self.settled_img.settled
            moving = moving | keep_img.any(1, keepdim=True)
        return keep_txt & moving, keep_img & moving

    def predict(self, i: int, drop: str = "") -> tuple[Tensor | None, Tensor]:
        """(v [b, n, c] or None, logits [b, m, v]).

        With `drop` "image" or "text", that modality is noise and there is no class.
        """
        class_ids, image = self.request.class_ids, self.image
        level_img, level_txt = self.image_track.level(i), self.text_track.level(i)
        assert class_ids is not None
        b, (keep_txt, keep_img) = len(class_ids), self._keep(i)
        if drop:
            class_ids = torch.full_like(class_ids, -1)
        if drop == "image":
            image, level_img = self.noise_img, DROPPED
        level = torch.full((b,), level_txt)
        text = TextInput(self.text, level, self.prompt, self.estimate, keep_txt, self.rows)
        if drop == "text":
            text = TextInput(
                self.noise_txt,
                torch.full((b,), DROPPED),
                torch.zeros_like(self.prompt),
                keep=keep_txt,
                rows=self.rows,
            )
        images = None
        if image is not None:
            level = torch.full((b, self._images()), level_img)
            images = ImageInput(image, level, self.request.image_at, keep_img)
        prediction = self.network(text, class_ids, images)
        v = None if prediction.image is None else prediction.image.float()
        return v, text_logits(prediction, self.means, self.bias)
