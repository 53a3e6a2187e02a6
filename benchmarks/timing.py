"""Timing side by side: contestants run in turn, so that a busy machine slows all of them down."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

THREADS = 1  # for torch; the other core is left to other processes


@dataclass(frozen=True)
class Result:
    """The result of a benchmark; a `ratio` above 1 means that ours is better than the best peer."""

    name: str
    unit: str
    ours: float
    peers: dict[str, float]
    setting: str
    floor: float | None = None  # a bound, such as the time of the matrix products alone
    lower_is_better: bool = True
    cases: list["Result"] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How much better ours is than the best peer."""
        if self.lower_is_better:
            return min(self.peers.values()) / self.ours
        return self.ours / max(self.peers.values())

    def to_dict(self) -> dict[str, Any]:
        """The content of `runs/bench/<name>.json`."""
        plain = asdict(self) | {"ratio": self.ratio}
        plain["cases"] = [case.to_dict() for case in self.cases]
        return {key: value for key, value in plain.items() if value not in (None, [], {})}

    def line(self) -> str:
        """One line of text."""
        peers = ", ".join(f"{name} {value:.4g}" for name, value in self.peers.items())
        floor = "" if self.floor is None else f", floor {self.floor:.4g}"
        return (
            f"{self.name} [{self.setting}]: {self.ours:.4g} {self.unit} "
            f"(peers: {peers}{floor}), ratio {self.ratio:.2f}"
        )


def worst(name: str, measured: Iterable[Result]) -> Result:
    """The result of a benchmark with several cases: its least favourable case, and all of them.

    Prints each case as soon as it is measured.
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
    """The median time of a call of each contestant; they take turns, after two warm-up calls each.

    Args:
        contestants: the functions to call, by name.
        seconds: when to stop, once each has had its `least` calls.
        least: the minimum number of calls of each.

    Returns:
        Milliseconds by name.
    """
    for call in contestants.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_floor(
    products: list[tuple[int, int, int, int]], dtype: torch.dtype
) -> Callable[[], None]:
    """Only the matrix products, (batch, m, k, n) each: forward and its two gradients."""
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
