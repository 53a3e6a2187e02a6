"""What the decoder reads of each modality, and the check of a batch or request on the CPU.

Shapes: B samples, R rows (B unless texts are packed), M text tokens, I images a sample, N image
tokens of all of them, C latent width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.model.sequence import TextRows


class TextInput(NamedTuple):
    """The text at its noise level. A `NamedTuple`, because DeepSpeed's ZeRO-3 hooks know those."""

    z_t: Tensor  # [R, M, C] noisy latents, clean ones where `prompt`
    level: Tensor  # [B] log-SNR of the tokens outside the prompt
    prompt: Tensor  # bool [R, M], tokens that are clean conditions
    estimate: Tensor | None = None  # [R, M, C] last estimate of the clean text; None for zeros
    keep: Tensor | None = None  # bool [B, M], tokens that the blocks read; None for all
    rows: TextRows | None = None  # of packed texts


class ImageInput(NamedTuple):
    """The images at their noise levels, one after the other."""

    z_t: Tensor  # [B, N, C] noisy latents
    level: Tensor  # [B, I] log-SNR
    at: Tensor | None = None  # i64 [B, I], as `image_at` in `mdm.data.batch.Batch`
    keep: Tensor | None = None  # bool [B, N], given where the text's is


def check(
    model: ModelConfig,
    ids: Sequence[str],
    *,
    tokens: Tensor,
    prompt: Tensor,
    class_ids: Tensor,
    latents: Tensor | None = None,
    image_at: Tensor | None = None,
    text_of: Tensor | None = None,
    **numbers: Tensor,
) -> None:
    """Check B samples, on the CPU: shapes, kinds and ranges are those of `model`.

    Args:
        model: sizes of the model.
        ids: names of the samples for messages.
        tokens: i64 [R, M].
        prompt: bool [R, M].
        class_ids: i64 [B], -1 without a class.
        latents: f32 or bf16 [B, N, C].
        image_at: i64 [B, I], -1 for an image beside the whole text.
        text_of: i64 [R, M] of packed texts, -1 after a row's last text.
        numbers: further fields, i64 [B] each.

    Raises:
        ValueError: what does not fit, with both values.
    """
    b, n = len(ids), model.image_height * model.image_width
    shape = tuple(tokens.shape)
    rows = shape[0] if text_of is not None else b
    if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= model.text_length:
        raise ValueError(
            f"tokens have shape {shape}; {b} samples need [{b}, 1 ... {model.text_length} "
            "(model.text_length)]"
        )
    fields = {"tokens": (tokens, shape, torch.int64), "prompt": (prompt, shape, torch.bool)}
    for name, value in {"class_ids": class_ids, **numbers}.items():
        fields[name] = (value, (b,), torch.int64)
    if text_of is not None:
        fields["text_of"] = (text_of, shape, torch.int64)
    if latents is not None:
        k = max(latents.shape[1] // n, 1) if latents.dim() == 3 else 1
        kind = torch.bfloat16 if latents.dtype == torch.bfloat16 else torch.float32
        fields["latents"] = (latents, (b, k * n, model.latent_dim), kind)
        if image_at is not None:
            fields["image_at"] = (image_at, (b, k), torch.int64)
        if text_of is not None:
            raise ValueError("text_of gives the texts of packed rows but there are latents")
    elif image_at is not None:
        raise ValueError("image_at gives the places of images but latents are None")
    for name, (value, expected, kind) in fields.items():
        if tuple(value.shape) != expected or value.dtype != kind:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}; {b} samples of {shape[1]} "
                f"tokens on a grid of {n} x {model.latent_dim} need {kind} {expected}"
            )
    ranges = {
        "tokens": (tokens, 0, model.vocab_size - 1, "the vocabulary of another tokenizer?"),
        "class_ids": (class_ids, -1, model.n_classes - 1, "see model.n_classes"),
        "image_at": (image_at, -1, shape[1] - 1, "it counts text tokens"),
        "text_of": (text_of, -1, b - 1, "it counts the samples"),
    }
    for name, (values, low, high, hint) in ranges.items():
        outside = None if values is None else (values < low) | (values > high)
        if outside is None or not outside.any():
            continue
        assert values is not None
        row = int(outside.view(len(values), -1).any(1).nonzero()[0, 0])
        wrong = int(values[outside][0])
        sample = f"of row {row}" if text_of is not None and name != "class_ids" else ids[row]
        raise ValueError(
            f"sample {sample} has {wrong} in {name}; it lies in {low} ... {high}: {hint}"
        )
