"""Which data sets a run reads, in which shares."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdm.config import DataConfig
from mdm.data.manifest import Manifest
from mdm.data.storage import join

QUOTA_BLOCK = 10_000  # slots within which every share is exact


@dataclass(frozen=True)
class Source:
    """One data set of a mixture, under the name that its sample ids carry."""

    name: str
    manifest: Manifest
    weight: float

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight of source {self.name!r} is {self.weight}; must be positive")
        if self.manifest.rows == 0:
            raise ValueError(f"source {self.name!r} has no samples ({self.manifest.location})")

    def __hash__(self) -> int:
        return hash((self.name, self.manifest.sha256, self.weight))


@dataclass(frozen=True)
class Mixture:
    """Data sets and their shares of the samples.

    A step has one task, so the tasks share the steps and the sources of a task share its slots.
    """

    sources: tuple[Source, ...]
    global_batch: int = 64
    window: int = 4  # record batches shuffled together

    def __post_init__(self) -> None:
        names = [s.name for s in self.sources]
        if not names:
            raise ValueError("a mixture needs at least one source (data.sources is empty)")
        if len(set(names)) != len(names):
            raise ValueError(f"a source is named twice: {names}")
        for name, value in (("global_batch", self.global_batch), ("window", self.window)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be positive")
        for what in ("tokenizer_sha256", "vocab_size"):
            self._same(what, self.sources)
        pictures = [s for s in self.sources if s.manifest.task == "image_text"]
        for what in ("autoencoder_sha256", "image_grid", "latent_dim"):
            self._same(what, pictures)

    @staticmethod
    def _same(what: str, sources: Sequence[Source]) -> None:
        for source in sources[1:]:
            first, other = (getattr(s.manifest, what) for s in (sources[0], source))
            if first != other:
                raise ValueError(
                    f"{sources[0].name!r} and {source.name!r} cannot be mixed: {what} is {first} "
                    f"and {other}; encode both with the same tokenizer and autoencoder"
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that occur, in a fixed order."""
        found = {s.manifest.task for s in self.sources}
        return tuple(t for t in ("image_text", "text") if t in found)

    @property
    def task_quotas(self) -> tuple[int, ...]:
        """Steps of each task in QUOTA_BLOCK."""
        return exact_quotas(
            [sum(s.weight for s in self.sources if s.manifest.task == t) for t in self.tasks],
            list(self.tasks),
        )

    def quotas(self, indices: Sequence[int]) -> tuple[int, ...]:
        """Slots in QUOTA_BLOCK of each of these sources, which share one task's slots."""
        own = [self.sources[i] for i in indices]
        return exact_quotas([s.weight for s in own], [s.name for s in own])


def exact_quotas(weights: Sequence[float], names: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers of sum QUOTA_BLOCK in proportion to `weights`, by largest remainder."""
    total = sum(weights)
    ideal = [w * QUOTA_BLOCK / total for w in weights]
    quotas = [int(x) for x in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (quotas[i] - ideal[i], i))
    for i in by_remainder[: QUOTA_BLOCK - sum(quotas)]:
        quotas[i] += 1
    for name, weight, quota in zip(names, weights, quotas, strict=True):
        if quota == 0:
            raise ValueError(
                f"{name!r} has weight {weight} of {total}: less than one in {QUOTA_BLOCK}"
            )
    return tuple(quotas)


def interleave(quotas: Sequence[int]) -> NDArray[np.int64]:
    """[QUOTA_BLOCK] turns, quota k of k, each spread as evenly as can be."""
    places = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
    owners = np.repeat(np.arange(len(quotas)), quotas)
    turns: NDArray[np.int64] = owners[np.argsort(places, kind="stable")]
    return turns


def open_mixture(config: DataConfig) -> Mixture:
    """The mixture that a run's configuration names; ManifestError if a data set is missing."""
    return Mixture(
        tuple(
            Source(s.name, Manifest.load(join(config.root, s.name)), s.weight)
            for s in config.sources
        ),
        global_batch=config.global_batch,
        window=config.window,
    )
