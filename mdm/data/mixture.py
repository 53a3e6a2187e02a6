"""Which data sets a run reads, in which shares, from which step on."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdm.config import DataConfig
from mdm.data.manifest import Manifest
from mdm.storage import join

QUOTA_PERIOD = 10_000  # slots in which every share is exact


@dataclass(frozen=True)
class Source:
    """One data set of a mixture, under the name that its sample ids carry."""

    name: str
    manifest: Manifest
    weight: float = 1.0  # in the first mixture stage that reads it

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight of source {self.name!r} is {self.weight}; must be positive")
        if self.manifest.rows == 0:
            raise ValueError(f"source {self.name!r} has no samples ({self.manifest.location})")

    def __hash__(self) -> int:
        return hash((self.name, self.manifest.sha256, self.weight))


@dataclass(frozen=True)
class MixtureStage:
    """The weights from `step` until the next mixture stage; sources not named are not read."""

    step: int
    weights: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """As a loader's state holds it."""
        return {"step": self.step, "weights": dict(self.weights)}


@dataclass(frozen=True)
class Mixture:
    """Data sets and their shares of the samples.

    A step has one task, so tasks share the steps, and the sources of a task share its slots.
    Without `stages` the sources' own weights hold from the first step to the last.
    """

    sources: tuple[Source, ...]
    global_batch: int = 64
    shuffle_window: int = 4  # record batches shuffled together
    stages: tuple[MixtureStage, ...] = ()
    texts_per_row: int = 1  # of a text-only task; above 1 they are packed
    images_per_row: int = 1  # samples of a task with images; above 1 they are packed

    def __post_init__(self) -> None:
        names = [s.name for s in self.sources]
        if not names:
            raise ValueError("a mixture needs at least one source (data.sources is empty)")
        if len(set(names)) != len(names):
            raise ValueError(f"a source is named twice: {names}")
        for name in ("global_batch", "shuffle_window", "texts_per_row", "images_per_row"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not self.stages:
            first = MixtureStage(0, tuple((s.name, s.weight) for s in self.sources))
            object.__setattr__(self, "stages", (first,))
        self._check_stages(names)
        _check_equal(self.sources, "tokenizer_sha256", "vocab_size")
        _check_equal(self.images, "autoencoder_sha256", "image_grid", "latent_dim")

    def _check_stages(self, names: Sequence[str]) -> None:
        steps = [s.step for s in self.stages]
        if steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"stages begin at steps {steps}; they must begin at 0 and increase")
        used = {name for stage in self.stages for name, _ in stage.weights}
        if used != set(names):
            raise ValueError(f"stages read {sorted(used)}, the sources are {sorted(names)}")
        for stage in self.stages:
            for name, weight in stage.weights:
                if weight <= 0:
                    raise ValueError(f"weight of {name!r} from step {stage.step} on is {weight}")

    @property
    def images(self) -> tuple[Source, ...]:
        """The sources with images, of all mixture stages."""
        return tuple(s for s in self.sources if s.manifest.task == "image_text")

    @property
    def tokenizer_sha256(self) -> str:
        """The tokenizer that all sources were encoded with."""
        return self.sources[0].manifest.tokenizer_sha256

    @property
    def autoencoder_sha256(self) -> str | None:
        """The autoencoder that all images were encoded with; None without one."""
        return next((s.manifest.autoencoder_sha256 for s in self.images), None)

    @property
    def image_grid(self) -> tuple[int, int] | None:
        """Rows and columns of image tokens; None without images."""
        return next((s.manifest.image_grid for s in self.images), None)

    def per_row(self, task: str) -> int:
        """Samples of this task a row of the batch; above 1 they are packed."""
        return self.texts_per_row if task == "text" else self.images_per_row

    def slots(self, task: str) -> int:
        """Samples that a step of this task consumes."""
        return self.global_batch * self.per_row(task)

    @cached_property
    def shares(self) -> tuple["Shares", ...]:
        """How each mixture stage shares out its steps and slots."""
        return tuple(Shares(self, stage) for stage in self.stages)

    def stage_at(self, step: int) -> int:
        """Index of the mixture stage that `step` belongs to."""
        return bisect_right([s.step for s in self.stages], step) - 1


def _check_equal(sources: Sequence[Source], *fields: str) -> None:
    for name in fields:
        for source in sources[1:]:
            first, other = (getattr(s.manifest, name) for s in (sources[0], source))
            if first != other:
                raise ValueError(
                    f"{sources[0].name!r} and {source.name!r} cannot be mixed: {name} is {first} "
                    f"and {other}; encode both with the same tokenizer and autoencoder"
                )


class Shares:
    """Exact shares of one mixture stage: of its steps by task, of a task's slots by source."""

    def __init__(self, mixture: Mixture, stage: MixtureStage) -> None:
        weights = dict(stage.weights)
        index = {s.name: i for i, s in enumerate(mixture.sources)}
        # Sorted by name: neither a source that joins later nor another order in the configuration
        # changes the turns.
        named: dict[str, list[str]] = {"image_text": [], "text": []}
        for name in sorted(weights):
            named[mixture.sources[index[name]].manifest.task].append(name)
        self.tasks = tuple(task for task, names in named.items() if names)
        totals = [sum(weights[n] for n in named[t]) for t in self.tasks]
        self.steps = Interleaving(exact_quotas(totals, self.tasks))
        # Task -> indices of its sources in the mixture, and how they take turns.
        self.sources = {t: [index[n] for n in named[t]] for t in self.tasks}
        self.slots = {
            t: Interleaving(exact_quotas([weights[n] for n in named[t]], named[t]))
            for t in self.tasks
        }
        self._mixture = mixture

    def consumed(self, steps: int) -> NDArray[np.int64]:
        """i64 [sources]: samples that the first `steps` steps of the stage consume."""
        count = np.zeros(len(self._mixture.sources), np.int64)
        for task, turns in zip(self.tasks, self.steps.before(steps).tolist(), strict=True):
            slots = turns * self._mixture.slots(task)
            count[self.sources[task]] += self.slots[task].before(slots)
        return count

    def step_of(self, source: int, turn: int) -> int:
        """The step, counted in the stage, that consumes its `turn`-th sample of a source."""
        task = next(t for t in self.tasks if source in self.sources[t])
        slot = self.slots[task].nth(self.sources[task].index(source), turn)
        return self.steps.nth(self.tasks.index(task), slot // self._mixture.slots(task))


class Interleaving:
    """K participants take turns in fixed proportion: exact quotas in every QUOTA_PERIOD turns."""

    def __init__(self, quotas: Sequence[int]) -> None:
        self.quotas = np.array(quotas, np.int64)
        self.pattern = interleave(quotas)  # [QUOTA_PERIOD] whose turn it is
        taken = self.pattern[:, None] == np.arange(len(quotas))
        self.taken = np.concatenate([np.zeros((1, len(quotas)), np.int64), taken.cumsum(0)])

    def turns(self, start: int, stop: int) -> NDArray[np.int64]:
        """i64 [stop - start]: whose turn slots `start` to `stop` are."""
        turns: NDArray[np.int64] = self.pattern[np.arange(start, stop) % QUOTA_PERIOD]
        return turns

    def before(self, slot: int) -> NDArray[np.int64]:
        """i64 [K]: how many turns each participant has before `slot`."""
        periods, within = divmod(slot, QUOTA_PERIOD)
        count: NDArray[np.int64] = periods * self.quotas + self.taken[within]
        return count

    def nth(self, participant: int, turn: int) -> int:
        """The slot of a participant's `turn`-th turn."""
        periods, within = divmod(turn, int(self.quotas[participant]))
        place = int(np.flatnonzero(self.pattern == participant)[within])
        return periods * QUOTA_PERIOD + place


def exact_quotas(weights: Sequence[float], names: Sequence[str]) -> tuple[int, ...]:
    """Integers of sum QUOTA_PERIOD in proportion to `weights`, by largest remainder.

    Raises:
        ValueError: a weight is too small for one turn in QUOTA_PERIOD.
    """
    total = sum(weights)
    ideal = [w * QUOTA_PERIOD / total for w in weights]
    quotas = [int(x) for x in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (quotas[i] - ideal[i], i))
    for i in by_remainder[: QUOTA_PERIOD - sum(quotas)]:
        quotas[i] += 1
    for name, weight, quota in zip(names, weights, quotas, strict=True):
        if quota == 0:
            raise ValueError(
                f"{name!r} has weight {weight} of {total}: less than one in {QUOTA_PERIOD}"
            )
    return tuple(quotas)


def interleave(quotas: Sequence[int]) -> NDArray[np.int64]:
    """i64 [QUOTA_PERIOD]: quota k turns of participant k, spread as evenly as possible."""
    places = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
    owners = np.repeat(np.arange(len(quotas)), quotas)
    turns: NDArray[np.int64] = owners[np.argsort(places, kind="stable")]
    return turns


def open_mixture(config: DataConfig) -> Mixture:
    """The mixture that a run's configuration names.

    Raises:
        ManifestError: a data set is missing or damaged.
        ValueError: the data sets do not fit together.
    """
    stages = [(0, config.sources), *((s.step, s.sources) for s in config.mixture_stages)]
    first: dict[str, float] = {}
    for _, sources in stages:
        for source in sources:
            first.setdefault(source.name, source.weight)
    return Mixture(
        tuple(
            Source(name, Manifest.load(join(config.root, name)), weight)
            for name, weight in first.items()
        ),
        global_batch=config.global_batch,
        shuffle_window=config.shuffle_window,
        stages=tuple(
            MixtureStage(step, tuple((s.name, s.weight) for s in sources))
            for step, sources in stages
            if config.sources
        ),
        texts_per_row=config.texts_per_row,
        images_per_row=config.images_per_row,
    )
