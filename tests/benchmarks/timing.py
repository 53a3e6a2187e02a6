"""Timing side by side: every contestant runs in turn, so that a busy moment hits all of them."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

THREADS = 1  # of torch; the other core is left to whatever else runs


@dataclass(frozen=True)
class Result:
    """What a benchmark found; `ratio` above 1 means that we are better than the best peer."""

    name: str
    unit: str
    ours: float
    peers: dict[str, float]
    setting: str
    floor: float | None = None  # the least that the work could take
    lower_is_better: bool = True
    cases: list["Result"] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Ours against the best peer."""
        if self.lower_is_better:
            return min(self.peers.values()) / self.ours
        return self.ours / max(self.peers.values())

    def to_dict(self) -> dict[str, Any]:
        """As `runs/bench/<name>.json` holds it."""
        plain = asdict(self) | {"ratio": self.ratio}
        plain["cases"] = [case.to_dict() for case in self.cases]
        return {key: value for key, value in plain.items() if value not in (None, [], {})}

    def line(self) -> str:
        """One line for people."""
        peers = ", ".join(f"{name} {value:.4g}" for name, value in self.peers.items())
        floor = "" if self.floor is None else f", floor {self.floor:.4g}"
        return (
            f"{self.name} [{self.setting}]: {self.ours:.4g} {self.unit} "
            f"(peers: {peers}{floor}), ratio {self.ratio:.2f}"
        )


def worst(name: str, measured: Iterable[Result]) -> Result:
    """A benchmark's headline: its least favourable case, with all of them below it.

    Each is printed as it comes.
    """
    cases = []
    for case in measured:
        print("  " + case.line(), flush=True)
        cases.append(case)
    least = min(cases, key=lambda case: case.ratio)
    return Result(
        name,
        least.unit,
        least.ours,
        least.peers,
        f"the worst of {len(cases)} cases: {least.setting}",
        least.floor,
        least.lower_is_better,
        cases,
    )


def milliseconds(
    contestants: dict[str, Callable[[], object]], seconds: float = 6.0, least: int = 5
) -> dict[str, float]:
    """Median time of one call of each, in turn, after two calls that do not count.

    Args:
        contestants: what to call, by name.
        seconds: how long all of them together may take, once each has its `least` calls.
        least: calls of each at least.

    Returns:
        Milliseconds by name.
    """
    for call in contestants.values():
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            taken[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return {name: statistics.median(times) for name, times in taken.items()}


def matmul_floor(
    products: list[tuple[int, int, int, int]], dtype: torch.dtype
) -> Callable[[], None]:
    """The same matrix products alone: (batch, m, k, n) each, forward and its two gradients."""
    operands = [
        (
            torch.randn(b, m, k).to(dtype),
            torch.randn(b, k, n).to(dtype),
            torch.randn(b, m, n).to(dtype),
        )
        for b, m, k, n in products
    ]

    def run() -> None:
        for left, right, grad in operands:
            torch.bmm(left, right)
            torch.bmm(grad, right.transpose(1, 2))
            torch.bmm(left.transpose(1, 2), grad)

    return run
