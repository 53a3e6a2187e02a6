"""Fitting token sequences to a length."""

import numpy as np
from numpy.typing import NDArray

from mdm.first_stage.tokenizer import PAD


def fit(
    tokens: NDArray[np.uint16], prompt_length: int, length: int
) -> tuple[NDArray[np.uint16], int]:
    """One text cut to at most `length` as `fit_all` does, and its new prompt length."""
    if len(tokens) <= length:
        return tokens, prompt_length
    end = np.array([len(tokens)])
    fitted, prompts = fit_all(tokens, end - end, end, np.array([prompt_length]), length)
    return fitted[0].astype(np.uint16), int(prompts[0])


def fit_all(
    tokens: NDArray[np.uint16],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    prompts: NDArray[np.int64],
    length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """R texts cut to at most `length`: ([R, length] tokens, PAD after their end, prompts [R]).

    Text r is `tokens[begin[r] : end[r]]`, of which `prompts[r]` are the prompt. The last token
    (EOS) stays. The reply is kept in preference to the prompt: a prompt loses its beginning, but at
    least its last token (the mark after which the reply begins) stays.
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
