"""Metrics of generated images over the features of an independent classifier.

Shapes: n images, d feature dimensions (at most 64, so that covariances of a few hundred images
are full rank). Read every distance beside its floor: the same number between two sets of real
images of the same size.
"""

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
Labels = NDArray[np.int64]


def agreement(predicted: Labels, targets: Labels) -> float:
    """Share of images that the classifier assigns to the class they were drawn for."""
    return float(np.mean(predicted == targets))


def shuffled_control(predicted: Labels, targets: Labels, *, seed: int) -> float:
    """`agreement` with permuted target classes: the score of ignoring the condition.

    The mean over 20 permutations; about 0.1 for ten balanced classes.
    """
    rng = np.random.default_rng(seed)
    return float(np.mean([agreement(predicted, rng.permutation(targets)) for _ in range(20)]))


def class_shares(predicted: Labels, n_classes: int) -> NDArray[np.float64]:
    """Share of the images in each class, f64 [n_classes]; shows collapse onto few classes.

    Predictions outside `0 … n_classes - 1` (no class) count in the total but in no share.
    """
    inside = predicted[(predicted >= 0) & (predicted < n_classes)]
    counts = np.bincount(inside, minlength=n_classes).astype(np.float64)
    return counts / max(predicted.size, 1)


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance of the Gaussians fitted to `a [n, d]` and `b [m, d]` (Heusel et al. 2017).

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½). It decreases with the number of images: compare
    only at equal n, of at least 2.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    # tr (Σ_a Σ_b)^½ = Σ sqrt(eigenvalues of Σ_a^½ Σ_b Σ_a^½), symmetric: no complex square root.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    shared = float(np.sqrt(np.clip(cross, 0.0, None)).sum())
    gap = float(np.sum((mean_a - mean_b) ** 2))
    return max(gap + float(np.trace(cov_a) + np.trace(cov_b)) - 2.0 * shared, 0.0)


def _mmd2(a: Features, b: Features) -> float:
    # Unbiased MMD² with k(x, y) = (xᵀy / d + 1)³.
    d = a.shape[1]
    aa, bb, ab = ((x @ y.T / d + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within_a + within_b - 2.0 * ab.mean())


def kernel_distance(a: Features, b: Features, *, seed: int) -> float:
    """Kernel Inception distance (Bińkowski et al. 2018): mean unbiased MMD² over random subsets.

    Cubic polynomial kernel over `a [n, d]` and `b [m, d]`, in 50 subsets of 200 rows. Unbiased: its
    expectation is 0 for two samples of one distribution at any size, so it may be slightly
    negative.
    """
    size = min(200, len(a), len(b))
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(50):
        rows_a = rng.choice(len(a), size, replace=False)
        rows_b = rng.choice(len(b), size, replace=False)
        distances.append(_mmd2(a[rows_a], b[rows_b]))
    return float(np.mean(distances))


def _distances(a: Features, b: Features) -> NDArray[np.float64]:
    # |x - y|² = |x|² + |y|² - 2 xᵀy; rounding may leave tiny negatives.
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2.0 * (a @ b.T)
    roots: Features = np.sqrt(np.clip(squares, 0.0, None))
    return roots


def _covered(points: Features, support: Features, k: int) -> float:
    # A point is covered if it lies within the k-nearest-neighbour radius of any support point.
    if len(support) <= k:
        raise ValueError(f"{len(support)} images have no {k} nearest neighbours")
    radii = np.sort(_distances(support, support), axis=1)[:, k]  # column 0 is the point itself
    return float(np.mean((_distances(points, support) <= radii[None, :]).any(1)))


def precision_recall(real: Features, generated: Features, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) with k nearest neighbours.

    Precision: share of `generated` within the manifold of `real`; recall: share of `real` within
    the manifold of `generated`, which a collapsed generator cannot cover. Compare at equal n.
    """
    return _covered(generated, real, k), _covered(real, generated, k)


def _nearest_distance(points: Features, train: Features) -> float:
    # The median over `points`, which are compared in blocks: all distances would fill the memory.
    blocks = [_distances(points[i : i + 256], train).min(1) for i in range(0, len(points), 256)]
    return float(np.median(np.concatenate(blocks)))


def nn_distance_ratio(generated: Features, heldout: Features, train: Features) -> float:
    """Median distance generated → train over median distance held-out → train.

    About 1: as far from the training images as new real ones are; near 0: copies of them. All three
    must be decoded by the autoencoder, or its blur distorts the ratio. Raises ValueError if half of
    the held-out images are training images.
    """
    base = _nearest_distance(heldout, train)
    if base == 0.0:
        raise ValueError("half of the held-out images are training images: not held out")
    return _nearest_distance(generated, train) / base
