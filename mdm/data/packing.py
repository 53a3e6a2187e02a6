"""Samples packed into rows of one length: the plan of a step, and a rank's rows of it.

A plan is a pure function of the token lengths of the step's texts, the length of a row and the
number of rows of a step; ranks index its rows, so it is the same for every number of ranks. Samples
come from shuffle windows, so nothing has to be planned ahead of a step.

Shapes: R rows, M text tokens of a row.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdm.first_stage.tokenizer import PAD
from mdm.model.sequence import Layout

ALGORITHM = "longest first into the emptiest row, 1"  # to be changed with what `plan` does


def beside(grid: tuple[int, int] | None) -> int:
    """Places that a sample takes beside its text's tokens, with an image of this grid if any."""
    return Layout(0).length if grid is None else Layout(0, 1, grid).length


def plan(lengths: Sequence[int], length: int, rows: int, beside: int) -> list[list[int]]:
    """Samples of each row, by their places in `lengths`.

    Args:
        lengths: text tokens of each sample, none above `length`.
        length: text tokens of a row with one sample.
        rows: least number of rows; there are more if the samples do not fit.
        beside: places that every further sample takes beside its text's tokens.
    """
    packs: list[list[int]] = [[] for _ in range(rows)]
    filled = [(0, row) for row in range(rows)]  # a heap: (places taken, row)
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        taken, row = filled[0]
        places = lengths[sample] + beside
        if taken + places <= length + beside:
            heapq.heapreplace(filled, (taken + places, row))
        else:
            row = len(packs)
            packs.append([])
            heapq.heappush(filled, (places, row))
        packs[row].append(sample)
    return [sorted(pack) for pack in packs]


def room(length: int, beside: int, per_row: int) -> int:
    """Text tokens that a row of `per_row` samples has for all of them.

    Raises:
        ValueError: there is less than one for each.
    """
    tokens = length + beside - per_row * beside
    if tokens < per_row:
        raise ValueError(
            f"{per_row} samples a row take {per_row * (beside + 1)} places and more, but a row has "
            f"{length + beside}: as many as a sample with {length} text tokens; pack fewer, or "
            "raise that length"
        )
    return tokens


def share(packs: list[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """One rank's consecutive rows; all ranks have equally many, some of them maybe empty."""
    rows = packs[rank * len(packs) // ranks : (rank + 1) * len(packs) // ranks]
    return rows + [[]] * (-(-len(packs) // ranks) - len(rows))


def fill(
    packs: Sequence[Sequence[int]],
    texts: Sequence[NDArray[np.integer[Any]]],
    prompts: Sequence[int],
    length: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Tokens, prompt and `text_of` of a `Batch`, each [R, M]: the packs' rows from the first on.

    Samples are counted in the order of the rows.
    """
    shape = len(packs), length
    tokens = np.full(shape, PAD, np.int64)
    prompt = np.zeros(shape, np.bool_)
    text_of = np.full(shape, -1, np.int64)
    number = 0
    for row, pack in enumerate(packs):
        start = 0
        for text in pack:
            end = start + len(texts[text])
            tokens[row, start:end] = texts[text]
            prompt[row, start : start + prompts[text]] = True
            text_of[row, start:end] = number
            start, number = end, number + 1
    return tokens, prompt, text_of
