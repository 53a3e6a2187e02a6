"""The judge of scenes: finds the digits in an image, and measures colour and place.

A digit is a connected region brighter than the background, of one hue. Cut out and scaled as in
MNIST, it is read by a classifier that was trained on digits cut in the same way from real training
scenes. Colour is the median hue of the region, place its centre of mass. Nothing of the generative
model is involved.

Shapes: n images, k cut-out digits, S pixels a side.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from examples.scenes.grammar import COLOURS, DIGITS, Item
from examples.scenes.scene import HUES, SIZES, UNIT, Scene, generator
from mdm.evaluate import classifier
from mdm.evaluate.classifier import Classifier

BRIGHTER = (0.3, 0.45, 0.6)  # than the background, of 1; the next where digits run together
LONGEST = (SIZES[1] + 4) / UNIT  # side of what can be one digit
SMALLEST = 8 / UNIT**2  # share of the image below which a region is dirt
NEAR = 1.0  # pixels of 32 between the boxes of parts of one digit
OTHER_HUE = 0.25  # share of a region from which a second hue is a second digit
PAGE, INK = 32, 20  # pixels of a cut-out digit and of its longest side: MNIST's, on a wider page
NOT_A_DIGIT = len(DIGITS)
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Region:
    """A digit to be read: its page f32 [PAGE, PAGE] in [0, 1], and what was measured."""

    page: NDArray[np.float32]
    colour: str
    x: float
    y: float
    width: float
    height: float


def hue(rgb: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hue in degrees and chroma of pixels [..., 3] in [0, 1]."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    y, x = np.sqrt(3) * (green - blue), 2 * red - green - blue
    return np.rad2deg(np.arctan2(y, x)) % 360, rgb.max(-1) - rgb.min(-1)


def nearest_colour(degrees: NDArray[np.float32]) -> NDArray[np.int64]:
    """The index of the colour nearest to each hue."""
    gaps = np.abs(degrees[..., None] - np.array([HUES[c] for c in COLOURS]))
    nearest: NDArray[np.int64] = np.minimum(gaps, 360 - gaps).argmin(-1)
    return nearest


def median_colour(degrees: NDArray[np.float32]) -> str:
    """The colour of the median hue, on the circle: relative to the commonest colour."""
    commonest = np.bincount(nearest_colour(degrees), minlength=len(COLOURS)).argmax()
    middle = HUES[COLOURS[commonest]]
    offset = np.median((degrees - middle + 180) % 360 - 180)
    return COLOURS[int(nearest_colour(np.array([(middle + offset) % 360], np.float32))[0])]


def locate(pixels: NDArray[np.float32]) -> list[Region]:
    """The regions of an image [S, S, 3] in [0, 1] that may be digits."""
    value = pixels.max(-1)
    ink = np.clip((value - np.median(value)) / (1 - float(np.median(value)) + 1e-6), 0, 1)
    degrees, chroma = hue(pixels)
    masks = _merged(_pieces(ink, degrees, chroma, BRIGHTER), degrees)
    return [_region(mask, ink, degrees) for mask in masks]


def _pieces(
    ink: NDArray[np.float32],
    degrees: NDArray[np.float32],
    chroma: NDArray[np.float32],
    thresholds: Sequence[float],
    within: Mask | None = None,
) -> list[Mask]:
    """Connected regions of one hue; one too large for a digit is cut at the next threshold."""
    size, pieces = len(ink), []
    bright = ink > thresholds[0]
    labels, count = ndimage.label(bright if within is None else bright & within, np.ones((3, 3)))
    for number in range(1, count + 1):
        mask: Mask = labels == number
        if max(_extent(mask)) > LONGEST * size and len(thresholds) > 1:
            pieces += _pieces(ink, degrees, chroma, thresholds[1:], mask)
        else:
            pieces += _by_hue(mask, degrees, chroma)
    return [mask for mask in pieces if mask.sum() >= SMALLEST * size**2]


def _by_hue(mask: Mask, degrees: NDArray[np.float32], chroma: NDArray[np.float32]) -> list[Mask]:
    """The region, or its parts if a second hue makes up much of it."""
    colours = nearest_colour(degrees)
    weights = np.bincount(colours[mask], chroma[mask], minlength=len(COLOURS))
    large = np.flatnonzero(weights > OTHER_HUE * weights.sum())
    if len(large) < 2:
        return [mask]
    parts = []
    for colour in large:
        labels, count = ndimage.label(mask & (colours == colour), np.ones((3, 3)))
        parts += [labels == number for number in range(1, count + 1)]
    return parts


def _merged(masks: list[Mask], degrees: NDArray[np.float32]) -> list[Mask]:
    """The regions, those joined that are parts of one digit: of one colour, with boxes that meet.

    Joined, they are still no larger than a digit.
    """
    masks = list(masks)
    for i, j in itertools.combinations(range(len(masks)), 2):
        both = masks[i] | masks[j]
        if (
            _gap(masks[i], masks[j]) <= NEAR * len(degrees) / UNIT
            and max(_extent(both)) <= LONGEST * len(degrees)
            and median_colour(degrees[masks[i]]) == median_colour(degrees[masks[j]])
        ):
            masks[i], masks[j] = np.zeros_like(both), both
    return [mask for mask in masks if mask.any()]


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """Top, left, bottom and right; all 0 of an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _extent(mask: Mask) -> tuple[int, int]:
    top, left, bottom, right = _box(mask)
    return bottom - top, right - left


def _gap(one: Mask, other: Mask) -> float:
    """Pixels between two boxes; infinite if one is empty."""
    if not (one.any() and other.any()):
        return float("inf")
    a, b = _box(one), _box(other)
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3], 0)


def _region(mask: Mask, ink: NDArray[np.float32], degrees: NDArray[np.float32]) -> Region:
    size = len(mask)
    top, left, bottom, right = _box(mask)
    own = np.where(ndimage.binary_dilation(mask), ink, 0)
    y, x = ndimage.center_of_mass(own)
    return Region(
        _page(own[top:bottom, left:right]),
        median_colour(degrees[mask & (ink >= np.median(ink[mask]))]),
        (x + 0.5) / size,
        (y + 0.5) / size,
        (right - left) / size,
        (bottom - top) / size,
    )


def _page(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Ink as MNIST has it: INK pixels long, its centre of mass in the middle of a black page."""
    scale = INK / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    bright = Image.fromarray(np.rint(255 * ink / max(ink.max(), 1e-6)).astype(np.uint8))
    large = np.asarray(bright.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    y, x = ndimage.center_of_mass(large)
    page = np.zeros((PAGE, PAGE), np.float32)
    top = int(np.clip(round(PAGE / 2 - y - 0.5), 0, PAGE - height))
    left = int(np.clip(round(PAGE / 2 - x - 0.5), 0, PAGE - width))
    page[top : top + height, left : left + width] = large
    return page


def _pages(regions: Sequence[Region]) -> Tensor:
    """f32 [k, 3, PAGE, PAGE], as the classifier takes them."""
    pages = np.stack([region.page for region in regions])
    return torch.from_numpy(pages).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class Judge:
    """Reads scenes with a classifier of cut-out digits."""

    reader: Classifier

    @torch.inference_mode()
    def see(self, pixels: Tensor) -> list[list[Item]]:
        """What is in each image f32 [n, 3, S, S]: digit -1 is a region that is none."""
        images = pixels.permute(0, 2, 3, 1).float().numpy()
        found = [locate(image) for image in tqdm(images, desc="judge", leave=False)]
        regions = list(itertools.chain.from_iterable(found))
        if not regions:
            return [[] for _ in found]
        parts = [self.reader(part) for part in _pages(regions).split(500)]
        best = torch.cat(parts).softmax(1).max(1)
        readings = zip(regions, best.indices.tolist(), best.values.tolist(), strict=True)
        items = (
            Item(
                -1 if digit == NOT_A_DIGIT else digit,
                region.colour,
                region.x,
                region.y,
                region.width,
                region.height,
                confidence,
            )
            for region, digit, confidence in readings
        )
        return [list(itertools.islice(items, len(regions))) for regions in found]


def train(scenes: Iterable[Scene], seed: int = 0, epochs: int = 5) -> Judge:
    """A judge whose classifier has read the digits of real training scenes.

    It also learns what is none: parts of digits, and two digits in one place.
    """
    pages, labels = [], []
    for scene in scenes:
        regions = locate(np.float32(1 / 255) * scene.pixels.astype(np.float32))
        for region in regions:
            gaps = [(i.x - region.x) ** 2 + (i.y - region.y) ** 2 for i in scene.items]
            pages.append(region.page)
            labels.append(scene.items[int(np.argmin(gaps))].digit)
    rng = generator(seed, 9)
    real = np.stack(pages)
    every = np.concatenate([real, _spoilt(real, rng)])
    wanted = torch.tensor(labels + [NOT_A_DIGIT] * (len(every) - len(real)))
    pixels = torch.from_numpy(every).unsqueeze(1).expand(-1, 3, -1, -1)
    return Judge(classifier.train(pixels, wanted, NOT_A_DIGIT, epochs=epochs, seed=seed))


def _spoilt(pages: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Pages that show no digit, a fifth as many: a third of one, two in one place, and blots."""
    number = max(1, len(pages) // 15)
    first, second, third = np.split(rng.permutation(len(pages))[: 3 * number], 3)
    third_of = []
    for i in first:
        top, left, bottom, right = _box(pages[i] > 0.1)
        cut = pages[i][top : top + max(2, (bottom - top) // 3), left:right]
        third_of.append(_page(cut) if cut.max() > 0.1 else np.zeros_like(pages[i]))
    pairs = np.maximum(pages[second], np.roll(pages[third], 5, axis=2))
    blots = ndimage.gaussian_filter(rng.random((number, PAGE, PAGE)), (0, 3, 3))
    inside = np.zeros((PAGE, PAGE))
    inside[6:26, 6:26] = 1
    low = blots.min(axis=(1, 2), keepdims=True)
    high = blots.max(axis=(1, 2), keepdims=True)
    blots = np.clip(3 * (blots - low) / (high - low) - 1, 0, 1) * inside
    return np.concatenate([np.stack(third_of), pairs, blots.astype(np.float32)])
