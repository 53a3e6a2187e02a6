"""Generation from exported weights: one method for each task."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor
from tqdm import tqdm

from mdm.checkpoint.export import TOKENIZER, read_provenance, write_export
from mdm.checkpoint.state import TrainState
from mdm.config import Config
from mdm.data.provenance import Provenance, check_tokenizer
from mdm.first_stage.autoencoder import Autoencoder
from mdm.first_stage.pixel_patches import PixelPatches
from mdm.first_stage.tokenizer import EOS, Tokenizer
from mdm.generate.candidates import KEY_STRIDE, most_typical
from mdm.generate.denoise import denoise
from mdm.generate.loading import load_first_stage, load_model
from mdm.generate.prompts import dialogue_prompt, padded
from mdm.generate.request import ABSENT, GENERATED, GIVEN, Request, Sampling
from mdm.generate.selection import Selected
from mdm.model.mdm import MDM
from mdm.utils.files import load_json
from mdm.utils.precision import AUTO, autocast, resolve
from mdm.utils.saved_config import from_dict

log = logging.getLogger(__name__)
BATCH = 100  # samples denoised together
TEXT_STEPS = 20  # of a block of text
TRAIL = 2  # joint texts take so many times the image's steps: captions follow images better


class Options(TypedDict, total=False):
    """Further arguments of every method of `Generator`; see `Sampling` for meaning and defaults."""

    solver: str
    interval: tuple[float, float]
    selection: float


class Generator(ModelHubMixin, library_name="mdm", license="apache-2.0"):
    """Class, text, image or nothing in; image, text or both out.

    Results depend only on `seed` and a sample's place in the call, not on the batch size. `steps`
    are evaluations of the network, without those of guidance. Every method raises ValueError, with
    both values, for conditions that do not fit the model.
    """

    selected: Selected | None = None  # tokens that settled in the last call

    def __init__(
        self,
        settings: Config,
        model: MDM,
        pieces: Tokenizer,
        first_stage: Autoencoder | PixelPatches | None,
        *,
        precision: str = AUTO,
        provenance: Provenance = Provenance(),  # noqa: B008 - frozen
    ) -> None:
        """Without a `first_stage` the model generates text alone."""
        self.precision, self.provenance = resolve(precision), provenance
        self.compiled = model.network.config.kernel == "compiled"
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
        """Load an export (config.json, model.safetensors, tokenizer.model).

        Args:
            folder: the export, or its name on the hub.
            tokenizer: SentencePiece model; the export's own by default.
            autoencoder: first-stage autoencoder; the run's own by default.
            compiled: compile the blocks, if the run did; pays off from some hundred samples on.
            precision: of matrix products: bf16, fp32, or auto, whichever this CPU is fast in, in
                whatever precision the run was trained.
            hub: for a name on the hub, the arguments of `huggingface_hub.snapshot_download`.

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
                if isinstance(error, ValueError):  # no name that the hub could have
                    raise FileNotFoundError(f"{folder} is not a folder") from None
                raise FileNotFoundError(
                    f"{folder} is not a folder, nor a model that the hub has: "
                    f"{str(error).splitlines()[0]}"
                ) from None
        for name in ("config.json", "model.safetensors"):
            if not (place / name).is_file():
                raise FileNotFoundError(f"{place} has no {name}; it is not an exported model")
        config = from_dict(Config, load_json(place / "config.json"))
        exported = place / TOKENIZER
        tokenizer = tokenizer or (str(exported) if exported.is_file() else config.tokenizer)
        autoencoder, provenance = autoencoder or config.autoencoder, read_provenance(place)
        if provenance.tokenizer:
            whose = f"the data of {place} was encoded with"
            pieces = check_tokenizer(tokenizer, provenance.tokenizer, whose)
        else:
            log.warning(
                "%s does not record its tokenizer and autoencoder; using %s and %s",
                place,
                tokenizer or "none",
                autoencoder or "none",
            )
            pieces = Tokenizer(tokenizer)
        if pieces.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {pieces.vocab_size} pieces but the model was trained with "
                f"{config.model.vocab_size}; use the tokenizer of its run"
            )
        return cls(
            config,
            load_model(place, config, compiled),
            pieces,
            load_first_stage(autoencoder, provenance, place),
            precision=precision,
            provenance=provenance,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` write: an export like a run's."""
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        write_export(
            save_directory,
            self.config,
            TrainState(),
            {"ema": weights},
            self.tokenizer.file,
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
        """Images of the classes, f32 [b, 3, h, w] in [0, 1]; class -1 is none."""
        classes = torch.tensor(class_ids, dtype=torch.long)
        request = self._request(GENERATED, ABSENT, len(class_ids), seed, class_ids=classes)
        sampling = Sampling(image_steps=steps, image_guidance=guidance, **options)
        return self._pixels(self._run(request, sampling)[0])

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
        tokens = padded([[*i[: length - 1], EOS] for i in ids], length)
        request = self._request(GENERATED, GIVEN, len(texts), seed, tokens=tokens)
        sampling = Sampling(image_steps=steps, image_guidance=guidance, **options)
        return self._pixels(self._run(request, sampling)[0])

    def image_to_text(
        self,
        latents: Tensor,
        *,
        max_new_tokens: int = 0,
        guidance: float = 0.0,
        candidates: int = 1,
        text_blocks: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> list[str]:
        """Captions, as long as in training at most, of latents [b, n, c] (`Autoencoder.encode`).

        `text_blocks` parts of a text are drawn one after the other, each in `steps`. With 0, each
        token is a part, drawn in one step unless there are more `steps`; that is the default for a
        model that was trained to continue texts (`objective.p_prefix`). Otherwise a text is drawn
        whole, in 20 steps.

        Of several `candidates` for each image, the most typical one is returned; see
        `mdm.generate.candidates`. The first of them is the one that is drawn alone.
        """
        n = len(latents)
        request = self._request(GIVEN, GENERATED, n, seed, max_new_tokens, latents=latents)
        sampling = self._text_sampling(text_blocks, steps, guidance, options)
        return self._texts(request, sampling, [0] * n, candidates)

    def reply(
        self,
        dialogues: Sequence[Sequence[str]],
        *,
        images: Tensor | None = None,
        max_new_tokens: int = 0,
        guidance: float = 0.0,
        candidates: int = 1,
        text_blocks: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> list[str]:
        """The assistant's next turn in each dialogue (user first, alternating).

        `text_blocks`, `steps` and `candidates` are as of `image_to_text`.

        A dialogue that leaves less than `max_new_tokens` for the reply, by default half the length
        of training texts, loses its beginning.

        `images` are first-stage latents [b, k, n, c] of k images for each dialogue. The k-th mark
        `<image>` in a dialogue's turns is the position of its k-th image; images of a dialogue
        without marks have no position.

        Raises:
            ValueError: too many or too few images, marks or tokens, with both numbers.
        """
        data = self.config.data
        length = data.dialogue_length if images is None else data.caption_length
        room = max_new_tokens or length // 2
        if not 0 < room < length:
            raise ValueError(
                f"max_new_tokens is {room}; texts have {length} tokens, of which a prompt needs one"
            )
        k = 0 if images is None else images.shape[1]
        if images is not None and len(images) != len(dialogues):
            raise ValueError(f"{len(images)} sets of images for {len(dialogues)} dialogues")
        prompts = [dialogue_prompt(self.tokenizer, turns, k, length - room) for turns in dialogues]
        lengths = [len(ids) for ids, _ in prompts]
        request = self._request(
            ABSENT if images is None else GIVEN,
            GENERATED,
            len(dialogues),
            seed,
            length=length,
            latents=None if images is None else images.flatten(1, 2),
            image_at=None if images is None else torch.tensor([at for _, at in prompts]),
            tokens=padded([ids for ids, _ in prompts], length),
            prompt=torch.arange(length) < torch.tensor(lengths).unsqueeze(1),
        )
        sampling = self._text_sampling(text_blocks, steps, guidance, options)
        return self._texts(request, sampling, lengths, candidates)

    def joint(
        self,
        n: int,
        *,
        class_ids: Sequence[int] | None = None,
        dialogues: Sequence[Sequence[str]] | None = None,
        images: Tensor | None = None,
        image_noise: float = 0.6,
        guidance: float = 1.0,
        steps: int = 40,
        seed: int = 0,
        text_guidance: float | None = None,
        text_steps: int | None = None,
        **options: Unpack[Options],
    ) -> tuple[Tensor, list[str]]:
        """`n` images f32 [n, 3, h, w] and their texts, made in one loop (Fig. 4).

        Both move from the start, each a condition of the other at every step; the text takes twice
        the steps of the image unless it has its own. `guidance` applies to the image, and to the
        text unless it has its own. Samples may begin with something:

        Args:
            n: samples.
            class_ids: a class for each, -1 for none.
            dialogues: a dialogue for each, as of `reply`: the text is the assistant's next turn.
            images: first-stage latents [n, N, c] of an image for each, which is noised and denoised
                into a variation.
            image_noise: how far it is noised, as a share of the whole way.
            guidance: weight.
            steps: evaluations for the image.
            seed: of all noise.
            text_guidance: weight.
            text_steps: evaluations for the text.
            options: further options.
        """
        classes = tokens = prompt = None
        if class_ids is not None:
            classes = torch.tensor(class_ids, dtype=torch.long)
        length, lengths = self.config.data.caption_length, [0] * n
        if dialogues is not None:
            longest = length - length // 2
            prompts = [dialogue_prompt(self.tokenizer, d, 0, longest)[0] for d in dialogues]
            lengths = [len(ids) for ids in prompts]
            tokens = padded(prompts, length)
            prompt = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
        sampling = Sampling(
            image_steps=steps,
            text_steps=TRAIL * steps if text_steps is None else text_steps,
            image_guidance=guidance,
            text_guidance=guidance if text_guidance is None else text_guidance,
            image_noise=image_noise,
            **options,
        )
        given = {"latents": images, "class_ids": classes, "tokens": tokens, "prompt": prompt}
        request = self._request(GENERATED, GENERATED, n, seed, length, **given)
        latents, drawn = self._run(request, sampling)
        rows = zip(drawn.tolist(), lengths, strict=True)
        return self._pixels(latents), [self.tokenizer.decode(row[start:]) for row, start in rows]

    def _request(
        self, image: str, text: str, n: int, seed: int, length: int = 0, **given: Tensor | None
    ) -> Request:
        if n < 1:
            raise ValueError(f"{n} samples are requested; at least 1 is needed")
        length = length or self.config.data.caption_length
        reads = self.config.data.images_per_row == 1  # packed samples have no padding
        return Request(image, text, torch.arange(n), seed, length, **given, reads_padding=reads)

    def _text_sampling(
        self, text_blocks: int | None, steps: int | None, guidance: float, options: Options
    ) -> Sampling:
        """How captions and replies are drawn, by default as the model was trained."""
        if text_blocks is None:
            text_blocks = 0 if self.config.objective.p_prefix else 1
        if steps is None:
            steps = TEXT_STEPS if text_blocks else 1
        return Sampling(
            text_steps=steps, text_guidance=guidance, text_blocks=text_blocks, **options
        )

    def _texts(
        self, request: Request, sampling: Sampling, starts: Sequence[int], candidates: int
    ) -> list[str]:
        """What follows token `starts` of each sample, in the most typical of its `candidates`."""
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}; at least 1 is needed")
        n = len(request.keys)
        numbers = torch.arange(candidates).repeat(n)
        repeated = request.take(torch.arange(n).repeat_interleave(candidates))
        repeated = dataclasses.replace(repeated, keys=repeated.keys + numbers * KEY_STRIDE)
        rows = self._run(repeated, sampling)[1].tolist()
        chosen = []
        for i, start in enumerate(starts):
            drawn = rows[i * candidates : (i + 1) * candidates]
            texts = [self.tokenizer.text_ids(row[start:]) for row in drawn]
            chosen.append(i * candidates + most_typical(texts))
        assert self.selected is not None
        self.selected = self.selected.take(torch.tensor(chosen))
        ends = zip(chosen, starts, strict=True)
        return [self.tokenizer.decode(rows[row][start:]) for row, start in ends]

    def _run(self, request: Request, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """First-stage latents [b, n, c], empty without images, and tokens i64 [b, m]."""
        n = len(request.keys)
        index = torch.arange(n)
        if self.compiled:  # one shape for all calls: the last sample fills the last batch
            index = torch.cat([index, index[-1:].expand(-n % BATCH)])
        parts = index.split(BATCH)
        shown = tqdm(parts, desc="denoise", leave=False, disable=None if len(parts) > 1 else True)
        own_estimate = self.config.objective.p_self_condition > 0
        with autocast(self.precision):
            batches = [
                denoise(self.model, request.take(part), sampling, self_conditions=own_estimate)
                for part in shown
            ]
        self.selected = Selected.join([batch.selected for batch in batches], n)
        latents = [batch.latents.float() for batch in batches if batch.latents is not None]
        tokens = torch.cat([batch.tokens for batch in batches])[:n]
        return torch.cat(latents)[:n] if latents else torch.empty(0), tokens

    def _pixels(self, latents: Tensor) -> Tensor:
        decoder = self.autoencoder
        if decoder is None:
            raise ValueError("the model was trained on text alone: it generates no images")
        return torch.cat([decoder.decode(part, self.grid) for part in latents.split(BATCH)])
