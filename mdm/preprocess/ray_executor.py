"""The one door to Ray: the job stages of encoding as a graph of tasks with backpressure.

Decoding, the autoencoder and writing run independently; only references pass through this process.
A task is retried if its worker died; an error of our own ends the job with its message.
"""

import logging
import os
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

if os.environ.get("RAY_ADDRESS", "127.0.0.1").startswith(("127.", "localhost:")):
    # Read when ray is imported. Otherwise it replaces 127.0.0.1 by the machine's own address: it
    # listens to the whole network and does not find a Ray that listens on loopback alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray

from mdm.first_stage.tokenizer import Tokenizer
from mdm.preprocess import encoding
from mdm.preprocess.encoding import Chunk
from mdm.preprocess.receipt import Receipt, put_sealed
from mdm.preprocess.recipe import Recipe
from mdm.preprocess.survey import Group, survey
from mdm.sources.record import Unit, describe_fully
from mdm.storage import StoreOptions, open_store
from mdm.utils.sockets import socket_folder

log = logging.getLogger("mdm")

# Chunks in flight to each encoder: the one it works on, those that wait for it, and a few more
# because chunks arrive unevenly.
_CHUNKS_AN_ENCODER = 4
_WORTH_SECONDS = 15.0  # of remaining work that justify another encoder, which starts in seconds
_STARTS = 6  # attempts to start a Ray of our own: a busy machine may take longer than its 30 s
_LONGEST_NOTE = 300  # characters
_RETRIES = 3  # of work whose process died; a fourth death has a lasting cause


class RayFailedError(RuntimeError):
    """Ray, or a task of the job, failed; the message is one line for the user."""


@dataclass(frozen=True)
class Place:
    """What workers need beside the recipe."""

    out: str
    options: StoreOptions  # of the driver: workers may have a different environment
    tokenizer: str
    autoencoder: str


@contextmanager
def _named(units: Sequence[Unit]) -> Iterator[None]:
    """Notes in an error the files that were being read, unless it names its record."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", []):
            files = ", ".join(name for unit in units for name in unit.files[:1])
            error.add_note(f"at {files}"[:_LONGEST_NOTE])
        raise


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _survey(unit: Unit, key: str, place: Place, near: bool) -> float:
    """Puts the survey of a unit into the store; returns the seconds it took."""
    began = time.process_time()
    with _named([unit]):
        surveyed = survey(unit, near=near)
    put_sealed(open_store(place.out, place.options), key, surveyed.to_bytes())
    return time.process_time() - began


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _decode(group: Group, recipe: Recipe, place: Place) -> Iterator[Chunk | tuple[int, float]]:
    """Each chunk, then its number of records and seconds: the driver reads only these."""
    began = time.process_time()
    tokenizer = Tokenizer(place.tokenizer)
    with _named(group.units):
        for chunk in encoding.decode_group(group, recipe, tokenizer):
            seconds = time.process_time() - began
            yield chunk
            yield chunk.counts["records"], seconds
            began = time.process_time()


class _Encoder:
    def __init__(self, recipe: Recipe, folder: str) -> None:
        import torch

        from mdm.first_stage.autoencoder import Autoencoder

        torch.set_num_threads(recipe.encoder_threads)
        self._recipe = recipe
        self._autoencoder = Autoencoder.load(folder, recipe.device)
        self._busy = 0.0
        self._clock = time.process_time if recipe.device == "cpu" else time.perf_counter

    def encode(self, chunk: Chunk) -> Chunk:
        began = self._clock()
        try:
            return encoding.encode_chunk(chunk, self._recipe, self._autoencoder)
        finally:
            self._busy += self._clock() - began

    def busy(self) -> float:
        """Seconds spent encoding."""
        return self._busy


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _write(group: Group, recipe: Recipe, place: Place, *chunks: Chunk) -> tuple[Receipt, float]:
    began = time.process_time()
    receipt = encoding.write_chunks(open_store(place.out, place.options), group, recipe, chunks)
    return receipt, time.process_time() - began


def start_encoder(recipe: Recipe, folder: str) -> Any:
    """An actor that holds the autoencoder. On CPUs it reserves no core but competes for one."""
    remote = ray.remote(
        num_cpus=0,
        num_gpus=1 if recipe.device == "cuda" else 0,
        max_restarts=_RETRIES,
        max_task_retries=_RETRIES,
    )
    return remote(_Encoder).remote(recipe, folder)


@contextmanager
def cluster() -> Iterator[None]:
    """Ray: the cluster of RAY_ADDRESS, or a small one of our own on loopback.

    Raises:
        RayFailedError: a task or Ray itself failed; the message says how.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One failed task ends the job with its message; Ray would print the stacks of others after it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _start()
        yield
    except ray.exceptions.RayTaskError as error:
        raise RayFailedError(_root_cause(error)) from None
    except ray.exceptions.RayError as error:
        raise RayFailedError(f"Ray failed ({type(error).__name__})") from None
    finally:
        ray.shutdown()


def _start() -> None:
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    attempts = 1
    if not os.environ.get("RAY_ADDRESS"):
        attempts = _STARTS
        if not os.access(os.path.expanduser("~"), os.W_OK):  # Ray would keep its token there
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {
            "num_cpus": os.cpu_count() or 1,
            "object_store_memory": 300 << 20,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": socket_folder(),
        }
    for attempt in range(1, attempts + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # noqa: BLE001 - what Ray raises here has no type of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if attempt < attempts:
            log.warning("Ray did not start: %s; trying again", reason)
            ray.shutdown()
    raise RayFailedError(f"Ray did not start: {reason}")


def address() -> str:
    """Where other jobs find this cluster: a value of RAY_ADDRESS."""
    return str(ray.get_runtime_context().gcs_address)


def resource(name: str) -> int:
    """Number of `CPU` or `GPU` of the cluster."""
    untyped: Any = ray
    return int(untyped.cluster_resources().get(name, 0))


def _root_cause(error: BaseException) -> str:
    """One line on the innermost error, and its file; Ray wraps an error once a task."""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    lines = str(error).strip().splitlines()
    known = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("mdm.")
    reason = lines[-1] if lines and known else describe_fully(error)
    return ", ".join([reason, *getattr(error, "__notes__", [])])


def survey_units(
    todo: Iterable[tuple[Unit, str]], place: Place, near: bool, limit: int
) -> Iterator[float]:
    """Surveys units and puts the results under their keys, `limit` at a time.

    Yields the core seconds of each unit when it is done.
    """
    waiting = deque(todo)
    running: set[Any] = set()
    while waiting or running:
        while waiting and len(running) < limit:
            unit, key = waiting.popleft()
            running.add(_survey.remote(unit, key, place, near))
        ready, _ = ray.wait(list(running), num_returns=1)
        running.difference_update(ready)
        yield from ray.get(ready)


@dataclass
class _Running:
    group: Group
    chunks: Any  # Ray's generator of references
    parts: list[Any] = field(default_factory=list)
    encoding: int = 0
    decoded: bool = False


class GroupEncoder:
    """Decodes, encodes and writes groups, each job stage held back by the next one.

    A decoder stops behind a few chunks that were not taken, chunks are taken while encoders have
    few, and groups are begun while few are being written. `seconds` sums up each job stage: core
    seconds, for an autoencoder on a GPU the GPU's.

    `start` returns an actor with the autoencoder; None for text alone. One is started at once, up
    to `encoders` of them if the remaining work is worth it.
    """

    def __init__(
        self,
        recipe: Recipe,
        place: Place,
        decoders: int,
        start: Callable[[], Any] | None = None,
        encoders: int = 1,
    ) -> None:
        self.recipe = recipe
        self.place = place
        self.decoders = decoders
        self.seconds: dict[str, float] = dict.fromkeys(("survey", "decode", "encode", "write"), 0.0)
        self._decode = _decode.options(
            num_returns="streaming", _generator_backpressure_num_objects=8
        )
        self._start = start
        self._most = encoders
        self._encoders = [start()] if start is not None else []
        self._decoding: list[_Running] = []
        self._encoding: dict[Any, tuple[_Running, int, int]] = {}  # group, records, which encoder
        self._writing: dict[Any, _Running] = {}
        self._advance: Callable[[int], object] = lambda _: None
        self._records = 0  # that remain
        self._pace: tuple[float, int] | None = None  # time of the first chunk, records then

    def run(
        self, groups: Sequence[Group], records: int, advance: Callable[[int], object]
    ) -> Iterator[tuple[Group, Receipt]]:
        """Encodes groups of `records` records; yields each with its receipt when it is done.

        `advance` is called with the number of records of each finished chunk.
        """
        self._advance, self._records = advance, records
        waiting = deque(groups)
        while waiting or self._decoding or self._encoding or self._writing:
            # Chunks being written still fill the object store: do not run far ahead of them.
            while waiting and max(len(self._decoding), len(self._writing)) < self.decoders:
                group = waiting.popleft()
                chunks = self._decode.remote(group, self.recipe, self.place)
                self._decoding.append(_Running(group, chunks))
            events: list[Any] = [*self._writing, *self._encoding]
            most = _CHUNKS_AN_ENCODER * len(self._encoders)
            if not self._encoders or len(self._encoding) < most:
                events += [r.chunks for r in self._decoding]
            for event in ray.wait(events, num_returns=1, fetch_local=False)[0]:
                if event in self._writing:
                    group = self._writing.pop(event).group
                    receipt, seconds = ray.get(event)
                    self.seconds["write"] += seconds
                    yield group, receipt
                elif event in self._encoding:
                    run, records, _ = self._encoding.pop(event)
                    run.encoding -= 1
                    self._finish(records)
                    self._add_encoders()
                    self._write_if_complete(run)
                else:
                    self._next_chunk(next(r for r in self._decoding if r.chunks is event))
        self.seconds["encode"] += sum(ray.get([e.busy.remote() for e in self._encoders]))

    def _next_chunk(self, run: _Running) -> None:
        try:
            chunk, (records, seconds) = next(run.chunks), ray.get(next(run.chunks))
        except StopIteration:
            self._decoding.remove(run)
            run.decoded = True
            self._write_if_complete(run)
            return
        self.seconds["decode"] += seconds
        if not self._encoders:
            run.parts.append(chunk)
            self._finish(records)
            return
        load = Counter(encoder for *_, encoder in self._encoding.values())
        idlest = min(range(len(self._encoders)), key=lambda encoder: load[encoder])
        run.parts.append(self._encoders[idlest].encode.remote(chunk))
        run.encoding += 1
        self._encoding[run.parts[-1]] = (run, records, idlest)

    def _finish(self, records: int) -> None:
        self._records -= records
        self._advance(records)

    def _add_encoders(self) -> None:
        """Starts as many as the remaining work is worth at the pace of the first one."""
        missing = self._most - len(self._encoders)
        if not missing or self._start is None:
            return
        if self._pace is None:  # until now it was loading its network
            self._pace = time.perf_counter(), self._records
            return
        since, before = self._pace
        if (done := before - self._records) <= 0:
            return
        seconds = self._records * (time.perf_counter() - since) / done
        wanted = min(missing, int(seconds / _WORTH_SECONDS))
        self._encoders += [self._start() for _ in range(wanted)]

    def _write_if_complete(self, run: _Running) -> None:
        if run.decoded and not run.encoding:
            ref = _write.remote(run.group, self.recipe, self.place, *run.parts)
            self._writing[ref] = run
