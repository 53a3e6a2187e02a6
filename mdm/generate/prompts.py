"""A dialogue as the prompt of its next turn, with the places of its images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdm.first_stage.tokenizer import PAD, Tokenizer

IMAGE_MARK = "<image>"  # marks the place of an image in a turn


def dialogue_prompt(
    tokenizer: Tokenizer, turns: Sequence[str], images: int, longest: int
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and the position of each of its images, -1 without marks.

    A prompt of more than `longest` tokens loses its beginning.

    Raises:
        ValueError: another number of marks than of images, with both.
    """
    texts: list[str] = []
    places = []
    for turn in turns:
        text, *rest = (part.strip() for part in turn.split(IMAGE_MARK))
        for part in rest:
            # Every turn begins with the token of its speaker.
            places.append(sum(1 + len(tokenizer.encode(t)) for t in (*texts, text)))
            text = f"{text} {part}".strip()
        texts.append(text if rest else turn)
    ids = tokenizer.encode_prompt(texts)
    cut = max(len(ids) - longest, 0)
    if places and len(places) != images:
        raise ValueError(
            f"a dialogue marks {len(places)} places with {IMAGE_MARK} but has {images} images: "
            f"{turns!r}"
        )
    return ids[cut:], [max(at - cut, 0) for at in places] or [-1] * images


def padded(texts: Sequence[list[int]], length: int) -> Tensor:
    """Token ids i64 [b, length]."""
    return torch.tensor([ids + [PAD] * (length - len(ids)) for ids in texts])
