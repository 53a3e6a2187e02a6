"""The most typical of several texts that were drawn for the same input.

Minimum Bayes risk (Kumar and Byrne 2004), as is usual for texts drawn by diffusion (Li et al. 2022,
Diffusion-LM, Sec. 4.4): the text whose mean similarity to the others is the highest. A text that
joins the halves of two sentences shares less with the others than a whole sentence does.
"""

from collections import Counter
from collections.abc import Sequence

KEY_STRIDE = 2**32  # between the keys of a sample's candidates: no call has as many samples


def most_typical(texts: Sequence[Sequence[int]]) -> int:
    """The index of the text with the highest mean similarity to the others, the first of equals."""
    counts = [Counter(text) for text in texts]
    means = [sum(similarity(a, b) for b in counts) for a in counts]  # each also meets itself: 1
    return means.index(max(means))


def similarity(a: Counter[int], b: Counter[int]) -> float:
    """F1 of the tokens that two texts share, in any order: 1 for equal ones, 0 for none."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
