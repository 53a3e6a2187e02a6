"""Orders in which a block reads the sequence (Fig. 2 f, g).

A scan is a pair (order, inverse) of int64 permutations: x[order] is the scanned sequence,
x[order][inverse] is x.
"""

import torch
from torch import Tensor

Scan = tuple[Tensor, Tensor]


def image_scan(height: int, width: int, pattern: int) -> Scan:
    """Order of a row-major grid: 1 rows, 2 rows reversed, 3 columns, 4 columns reversed.

    Returns:
        (order, inverse), int64 [height * width].

    Raises:
        ValueError: an empty grid or a pattern outside 1-4.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image grid {height} x {width} is empty; both sides must be at least 1")
    if pattern not in (1, 2, 3, 4):
        raise ValueError(f"image scan pattern is {pattern}; choose 1, 2, 3 or 4")
    order = torch.arange(height * width)
    if pattern in (3, 4):
        order = order.view(height, width).T.reshape(-1)
    if pattern in (2, 4):
        order = order.flip(0)
    return order, order.argsort()


def text_scan(length: int, pattern: int) -> Scan:
    """Order of a text: 1 forward, 2 reversed.

    Returns:
        (order, inverse), int64 [length].

    Raises:
        ValueError: an empty text or a pattern outside 1-2.
    """
    if length < 1:
        raise ValueError(f"text length is {length}; it must be at least 1")
    if pattern not in (1, 2):
        raise ValueError(f"text scan pattern is {pattern}; choose 1 or 2")
    order = torch.arange(length)
    if pattern == 2:
        order = order.flip(0)
    return order, order.argsort()


def parse_scans(scans: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """("1234/12") -> ((1, 2, 3, 4), (1, 2)).

    Raises:
        ValueError: anything that is not image patterns, a slash, text patterns.
    """
    image, slash, text = scans.partition("/")
    valid = set(image) <= set("1234") and set(text) <= set("12")
    if not (slash and image and text and valid):
        raise ValueError(
            f"scans is {scans!r}; write image scans 1-4, a slash, text scans 1-2, such as 1234/12"
        )
    return tuple(map(int, image)), tuple(map(int, text))
