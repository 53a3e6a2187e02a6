"""Fitting token sequences to a length."""

import numpy as np
from numpy.typing import NDArray


def fit(
    tokens: NDArray[np.uint16], prompt_length: int, length: int
) -> tuple[NDArray[np.uint16], int]:
    """`tokens` cut to at most `length`, keeping the last one (EOS), and the prompt's new length.

    What follows the prompt is kept before the prompt: a prompt loses its beginning, and at least
    its last token (the mark after which the reply begins) stays.
    """
    if len(tokens) <= length:
        return tokens, prompt_length
    reply = tokens[prompt_length:]
    longest = length - (1 if prompt_length else 0)
    if len(reply) > longest:
        reply = np.concatenate([reply[: longest - 1], reply[-1:]])
    kept = length - len(reply) if prompt_length else 0
    return np.concatenate([tokens[prompt_length - kept : prompt_length], reply]), kept
