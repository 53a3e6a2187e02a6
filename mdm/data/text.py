"""Fitting token sequences to a length."""

import numpy as np
from numpy.typing import NDArray

from mdm.first_stage.tokenizer import PAD


def fit(
    tokens: NDArray[np.uint16], prompt_length: int, length: int
) -> tuple[NDArray[np.uint16], int]:
    """`tokens` cut to at most `length`, keeping the last one (EOS), and the prompt's new length.

    The reply is kept in preference to the prompt: a prompt loses its beginning, but at least its
    last token (the mark after which the reply begins) stays.
    """
    if len(tokens) <= length:
        return tokens, prompt_length
    reply = tokens[prompt_length:]
    longest = length - (1 if prompt_length else 0)
    if len(reply) > longest:
        reply = np.concatenate([reply[: longest - 1], reply[-1:]])
    kept = length - len(reply) if prompt_length else 0
    return np.concatenate([tokens[prompt_length - kept : prompt_length], reply]), kept


def fit_all(
    tokens: NDArray[np.uint16],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    prompts: NDArray[np.int64],
    length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`fit` for R texts at once: ([R, length] tokens, PAD after their end, new prompts [R]).

    Text r is `tokens[begin[r] : end[r]]`.
    """
    long = end - begin > length
    any_long = bool(long.any())
    if any_long:
        reply = np.minimum(end - begin - prompts, length - (prompts > 0))
        kept = np.where(long, np.where(prompts > 0, length - reply, 0), prompts)
        begin = begin + np.where(long, prompts - kept, 0)
        prompts = kept
    sizes = np.minimum(end - begin, length)
    places = np.arange(length)
    index = begin[:, None] + places
    if any_long:
        index[np.arange(len(index)), sizes - 1] = end - 1  # the last token stays
    fitted = tokens.take(index, mode="clip").astype(np.int64)
    fitted[places >= sizes[:, None]] = PAD
    return fitted, prompts
