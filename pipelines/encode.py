"""Encode a published data set into verified Arrow shards and a manifest, on Ray.

Interrupt it anywhere and run it again: it goes on from its receipts and gives the same manifest.
On a cluster set RAY_ADDRESS; without, Ray runs on this machine for the length of the job.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not os.environ.get("RAY_ADDRESS"):
    # Read when ray is imported; otherwise it takes the machine's own address for 127.0.0.1, and
    # listens to the whole network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from tqdm import tqdm

from mdm import sources
from mdm.config import doc, fail, parse_cli
from mdm.data import encoding, publish
from mdm.data.encoding import Chunk, Receipt, Recipe
from mdm.data.first_stage import describe
from mdm.data.manifest import Manifest, ManifestError
from mdm.data.storage import Store, StoreError, open_store
from mdm.data.survey import Group, Survey, plan, survey
from mdm.data.tokenizer import Tokenizer
from mdm.sources.record import Unit


@dataclass(frozen=True)
class Flags:
    """Flags of this job."""

    dataset: str = field(metadata={"help": f"published layout: {', '.join(sources.READERS)}"})
    root: str = field(metadata={"help": "folder of the data set as published"})
    split: str = field(metadata={"help": "train, val, ... as the data set names it"})
    tokenizer: str = field(metadata={"help": "SentencePiece .model file"})
    out: str = field(metadata={"help": "where to write: s3://bucket/prefix or a folder"})
    autoencoder: str = doc("", "folder of the frozen autoencoder; text-only data sets need none")
    text_length: int = doc(512, "longest text in tokens, EOS included")
    min_chars: int = doc(2, "captions and replies of fewer characters are dropped")
    shard_rows: int = doc(8192, "about how many examples a shard holds")
    batch_rows: int = doc(64, "examples in a record batch")
    encode_batch: int = doc(64, "pictures the autoencoder takes at once")
    encoder_threads: int = doc(2, "threads of the autoencoder")
    device: str = doc("cpu", "where the autoencoder runs: cpu or cuda")
    decoders: int = doc(0, "groups decoded at a time; 0: one a core")
    unit_bytes: int = doc(256 << 20, "about how much input one reader takes")
    max_bad_share: float = doc(0.5, "stop if more than this share of the records is bad")
    report: str = doc("", "file for the summary, beside printing it")

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; a share is from 0 to 1")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; choose cpu or cuda")


class TooManyBadError(ValueError):
    """The data set is broken, or read wrongly."""


@ray.remote(num_cpus=1, max_retries=3)
def _survey(unit: Unit, key: str, out: str) -> Survey:
    found = survey(unit)
    open_store(out).put(key, json.dumps(found.to_json()).encode())
    return found


@ray.remote(num_cpus=1, max_retries=3)
def _decode(group: Group, recipe: Recipe, tokenizer: str) -> Iterator[Chunk | int]:
    """Each chunk, then how many records it took: the driver reads the number alone."""
    for chunk in encoding.decode_group(group, recipe, Tokenizer(tokenizer)):
        yield chunk
        yield chunk.counts["records"]


class _Encoder:
    def __init__(self, recipe: Recipe, folder: str) -> None:
        import torch

        from mdm.data.autoencoder import Autoencoder

        torch.set_num_threads(recipe.encoder_threads)
        self._recipe = recipe
        self._autoencoder = Autoencoder.load(folder, recipe.device)

    def encode(self, chunk: Chunk) -> Chunk:
        return encoding.encode_chunk(chunk, self._recipe, self._autoencoder)


# No core is set aside for it: it takes turns with the decoders, on one core as well.
_ENCODER: Any = ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3)(_Encoder)


@ray.remote(num_cpus=1, max_retries=3)
def _write(group: Group, recipe: Recipe, out: str, *chunks: Chunk) -> Receipt:
    return encoding.write_group(open_store(out), group, recipe, chunks)


@contextmanager
def _cluster() -> Iterator[None]:
    """Ray: the cluster of RAY_ADDRESS, or a small one of our own on loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(
            num_cpus=os.cpu_count() or 1,
            object_store_memory=300 << 20,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _bounded(
    items: Iterable[Any], start: Callable[[Any], Any], limit: int
) -> Iterator[tuple[Any, Any]]:
    """(item, result) of Ray tasks as they end, never more than `limit` at a time."""
    waiting = deque(items)
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            item = waiting.popleft()
            running[start(item)] = item
        ready, _ = ray.wait(list(running), num_returns=1)
        for ref in ready:
            yield running.pop(ref), ray.get(ref)


def survey_all(units: Sequence[Unit], store: Store, recipe: Recipe, decoders: int) -> list[Survey]:
    """Every unit's survey, from its receipt where there is one."""
    known = store.listing(f"{recipe.work}/survey/")
    found: dict[int, Survey] = {}
    todo = []
    for number in range(len(units)):
        key = f"{recipe.work}/survey/{number:06d}.json"
        if key in known:
            found[number] = Survey.from_json(json.loads(store.get(key)))
        else:
            todo.append((number, key))
    if todo:
        tasks = _bounded(
            todo, lambda at: _survey.remote(units[at[0]], at[1], store.uri), 2 * decoders
        )
        for (number, _), result in tqdm(tasks, "survey", len(todo), unit=" units", leave=False):
            found[number] = result
    return [found[number] for number in range(len(units))]


def load_receipts(store: Store, recipe: Recipe, groups: Sequence[Group]) -> dict[int, Receipt]:
    """Receipts of groups that are done, by group index; one whose shards are gone counts not."""
    known = store.listing(f"{recipe.work}/group/")
    shards = store.listing("shards/") if known else {}
    found = {}
    for group in groups:
        key = f"{recipe.work}/group/{group.index:06d}.json"
        if key in known:
            receipt = Receipt.from_json(json.loads(store.get(key)))
            if all(shards.get(s.key) == s.bytes for s in receipt.shards):
                found[group.index] = receipt
    return found


@dataclass
class _Running:
    group: Group
    chunks: Any  # Ray's generator of references
    parts: list[Any] = field(default_factory=list)
    decoded: bool = False
    encoding: int = 0


class GroupEncoder:
    """Decodes, encodes and writes groups; only references pass through this process."""

    def __init__(self, flags: Flags, recipe: Recipe, decoders: int) -> None:
        self.recipe = recipe
        self.out = flags.out
        self.tokenizer = str(Path(flags.tokenizer).absolute())
        self.decoders = decoders
        self.advance: Callable[[int], object] = lambda _: None
        self._decode = _decode.options(
            num_returns="streaming", _generator_backpressure_num_objects=8
        )
        self._encoder = None
        if recipe.image_size is not None:
            folder = str(Path(flags.autoencoder).absolute())
            self._encoder = _ENCODER.remote(recipe, folder)
        self._decoding: list[_Running] = []
        self._encoding: dict[Any, tuple[_Running, int]] = {}
        self._writing: dict[Any, _Running] = {}

    def run(
        self, groups: Sequence[Group], advance: Callable[[int], object]
    ) -> Iterator[tuple[Group, Receipt]]:
        """Each group with its receipt, as they are done; `advance` hears of records done."""
        self.advance = advance
        waiting = deque(groups)
        while waiting or self._decoding or self._encoding or self._writing:
            # What is being written still fills the object store: do not run far ahead of it.
            while (
                waiting
                and len(self._decoding) < self.decoders
                and len(self._writing) < 2 * self.decoders
            ):
                group = waiting.popleft()
                chunks = self._decode.remote(group, self.recipe, self.tokenizer)
                self._decoding.append(_Running(group, chunks))
            events: list[Any] = [*self._writing, *self._encoding]
            if len(self._encoding) < 8:
                events += [r.chunks for r in self._decoding]
            for event in ray.wait(events, num_returns=1, fetch_local=False)[0]:
                if event in self._writing:
                    yield self._writing.pop(event).group, ray.get(event)
                elif event in self._encoding:
                    run, records = self._encoding.pop(event)
                    run.encoding -= 1
                    self.advance(records)
                    self._write_if_complete(run)
                else:
                    self._next_chunk(next(r for r in self._decoding if r.chunks is event))

    def _next_chunk(self, run: _Running) -> None:
        try:
            chunk, records = next(run.chunks), ray.get(next(run.chunks))
        except StopIteration:
            self._decoding.remove(run)
            run.decoded = True
            self._write_if_complete(run)
            return
        if self._encoder is None:
            run.parts.append(chunk)
            self.advance(records)
        else:
            run.parts.append(self._encoder.encode.remote(chunk))
            run.encoding += 1
            self._encoding[run.parts[-1]] = (run, records)

    def _write_if_complete(self, run: _Running) -> None:
        if run.decoded and not run.encoding:
            self._writing[_write.remote(run.group, self.recipe, self.out, *run.parts)] = run


def make_recipe(flags: Flags, units: Sequence[Unit]) -> Recipe:
    """What these flags and inputs would give; ValueError names what is missing."""
    tokenizer = Tokenizer(flags.tokenizer)
    pictures: dict[str, Any] = {
        "autoencoder_sha256": None,
        "image_size": None,
        "image_grid": None,
        "latent_dim": 0,
    }
    if encoding.has_pictures(units):
        if not flags.autoencoder:
            raise ValueError(f"{flags.dataset} has pictures: --autoencoder is needed")
        autoencoder = describe(flags.autoencoder)
        pictures = {
            "autoencoder_sha256": autoencoder.sha256,
            "image_size": autoencoder.image_size,
            "image_grid": autoencoder.grid,
            "latent_dim": autoencoder.latent_dim,
        }
    return Recipe(
        dataset=flags.dataset,
        split=flags.split,
        inputs_sha256=encoding.inputs_sha256(units),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        text_length=flags.text_length,
        min_chars=flags.min_chars,
        shard_rows=flags.shard_rows,
        batch_rows=flags.batch_rows,
        encode_batch=flags.encode_batch,
        encoder_threads=flags.encoder_threads,
        device=flags.device,
        **pictures,
    )


def check_bad(bad: list[str], total: int, share: float) -> None:
    """TooManyBadError if these reasons are more than `share` of `total` records."""
    if len(bad) > share * total:
        kinds = sorted({b.split(":")[0] for b in bad})
        raise TooManyBadError(
            f"{len(bad)} of {total} records are bad, more than --max_bad_share {share:g} allows: "
            + "; ".join(kinds[:5])
        )


def run(flags: Flags) -> dict[str, Any]:
    """The whole job; its summary."""
    began = time.perf_counter()
    reader = sources.get(flags.dataset)
    root = Path(flags.root)
    units = reader.units(root, flags.split, unit_bytes=flags.unit_bytes)
    names: Callable[[Path], tuple[str, ...]] = getattr(reader, "class_names", lambda _: ())
    class_names = names(root)
    recipe = make_recipe(flags, units)
    store = open_store(flags.out)
    manifest = publish.finished(store, recipe)
    resumed = 0
    lost = [] if manifest is None else publish.missing(store, manifest)
    if lost:
        print(f"{flags.out} lacks {len(lost)} of its objects: writing them again", file=sys.stderr)
        for key in lost:  # one that is cut short would be taken for what is to be written
            store.delete(key)
    if manifest is None or lost:
        with _cluster():
            receipts, resumed = _encode(flags, units, store, recipe)
        manifest = publish.finish(store, recipe, receipts, class_names)
    else:
        print(f"{flags.out} is already encoded with this recipe", file=sys.stderr)
    publish.clean(store, manifest)
    return _summary(flags, manifest, resumed, time.perf_counter() - began)


def _encode(
    flags: Flags, units: Sequence[Unit], store: Store, recipe: Recipe
) -> tuple[list[Receipt], int]:
    """Receipts of all groups in order, and how many of them were there before."""
    decoders = flags.decoders or os.cpu_count() or 1
    encoder = GroupEncoder(flags, recipe, decoders)  # loads its network during the survey
    surveys = survey_all(units, store, recipe, decoders)
    total = sum(len(s) for s in surveys)
    check_bad(["unreadable"] * sum(s.bad for s in surveys), total, flags.max_bad_share)
    groups = plan(units, surveys, recipe.shard_rows)
    done = load_receipts(store, recipe, groups)
    resumed = len(done)
    todo = [g for g in groups if g.index not in done]
    before = sum(r.counts.get("records", 0) for r in done.values())
    title = f"{flags.dataset}/{flags.split}"
    with tqdm(total=total, initial=before, desc=title, unit=" records") as bar:
        for group, receipt in encoder.run(todo, bar.update):
            done[group.index] = receipt
            bad = [q.reason for r in done.values() for q in r.quarantine]
            check_bad(bad, total, flags.max_bad_share)
    return [done[g.index] for g in groups], resumed


def _summary(flags: Flags, manifest: Manifest, resumed: int, seconds: float) -> dict[str, Any]:
    counts = manifest.counts
    return {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "out": flags.out,
        "manifest_sha256": manifest.sha256,
        "recipe_hash": manifest.recipe_hash,
        "examples": manifest.rows,
        "records": counts.get("records", 0),
        "dropped": sum(v for k, v in counts.items() if k.startswith("dropped: ")),
        "quarantined": counts["quarantined"],
        "shards": len(manifest.shards),
        "bytes": sum(s.bytes for s in manifest.shards),
        "resumed_groups": resumed,
        "seconds": round(seconds, 2),
        "samples_per_second": round(manifest.rows / seconds, 1),
    }


def main() -> int:
    """Encode, print the summary as one line of JSON."""
    flags = parse_cli(Flags, description=__doc__)
    try:
        summary = run(flags)
    except (ManifestError, StoreError, ValueError) as error:
        fail(f"encode: {error}")
    except ray.exceptions.RayTaskError as error:
        fail(f"encode: {_root_cause(error)}; run it again to go on from here")
    except ray.exceptions.RayError as error:
        fail(f"encode: Ray failed ({type(error).__name__}); run it again to go on from here")
    except KeyboardInterrupt:
        print("interrupted: run it again to go on from here", file=sys.stderr)
        return 130
    line = json.dumps(summary)
    print(line)
    if flags.report:
        Path(flags.report).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.report).write_text(line + "\n")
    return 0


def _root_cause(error: BaseException) -> str:
    """The innermost error's one line: Ray wraps what happened in a worker, task by task."""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    return f"{str(error).strip().splitlines()[-1]}" if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
