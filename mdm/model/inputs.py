"""What the decoder reads of each modality, and the check of a batch or request on the CPU.

Shapes: B samples, R rows (B unless samples are packed), M text tokens, I images a sample, N image
tokens of all of them, C latent width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdm.config import ModelConfig
from mdm.model.sequence import Layout, Rows


class TextInput(NamedTuple):
    """The text at its noise level. A `NamedTuple`, because DeepSpeed's ZeRO-3 hooks know those."""

    z_t: Tensor  # [R, M, C] noisy latents, clean ones where `prompt`
    level: Tensor  # [B] log-SNR of the tokens outside the prompt
    prompt: Tensor  # bool [R, M], tokens that are clean conditions
    estimate: Tensor | None = None  # [R, M, C] last estimate of the clean text; None for zeros
    keep: Tensor | None = None  # bool [B, M], tokens that the blocks read; None for all
    rows: Rows | None = None  # of packed samples


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
        image_at: i64 [B, I] text tokens at whose positions images stand, -1 for none.
        text_of: i64 [R, M] of packed samples, as in `mdm.data.batch.Batch`.
        numbers: further fields, i64 [B] each.

    Raises:
        ValueError: a field that does not fit, with both values.
    """
    b, n = len(ids), model.image_height * model.image_width
    shape = tuple(tokens.shape)
    rows = shape[0] if text_of is not None else b
    if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= model.text_length:
        raise ValueError(
            f"tokens have shape {shape}; {b} samples need [{b}, 1 ... {model.text_length} "
            "(model.text_length)]"
        )
    if latents is None and image_at is not None:
        raise ValueError("image_at gives the places of images but latents are None")
    images, kind = 1, torch.float32
    if latents is not None and latents.dim() == 3:
        images = max(latents.shape[1] // n, 1)
        kind = torch.bfloat16 if latents.dtype == torch.bfloat16 else kind
    fields = {
        "tokens": (tokens, shape, torch.int64),
        "prompt": (prompt, shape, torch.bool),
        "class_ids": (class_ids, (b,), torch.int64),
        "latents": (latents, (b, images * n, model.latent_dim), kind),
        "image_at": (image_at, (b, images), torch.int64),
        "text_of": (text_of, shape, torch.int64),
        **{name: (value, (b,), torch.int64) for name, value in numbers.items()},
    }
    for name, (value, expected, dtype) in fields.items():
        if value is not None and (tuple(value.shape) != expected or value.dtype != dtype):
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}; {b} samples of {shape[1]} "
                f"tokens on a grid of {n} x {model.latent_dim} need {dtype} {expected}"
            )
    names = [f"of row {row}" for row in range(rows)] if text_of is not None else ids
    last = model.vocab_size - 1
    _check_range("tokens", tokens, names, 0, last, "the vocabulary of another tokenizer?")
    _check_range("class_ids", class_ids, ids, -1, model.n_classes - 1, "see model.n_classes")
    _check_range("image_at", image_at, ids, -1, shape[1] - 1, "it counts text tokens")
    _check_range("text_of", text_of, names, -1, b - 1, "it counts the samples")
    if text_of is not None:
        _check_rows(text_of, b, Layout.of(model, shape[1], 0 if latents is None else images))


def _check_rows(text_of: Tensor, b: int, layout: Layout) -> None:
    """ValueError unless each of B samples lies in one row, in turn, and no row is too full."""
    by_row = [row[row >= 0].unique_consecutive() for row in text_of]
    counted = torch.cat(by_row).tolist()
    if counted != list(range(b)):
        raise ValueError(
            f"text_of counts samples {counted}; it must count 0 ... {b - 1} row by row, each in "
            "one run of tokens"
        )
    for row, (numbers, samples) in enumerate(zip(text_of, by_row, strict=True)):
        length = int((numbers >= 0).sum())
        taken = length + len(samples) * (layout.length - layout.text)
        if taken > layout.length or bool((numbers[:length] < 0).any()):
            raise ValueError(
                f"row {row} has {layout.length} places; its {len(samples)} samples of {length} "
                f"text tokens in all need {taken}, and their texts no gap"
            )


def _check_range(
    field: str, values: Tensor | None, names: Sequence[str], low: int, high: int, hint: str
) -> None:
    if values is None:
        return
    outside = (values < low) | (values > high)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"sample {names[row]} has {int(values[outside][0])} in {field}; "
            f"it lies in {low} ... {high}: {hint}"
        )
