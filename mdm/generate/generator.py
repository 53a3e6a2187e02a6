"""What people ask of the model: a method a task, over exported weights."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor
from tqdm import tqdm

from mdm.checkpoint.exported import TOKENIZER, Training, read_provenance, write_export
from mdm.config import Config, from_dict
from mdm.data.provenance import Provenance, check_tokenizer
from mdm.diffusion import noise
from mdm.first_stage.tokenizer import EOS, PAD, Tokenizer
from mdm.generate.denoise import Drawn, denoise
from mdm.generate.loading import Decodes, load_first_stage, load_model
from mdm.generate.request import Request, Sampling
from mdm.generate.selection import Selected
from mdm.model.mdm import MDM
from mdm.utils.files import load_json
from mdm.utils.precision import AUTO, autocast, resolve

log = logging.getLogger(__name__)
BATCH = 100  # samples denoised together
IMAGE_MARK = "<image>"  # in a turn of a dialogue: here stands an image
TEXT_DELAY = 0.5  # of joint drawing: captions follow images more surely than the reverse


class Options(TypedDict, total=False):
    """What every method of `Generator` takes besides; defaults and meaning are `Sampling`'s."""

    solver: str
    interval: tuple[float, float]
    text_blocks: int
    selection: float


class Generator(ModelHubMixin, library_name="mdm", license="apache-2.0"):
    """Class, text, image or nothing in; image, text or both out.

    Results depend on `seed` and a sample's place in the call alone, not on the batch size. `steps`
    are evaluations of the network, without those of guidance.
    """

    selected: Selected | None = None  # which tokens the last call selected, and when

    # The names of these arguments must not be keys of config.json: the mixin would fill them in.
    def __init__(
        self,
        settings: Config,
        model: MDM,
        pieces: Tokenizer,
        first_stage: Decodes,
        *,
        compiled: bool = False,
        precision: str = AUTO,
        provenance: Provenance = Provenance(),  # noqa: B008 - frozen
    ) -> None:
        """Compiled blocks (`model.kernel compiled`) pay from some hundred samples on."""
        self.precision, self.provenance = resolve(precision), provenance
        self.compiled = compiled and model.network.trunk.compiled
        model.network.trunk.compiled = self.compiled
        self.config, self.model = settings, model.eval()
        self.tokenizer, self.autoencoder = pieces, first_stage
        self.grid = (settings.model.image_height, settings.model.image_width)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        tokenizer: str = "",
        autoencoder: str = "",
        compiled: bool = False,
        precision: str = AUTO,
        **hub: Any,
    ) -> Self:
        """From an export (config.json, model.safetensors, tokenizer.model).

        Args:
            folder: the export, or its name on the hub.
            tokenizer: SentencePiece model; the export's own by default.
            autoencoder: first-stage autoencoder; the run's own by default.
            compiled: compile the blocks, if the run did.
            precision: of matrix products: bf16, fp32, or auto, what this CPU is fast in, whichever
                the run was trained in.
            hub: for a name on the hub, what `huggingface_hub.snapshot_download` takes.

        Raises:
            FileNotFoundError: a folder or file that is missing, by name.
            ValueError: a config that this version does not know, or a tokenizer or autoencoder that
                is not the one of the training data.
        """
        place = Path(folder)
        if not place.is_dir():
            try:
                place = Path(snapshot_download(str(folder), **hub))
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"{folder} is no folder, and no model that the hub gives: "
                    f"{str(error).splitlines()[0]}"
                ) from None
        for name in ("config.json", "model.safetensors"):
            if not (place / name).is_file():
                raise FileNotFoundError(f"{place} has no {name}; it is not an exported model")
        own = place / TOKENIZER
        made: Self = super().from_pretrained(
            place,
            tokenizer=tokenizer or (str(own) if own.is_file() else ""),
            autoencoder=autoencoder,
            compiled=compiled,
            precision=precision,
        )
        return made

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        tokenizer: str,
        autoencoder: str,
        compiled: bool,
        precision: str,
        **_: Any,
    ) -> Self:
        folder = Path(model_id)
        config = from_dict(Config, load_json(folder / "config.json"))
        tokenizer, autoencoder = tokenizer or config.tokenizer, autoencoder or config.autoencoder
        provenance = read_provenance(folder)
        if provenance.tokenizer:
            whose = f"the data of {folder} was encoded with"
            pieces = check_tokenizer(tokenizer, provenance.tokenizer, whose)
        else:
            log.warning(
                "%s does not record its tokenizer and autoencoder: %s and %s are taken for them",
                *(folder, tokenizer or "none", autoencoder or "none"),
            )
            pieces = Tokenizer(tokenizer)
        if pieces.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {pieces.vocab_size} pieces but the model was trained with "
                f"{config.model.vocab_size}; use the tokenizer of its run"
            )
        first_stage = load_first_stage(autoencoder, provenance, folder)
        model = config.model
        if model.kernel == "fused":  # CUDA's; here the same scans are computed by torch
            model = dataclasses.replace(model, kernel="torch")
        weights = load_model(folder, dataclasses.replace(config, model=model))
        return cls(
            config,
            weights,
            pieces,
            first_stage,
            compiled=compiled,
            precision=precision,
            provenance=provenance,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` write: an export like a run's."""
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        write_export(
            save_directory,
            self.config,
            Training(),
            {"ema": weights},
            self.tokenizer.model(),
            self.provenance,
            replace=False,
        )

    def class_to_image(
        self,
        class_ids: Sequence[int],
        *,
        guidance: float = 1.0,
        steps: int = 20,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> Tensor:
        """Images of the classes, f32 [b, 3, h, w] in [0, 1]."""
        n_classes = self.config.model.n_classes
        if class_ids and not all(-1 <= c < n_classes for c in class_ids):
            raise ValueError(
                f"class ids {min(class_ids)} ... {max(class_ids)} leave 0 ... {n_classes - 1}"
            )

        def request(index: Tensor) -> Request:
            classes = torch.tensor(class_ids)[index]
            return Request("asked", "absent", classes, self._noise(index, seed))

        how = Sampling(image_steps=steps, image_guidance=guidance, **options)
        return self._pixels(self._run(request, len(class_ids), how)[0])

    def text_to_image(
        self,
        texts: Sequence[str],
        *,
        guidance: float = 1.0,
        steps: int = 20,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> Tensor:
        """Images of the captions, f32 [b, 3, h, w] in [0, 1].

        Captions are cut to the length of those in training, with a warning.
        """
        length = self.config.data.caption_length
        ids = [self.tokenizer.encode_caption(text) for text in texts]
        if cut := [text for text, i in zip(texts, ids, strict=True) if len(i) >= length]:
            log.warning("%d captions cut to %d tokens, as in training: %r", len(cut), length, cut)
        tokens = _padded([[*i[: length - 1], EOS] for i in ids], length)

        def request(index: Tensor) -> Request:
            none = torch.full_like(index, -1)
            return Request("asked", "given", none, self._noise(index, seed), tokens=tokens[index])

        how = Sampling(image_steps=steps, image_guidance=guidance, **options)
        return self._pixels(self._run(request, len(texts), how)[0])

    def image_to_text(
        self,
        latents: Tensor,
        *,
        guidance: float = 0.0,
        steps: int = 20,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> list[str]:
        """Captions of images given as first-stage latents [b, n, c] (`Autoencoder.encode`)."""

        def request(index: Tensor) -> Request:
            none = torch.full_like(index, -1)
            return Request("given", "asked", none, self._noise(index, seed), latents=latents[index])

        how = Sampling(text_steps=steps, text_guidance=guidance, **options)
        return self._texts(self._run(request, len(latents), how)[1])

    def reply(
        self,
        dialogues: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        guidance: float = 0.0,
        steps: int = 40,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> list[str]:
        """The assistant's next turn in each dialogue (user first, alternating).

        `images` are first-stage latents [b, k, n, c] of k images a dialogue. The k-th mark
        `<image>` in a dialogue's turns is where its k-th image stands; without any, images
        stand beside the whole dialogue.

        Raises:
            ValueError: images or marks that are too many or too few, with both numbers.
        """
        data = self.config.data
        length = data.dialogue_length if images is None else data.caption_length
        k = 0 if images is None else images.shape[1]
        if images is not None and len(images) != len(dialogues):
            raise ValueError(f"{len(images)} sets of images for {len(dialogues)} dialogues")
        asked = [self._asked(turns, k, length) for turns in dialogues]
        tokens = _padded([ids for ids, _ in asked], length)
        lengths = torch.tensor([len(ids) for ids, _ in asked])
        places = torch.tensor([at for _, at in asked])
        prompt = torch.arange(length) < lengths.unsqueeze(1)
        latents = None if images is None else images.flatten(1, 2)

        def request(index: Tensor) -> Request:
            return Request(
                "absent" if latents is None else "given",
                "asked",
                torch.full_like(index, -1),
                self._noise(index, seed, 0 if latents is None else latents.shape[1], length),
                latents=None if latents is None else latents[index],
                image_at=None if latents is None else places[index],
                tokens=tokens[index],
                prompt=prompt[index],
            )

        how = Sampling(text_steps=steps, text_guidance=guidance, **options)
        ids = self._run(request, len(dialogues), how)[1]
        return [
            self.tokenizer.decode(row[n:]) for row, n in zip(ids.tolist(), lengths, strict=True)
        ]

    def _asked(self, turns: Sequence[str], k: int, length: int) -> tuple[list[int], list[int]]:
        """A dialogue's prompt, cut at its beginning, and where its k images stand in it."""
        said: list[str] = []
        places = []
        for turn in turns:
            if IMAGE_MARK not in turn:
                said.append(turn)
                continue
            text, *rest = (part.strip() for part in turn.split(IMAGE_MARK))
            for part in rest:
                # Every turn begins with the mark of who speaks.
                places.append(sum(1 + len(self.tokenizer.encode(t)) for t in (*said, text)))
                text = f"{text} {part}".strip()
            said.append(text)
        ids = self.tokenizer.encode_prompt(said)
        cut = max(len(ids) - (length - 2), 0)
        if places and len(places) != k:
            raise ValueError(
                f"a dialogue marks {len(places)} places with {IMAGE_MARK} but has {k} images: "
                f"{turns!r}"
            )
        return ids[cut:], [max(at - cut, 0) for at in places] or [-1] * k

    def joint(
        self,
        n: int,
        *,
        guidance: float = 1.0,
        steps: int = 40,
        seed: int = 0,
        text_guidance: float | None = None,
        text_steps: int | None = None,
        **options: Unpack[Options],
    ) -> tuple[Tensor, list[str]]:
        """`n` images f32 [n, 3, h, w] and their captions, made from noise in one loop.

        Each modality hears the other at every step; the text trails the image. `guidance` and
        `steps` are the image's, and the text's too where it has none of its own.
        """

        def request(index: Tensor) -> Request:
            none = torch.full_like(index, -1)
            return Request("asked", "asked", none, self._noise(index, seed))

        how = Sampling(
            image_steps=steps,
            text_steps=steps if text_steps is None else text_steps,
            image_guidance=guidance,
            text_guidance=guidance if text_guidance is None else text_guidance,
            text_delay=TEXT_DELAY,
            **options,
        )
        latents, tokens = self._run(request, n, how)
        return self._pixels(latents), self._texts(tokens)

    def _run(
        self, request: Callable[[Tensor], Request], n: int, how: Sampling
    ) -> tuple[Tensor, Tensor]:
        if n < 1:
            raise ValueError(f"{n} samples are asked for; it takes at least 1")
        parts = torch.arange(n).split(BATCH)
        shown = tqdm(parts, desc="denoise", leave=False, disable=None if len(parts) > 1 else True)
        with autocast(self.precision):
            done = [self._denoise(request, part, how) for part in shown]
        self.selected = Selected.join([drawn.selected for drawn in done])
        latents = [drawn.latents.float() for drawn in done if drawn.latents is not None]
        tokens = torch.cat([drawn.tokens for drawn in done])
        return torch.cat(latents) if latents else torch.empty(0), tokens

    def _denoise(self, request: Callable[[Tensor], Request], part: Tensor, how: Sampling) -> Drawn:
        whole = part
        if self.compiled:  # one shape for all calls: the last sample fills the batch
            whole = torch.cat([part, part[-1:].expand(BATCH - len(part))])
        feeds_back = self.config.objective.p_self_condition > 0
        drawn = denoise(self.model, request(whole), how, self_conditions=feeds_back)
        return drawn.first(len(part))

    def _noise(
        self, index: Tensor, seed: int, n_image: int | None = None, n_text: int | None = None
    ) -> Callable[[int], noise.Draws]:
        """Normals of these samples, of a caption and an image or of the lengths given."""
        n_image = self.grid[0] * self.grid[1] if n_image is None else n_image
        n_text = self.config.data.caption_length if n_text is None else n_text
        width = self.config.model.latent_dim

        def draw(number: int) -> noise.Draws:
            return noise.draw(seed, index, torch.full_like(index, number), n_image, n_text, width)

        return draw

    def _pixels(self, latents: Tensor) -> Tensor:
        return torch.cat(
            [self.autoencoder.decode(part, self.grid) for part in latents.split(BATCH)]
        )

    def _texts(self, tokens: Tensor) -> list[str]:
        return [self.tokenizer.decode(row) for row in tokens.tolist()]


def _padded(texts: list[list[int]], length: int) -> Tensor:
    """Token ids i64 [b, length]."""
    if not texts:
        raise ValueError("0 texts are given; it takes at least 1")
    return torch.tensor([ids + [PAD] * (length - len(ids)) for ids in texts])
