"""The one door to Ray: the stages of the encode job as a graph of tasks with backpressure.

Decoding, the autoencoder and writing each run on their own; only references pass through this
process. A task is retried where its worker died; an error of ours ends the job with its message.
"""

import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

if os.environ.get("RAY_ADDRESS", "127.0.0.1").startswith(("127.", "localhost:")):
    # Read when ray is imported; otherwise it takes the machine's own address for 127.0.0.1: it
    # listens to the whole network, and does not find a Ray that listens on loopback alone.
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

# Chunks under way to each encoder: what it works on, what waits for it, and some more where the
# next chunks come unevenly.
_CHUNKS_AN_ENCODER = 4
_WORTH_SECONDS = 15.0  # of work ahead, for another encoder to be started: that takes seconds
_STARTS = 6  # of a Ray of our own: its 30 s are few where the machine is busy
_LONGEST_NOTE = 300  # characters
_RETRIES = 3  # of work whose process died; a fourth death has a reason that stays


class RayFailedError(RuntimeError):
    """Ray, or a task of the job, failed; the message is one line for the user."""


@dataclass(frozen=True)
class Place:
    """Where workers find what is not in the recipe."""

    out: str
    options: StoreOptions  # of the driver: workers may have another environment
    tokenizer: str
    autoencoder: str


@contextmanager
def _named(units: Sequence[Unit]) -> Iterator[None]:
    """An error that escapes names the record it met, or else the files that were being read."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", []):
            files = ", ".join(name for unit in units for name in unit.files[:1])
            error.add_note(f"at {files}"[:_LONGEST_NOTE])
        raise


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _survey(unit: Unit, key: str, place: Place, near: bool) -> tuple[int, int, float]:
    """Records and bad records of a unit; the rest goes to the store."""
    began = time.process_time()
    with _named([unit]):
        found = survey(unit, near=near)
    put_sealed(open_store(place.out, place.options), key, found.to_bytes())
    return len(found), found.bad, time.process_time() - began


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _decode(group: Group, recipe: Recipe, place: Place) -> Iterator[Chunk | tuple[int, float]]:
    """Each chunk, then how many records and seconds it took: the driver reads these alone."""
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
    store = open_store(place.out, place.options)
    receipt = encoding.write_chunks(store, group, recipe, chunks)
    return receipt, time.process_time() - began


def start_encoder(recipe: Recipe, folder: str) -> Any:
    """An actor that holds the autoencoder. On CPUs no core is set aside for it: it takes turns."""
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

    RayFailedError says what went wrong in a task, or with Ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One failed task ends the job with its message; Ray would print the others' stacks after it.
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
    """Ray gives its own processes 30 s to come up, which a busy machine may not give them."""
    for left in reversed(range(_STARTS)):
        try:
            _connect()
            return
        except RayFailedError as error:
            if not left or os.environ.get("RAY_ADDRESS"):
                raise
            sys.stderr.write(f"{error}; trying again\n")
            ray.shutdown()


def _connect() -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            if not os.access(os.path.expanduser("~"), os.W_OK):  # Ray would keep its token there
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                num_cpus=os.cpu_count() or 1,
                object_store_memory=300 << 20,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=socket_folder(),
                **quiet,
            )
    except Exception as error:  # noqa: BLE001 what Ray raises here has no type of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RayFailedError(f"Ray did not start: {reason}") from None


def address() -> str:
    """Where other jobs find this cluster: a value of RAY_ADDRESS."""
    return str(ray.get_runtime_context().gcs_address)


def cores() -> int:
    """CPUs of the cluster."""
    return max(1, _resource("CPU"))


def _resource(name: str) -> int:
    resources: Any = ray  # untyped there
    return int(resources.cluster_resources().get(name, 0))


def gpus() -> int:
    """GPUs of the cluster; ValueError without any."""
    found = _resource("GPU")
    if not found:
        raise ValueError("--device cuda: Ray sees no GPU here; use --device cpu")
    return found


def _root_cause(error: BaseException) -> str:
    """The innermost error's one line, with the file that it met.

    Ray wraps what happened in a worker, task by task.
    """
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    lines = str(error).strip().splitlines()
    known = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("mdm.")
    said = lines[-1] if lines and known else describe_fully(error)
    return ", ".join([said, *getattr(error, "__notes__", [])])


def survey_units(
    todo: Iterable[tuple[Unit, str]], place: Place, near: bool, limit: int
) -> Iterator[tuple[int, int, float]]:
    """(records, bad records, core seconds) of units as they are surveyed; `limit` at a time."""
    waiting = deque(todo)
    running: set[Any] = set()
    while waiting or running:
        while waiting and len(running) < limit:
            unit, key = waiting.popleft()
            running.add(_survey.remote(unit, key, place, near))
        ready, _ = ray.wait(list(running), num_returns=1)
        for ref in ready:
            running.remove(ref)
            yield ray.get(ref)


@dataclass
class _Running:
    group: Group
    chunks: Any  # Ray's generator of references
    parts: list[Any] = field(default_factory=list)
    decoded: bool = False
    encoding: int = 0


class GroupEncoder:
    """Decodes, encodes and writes groups.

    Each stage is held back by the next one: a decoder stops behind a few chunks that nobody took,
    chunks are taken while the encoders have few, and groups are begun while few are being written.
    `seconds` says what the stages took: of a core, or of the GPU with the autoencoder.

    `start` gives an actor with the autoencoder; None for texts alone. One is started at once, up to
    `encoders` of them where the work ahead is worth it.
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
        self._pending = [0] * len(self._encoders)
        self._decoding: list[_Running] = []
        self._encoding: dict[Any, tuple[_Running, int, int]] = {}
        self._writing: dict[Any, _Running] = {}
        self._advance: Callable[[int], object] = lambda _: None
        self._records = 0  # ahead
        self._pace: tuple[float, int] | None = None  # when the first chunk came back, records then

    def run(
        self, groups: Sequence[Group], records: int, advance: Callable[[int], object]
    ) -> Iterator[tuple[Group, Receipt]]:
        """Each group with its receipt, as they are done; `advance` hears of records done.

        `records` of them lie in the groups.
        """
        self._advance, self._records = advance, records
        waiting = deque(groups)
        while waiting or self._decoding or self._encoding or self._writing:
            # What is being written still fills the object store: do not run far ahead of it.
            while (
                waiting
                and len(self._decoding) < self.decoders
                and len(self._writing) < self.decoders
            ):
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
                    run, records, at = self._encoding.pop(event)
                    self._pending[at] -= 1
                    run.encoding -= 1
                    self._done(records)
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
            self._done(records)
            return
        at = self._pending.index(min(self._pending))
        run.parts.append(self._encoders[at].encode.remote(chunk))
        run.encoding += 1
        self._pending[at] += 1
        self._encoding[run.parts[-1]] = (run, records, at)

    def _done(self, records: int) -> None:
        self._records -= records
        self._advance(records)

    def _add_encoders(self) -> None:
        """Start those that the work ahead is worth, told from the pace of the first one."""
        missing = self._most - len(self._encoders)
        if not missing or self._start is None:
            return
        if self._pace is None:  # before, it loaded its network
            self._pace = time.perf_counter(), self._records
            return
        since, before = self._pace
        if (done := before - self._records) <= 0:
            return
        seconds = self._records * (time.perf_counter() - since) / done
        wanted = min(missing, int(seconds / _WORTH_SECONDS))
        self._encoders += [self._start() for _ in range(wanted)]
        self._pending += [0] * wanted

    def _write_if_complete(self, run: _Running) -> None:
        if run.decoded and not run.encoding:
            ref = _write.remote(run.group, self.recipe, self.place, *run.parts)
            self._writing[ref] = run
