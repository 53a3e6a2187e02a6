"""A trace of chosen steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile

from mdm.utils.ranks import World


def parse_steps(text: str) -> range:
    """`10:13` as the steps 10, 11 and 12, `10` as that step alone, and nothing as none.

    Raises ValueError for what is neither, or holds no step.
    """
    if not text:
        return range(0)
    first, _, end = text.partition(":")
    if not first.isdigit() or (end and not end.isdigit()):
        raise ValueError(f"{text!r} is neither a step nor first:end")
    steps = range(int(first), int(end) if end else int(first) + 1)
    if not steps:
        raise ValueError(f"{text!r} holds no step; {steps.stop} must lie after {steps.start}")
    return steps


class Profile:
    """torch's profiler around `steps`: a trace and a table of this rank in `folder`.

    The trace opens in chrome://tracing and Perfetto. A run that is resumed inside `steps` traces
    what is left of them.
    """

    def __init__(self, steps: range, folder: Path, world: World) -> None:
        self.steps, self.folder, self.world = steps, folder, world
        self._running: profile | None = None
        self._first = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context around step `number`."""
        if number in self.steps and self._running is None:
            self._running = profile(profile_memory=True, record_shapes=True)
            self._first = number
            self._running.__enter__()
        try:
            yield
        finally:
            if self._running is not None and number + 1 >= self.steps.stop:
                self._write(self._running, number)
                self._running = None

    def _write(self, running: profile, last: int) -> None:
        running.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{last}-rank{self.world.rank}"
        running.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=30)
        (self.folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
