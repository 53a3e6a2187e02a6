"""Drills of the data system: encode and load under faults, against a real S3 server."""

import logging
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mdm.config import DataConfig, SourceConfig
from mdm.data.batch import Batch
from mdm.data.loader import Loader
from mdm.data.manifest import Manifest
from mdm.data.mixture import open_mixture
from mdm.data.reader import open_cache
from mdm.storage import StoreError, open_store
from mdm.storage.server import S3Server
from tests.data_sets import encoded
from tests.drills.drill import Row, Setting
from tests.drills.loader_life import SEED, Step, walk
from tests.drills.runbook import execute
from tests.faults.encode_job import (
    Job,
    check_complete,
    count_receipts,
    error_line,
    result_of,
    wait_for,
)
from tests.faults.faults import TARGETS, environment, kill, wrong_clock
from tests.faults.proxy import KINDS, FaultProxy
from tests.unit.data.test_elastic import FIRST, LATER, RANKS, SETTINGS, check, data

SHARES = (0.01, 0.1)
LAST_STEP = 60  # of the loader runs
ATTEMPTS = 8  # at most, of a job that is rerun after each failure
QUICK = ("503", "reset", "truncate", "flip")  # each stall costs a client timeout of 20 s


class EncodeBench:
    """A real S3 server and an encode job, with the result and duration of an undisturbed run."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.server = stack.enter_context(S3Server(folder / "s3", bucket="drill"))
        stack.enter_context(environment(self.server.env))
        self.job = Job(folder / "job")
        began = time.monotonic()
        code, self.summary, stderr = self.job.run("s3://drill/undisturbed")
        assert code == 0, stderr
        self.seconds = time.monotonic() - began
        self.sha256: str = self.summary["manifest_sha256"]

    def finish(self, out: str, first: tuple[int, dict[str, Any], str], **run: Any) -> str:
        """Rerun the job until it succeeds, as an operator would, then check the output.

        Returns a note for the report: how often the job was started, if more than once.
        """
        code, _, stderr = first
        attempts = 1
        while code and attempts < ATTEMPTS:
            code, _, stderr = self.job.run(out, **run)
            attempts += 1
        assert code == 0, stderr
        check_complete(out, self.sha256)
        return "" if attempts == 1 else f"started {attempts} times"


def encode_network(setting: Setting) -> Iterator[Row]:
    """Encode through a network that corrupts 1 % and 10 % of the requests."""
    with ExitStack() as stack:
        bench = EncodeBench(setting.folder, stack)
        cases = [(s, QUICK) for s in SHARES] + [(0.1, (k,)) for k in QUICK] + [(0.02, ("stall",))]
        for number, (share, kinds) in enumerate(cases):
            out = f"s3://drill/network-{number}"
            with FaultProxy(bench.server.port, share, kinds, setting.seed + number) as proxy:
                began = time.monotonic()
                env = {"AWS_ENDPOINT_URL": proxy.endpoint}
                note = bench.finish(out, bench.job.run(out, env=env), env=env)
                spent = time.monotonic() - began - bench.seconds
                count = sum(proxy.injected.values())
            what = f"encode, {share:.0%} {kinds[0] if len(kinds) == 1 else 'all quick kinds'}"
            yield Row(what, count, count, 0, True, max(0.0, spent), note)


def loader_network(setting: Setting) -> Iterator[Row]:
    """Load through such a network: batches equal those of an undisturbed loader bit for bit."""
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(setting.folder / "s3", bucket="drill"))
        stack.enter_context(environment(server.env))
        config = write_mixture("s3://drill/loading")
        expected = list(load(config, setting, 40))
        for kind in KINDS:
            for share in SHARES if kind != "stall" else (0.02,):
                with (
                    FaultProxy(server.port, share, [kind], setting.seed) as proxy,
                    environment({"AWS_ENDPOINT_URL": proxy.endpoint}),
                ):
                    began = time.monotonic()
                    loaded = list(load(config, setting, 40))
                    spent = time.monotonic() - began
                    count = sum(proxy.injected.values())
                equal = all(equal_batches(a, b) for a, b in zip(expected, loaded, strict=True))
                yield Row(f"loading, {share:.0%} {kind}", count, count, 0, equal, spent)


def write_mixture(root: str, times: int = 1) -> DataConfig:
    """Two encoded data sets of about `times` x 100 kB each.

    Their record batches are small, so that loading makes many requests: one for each.
    """
    encoded(f"{root}/images", [200 * times, 160 * times], batch_rows=8 * times)
    encoded(f"{root}/talk", [120 * times], images=False, batch_rows=8 * times)
    sources = (SourceConfig("images", 0.7), SourceConfig("talk", 0.3))
    return DataConfig(root=root, sources=sources, global_batch=16, shuffle_window=2)


def load(config: DataConfig, setting: Setting, steps: int) -> Iterator[Batch]:
    """The first `steps` batches; after a clear error, a new loader resumes from the last state."""
    state: dict[str, Any] = {}
    done = failures = 0
    while done < steps:
        try:
            mixture = open_mixture(config)
            options = {"caption_length": 8, "dialogue_length": 10, "cache_bytes": 1, "prefetch": 1}
            options |= {"node_cache": open_cache(mixture, config) if config.cache_dir else None}
            with Loader(mixture, setting.seed, **options) as loader:  # type: ignore[arg-type]
                if state:
                    loader.load_state_dict(state)
                while done < steps:
                    yield next(loader)
                    state, done = loader.state_dict(), done + 1
        except (StoreError, ValueError):
            failures += 1
            if failures > 50:
                raise


def equal_batches(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal bit for bit."""
    if one.ids != other.ids or (one.latents is None) != (other.latents is None):
        return False
    names = ("keys", "epochs", "class_ids", "tokens", "prompt")
    pairs = [(getattr(one, n), getattr(other, n)) for n in names]
    pairs += [] if one.latents is None else [(one.latents, other.latents)]
    return all(torch.equal(a, b) for a, b in pairs)


def loader_kills(setting: Setting) -> Iterator[Row]:
    """Kill loading at random times, and resume with other numbers of ranks and threads."""
    root = str(setting.folder / "encoded")
    write_sets(root)
    for per_row, what in ((1, "padded"), (3, "packed")):
        rng = setting.random(f"loader_kills {what}")
        full = data(root, per_row)
        expected = walk(full, 1, None, LAST_STEP)
        check(full, [step.parts for step in expected], expected[-1].state)
        kills, equal, began = 0, True, time.monotonic()
        while kills < setting.rounds:
            steps, ranks = list[Step](), rng.choice(RANKS)
            while len(steps) < LAST_STEP:
                # The later mixture stage is configured only once its first step is reached.
                staged = len(steps) >= LATER.step
                count = rng.randint(1, (LAST_STEP if staged else LATER.step) - len(steps))
                config = data(root, per_row, staged=staged)
                last = steps[-1].state if steps else None
                pause, settings = rng.uniform(0, 0.05), rng.choice(SETTINGS)
                taken = walk(config, ranks, last, count, pause, **settings)
                kills += 1
                steps += taken[: max(1, count - rng.randint(0, 2))]  # the rest was not saved
                ranks = rng.choice([r for r in RANKS if r != ranks])
            check(full, [step.parts for step in steps], steps[-1].state)
            equal = equal and [s.ids() for s in steps] == [s.ids() for s in expected]
            equal = equal and steps[-1].state == expected[-1].state  # includes order_digest
        spent = time.monotonic() - began
        yield Row(f"loading, SIGKILL, {what} samples", kills, kills, 0, equal, spent)


def write_sets(root: str, late: bool = True) -> None:
    """The data sets of the first and, with `late`, of the later mixture stage."""
    encoded(f"{root}/images", [100, 42, 68, 16], part_shards=2)
    encoded(f"{root}/talk", [180, 140, 66], images=False, part_shards=1)
    if late:
        encoded(f"{root}/late", [80, 120], part_shards=1)


def cache_full(setting: Setting) -> Iterator[Row]:
    """A cache disk that fills up, or is full at the start: batches equal those without."""
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(setting.folder / "s3", bucket="drill"))
        stack.enter_context(environment(server.env))
        config = write_mixture("s3://drill/loading", times=4)
        expected = list(load(config, setting, 40))
        mount = setting.folder / "small"
        mount.mkdir()
        stack.enter_context(small_disk(mount, 256))
        cached = replace(config, cache_dir=str(mount / "cache"))
        for fault in ("the cache's disk fills up", "the cache's disk is full"):
            began = time.monotonic()
            with warnings_of("mdm") as warnings:
                loaded = list(load(cached, setting, 40))
            assert len(warnings) == 1, warnings
            assert "takes no more (No space left on device)" in warnings[0]
            equal = all(equal_batches(a, b) for a, b in zip(expected, loaded, strict=True))
            yield Row(f"loading, {fault}", 1, 1, 0, equal, time.monotonic() - began)
            fill(mount)
        (mount / "other user's file").unlink()
        execute("full_cache_disk.md", {"CACHE_DIR": cached.cache_dir})
        with warnings_of("mdm") as warnings:
            loaded = list(load(replace(cached, cache_gb=1.5e-4), setting, 40))
        equal = all(equal_batches(a, b) for a, b in zip(expected, loaded, strict=True))
        assert not warnings, warnings
        assert any((mount / "cache" / "files").iterdir())
        yield Row("runbook: a full cache disk", 1, 1, 0, equal, 0.0)


def fill(mount: Path) -> None:
    """Use up all free space of a disk."""
    with (mount / "other user's file").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(512)):
            pass


@contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """Collect the warnings that are logged within the block."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(logger).removeHandler(handler)


def encode_kills(setting: Setting) -> Iterator[Row]:
    """Each round kills one process of the job, or its S3 server, at a random time."""
    with ExitStack() as stack:
        bench = EncodeBench(setting.folder, stack)
        rng = setting.random("kills")
        rows = {t: Row(f"encode, SIGKILL of {t}", 0, 0, 0, True, 0.0) for t in TARGETS}
        for number in range(setting.rounds):
            target = TARGETS[number % len(TARGETS)]
            killed, seconds = kill_once(bench, target, f"s3://drill/kill-{number}", rng)
            row = rows[target]
            rows[target] = replace(
                row,
                injected=row.injected + killed,
                survived=row.survived + killed,
                seconds_lost=row.seconds_lost + max(0.0, seconds - bench.seconds),
            )
        yield from (row for row in rows.values() if row.injected)


def kill_once(bench: EncodeBench, target: str, out: str, rng: random.Random) -> tuple[int, float]:
    """Whether the target was found and killed, and the seconds until the output was complete."""
    began = time.monotonic()
    process = bench.job.start(out)
    try:
        time.sleep(rng.uniform(0.1, 0.9) * bench.seconds)
        killed = kill(target, process.pid, bench.server, rng)
        first = result_of(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if first[0] > 0:
        error_line(first[2])
    bench.finish(out, first)
    return int(killed), time.monotonic() - began


def disk_full(setting: Setting) -> Iterator[Row]:
    """Encode onto a full disk: a clear error and no partial object; with space, it resumes."""
    job = Job(setting.folder / "job")
    undisturbed = run_once_ray_starts(job, str(setting.folder / "undisturbed"))
    assert undisturbed[0] == 0, undisturbed[2]
    sha256 = undisturbed[1]["manifest_sha256"]
    mount = setting.folder / "small"
    mount.mkdir()
    out = str(mount / "out")
    began = time.monotonic()
    with small_disk(mount):
        code, _, stderr = run_once_ray_starts(job, out)
        assert code == 2, stderr
        assert "No space left on device" in error_line(stderr), stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        code, _, stderr = run_once_ray_starts(job, out)
        assert code == 0, stderr
        check_complete(out, sha256)
        assert not list(mount.rglob(".tmp-*"))
        yield Row("encode, disk full", 1, 1, 0, True, time.monotonic() - began)


def run_once_ray_starts(job: Job, out: str) -> tuple[int, dict[str, Any], str]:
    """The result of the job, rerun if Ray did not start: that is not the fault of this drill."""
    for _ in range(ATTEMPTS):
        result = job.run(out)
        if not (result[0] and "Ray did not start" in error_line(result[2])):
            break
    return result


def small_disk(mount: Path, kilobytes: int = 128) -> ExitStack:
    """Mount a file system of that size until the stack is closed; needs root."""
    stack = ExitStack()
    size = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(mount)], check=True)
    # Lazily, because a process that outlives the drill may hold a file open.
    stack.callback(subprocess.run, ["umount", "--lazy", str(mount)], check=True)
    return stack


def clock_skew(setting: Setting) -> Iterator[Row]:
    """A machine whose clock is 20 minutes fast or slow: the job reports it."""
    with ExitStack() as stack:
        bench = EncodeBench(setting.folder, stack)
        for minutes in (20, -20):
            env = wrong_clock(setting.folder, 60 * minutes)
            out = f"s3://drill/skew{minutes}"
            began = time.monotonic()
            first = bench.job.run(out, env=env)
            assert first[0] == 2, first[2]
            assert "its clock says" in error_line(first[2]), first[2]
            spent = time.monotonic() - began
            bench.finish(out, first)
            yield Row(f"encode, clock {minutes:+} min", 1, 1, 0, True, spent)


def two_jobs(setting: Setting) -> Iterator[Row]:
    """Two jobs on one output: one finishes, the other is refused with a message."""
    with ExitStack() as stack:
        bench = EncodeBench(setting.folder, stack)
        both = [result_of(p) for p in [bench.job.start("s3://drill/same") for _ in range(2)]]
        assert sorted(code for code, _, _ in both) == [0, 1], [r[2][-500:] for r in both]
        loser = next(r for r in both if r[0])
        assert "is being written by another job" in error_line(loser[2]), loser[2]
        check_complete("s3://drill/same", bench.sha256)
        yield Row("two encode jobs, one recipe", 1, 1, 0, True, 0.0)
        jobs = [
            bench.job.start("s3://drill/other"),
            bench.job.start("s3://drill/other", "--text_length", "9"),
        ]
        results = [result_of(p) for p in jobs]
        assert sorted(r[0] for r in results) in ([0, 1], [0, 2]), [r[2][-500:] for r in results]
        winner = next(r for r in results if not r[0])
        loser = next(r for r in results if r[0])
        refusal = error_line(loser[2])
        assert "is being written by another job" in refusal or winner[1]["recipe_hash"] in refusal
        check_complete("s3://drill/other", winner[1]["manifest_sha256"])
        equal = winner is results[1] or winner[1]["manifest_sha256"] == bench.sha256
        yield Row("two encode jobs, two recipes", 1, 1, 0, equal, 0.0)


def runbooks(setting: Setting) -> Iterator[Row]:
    """Execute the runbooks of the data system, each after its fault."""
    with ExitStack() as stack:
        server = stack.enter_context(S3Server(setting.folder / "s3", bucket="drill"))
        stack.enter_context(environment(server.env))
        job = Job(setting.folder / "job")
        out = "s3://drill/encoded/images"
        variables = {
            "DATASET": "imagenet",
            "ROOT": str(job.raw),
            "SPLIT": "train",
            "TOKENIZER": str(job.tokenizer),
            "AUTOENCODER": str(job.autoencoder),
            "OUT": out,
            "FLAGS": " ".join(job.command(out)[14:]),
        }
        execute("encode_a_data_set.md", variables)
        sha256 = Manifest.load(out).sha256
        yield Row("runbook: encode a data set", 1, 1, 0, True, 0.0)

        damage_shards(out)
        before = time.monotonic()
        execute("damaged_shard.md", variables)
        check_complete(out, sha256)
        yield Row("runbook: a damaged shard", 4, 4, 0, True, time.monotonic() - before)

        yield added_mid_run(setting)

        outage = "s3://drill/encoded/outage"
        process = job.start(outage)
        store = open_store(outage)
        wait_for(lambda: count_receipts(store) > 0 or process.poll() is not None, 1200)
        server.kill()
        first = result_of(process)
        assert first[0] == 2, first[2]
        assert server.endpoint in error_line(first[2])
        before = time.monotonic()
        helper = threading.Timer(5, server.start)  # the server returns while the page waits
        helper.start()
        execute("s3_outage.md", variables | {"OUT": outage})
        helper.join()
        check_complete(outage, sha256)
        yield Row("runbook: an S3 outage", 1, 1, 0, True, time.monotonic() - before)


def added_mid_run(setting: Setting) -> Row:
    """Stop loading, encode another data set, execute the page, and resume with the new mixture."""
    began = time.monotonic()
    root = "s3://drill/running"
    write_sets(root, late=False)
    steps = walk(data(root, 1, staged=False), 2, None, LATER.step - 3)
    encoded(f"{root}/late", [80, 120], part_shards=1)
    config = data(root, 1)
    shares = (",".join(f"{s.name}:{s.weight}" for s in x) for x in (FIRST, LATER.sources))
    variables = {
        "DATA": root,
        "SOURCES": next(shares),
        "MIXTURE_STAGES": f"{LATER.step}={next(shares)}",
        "STEP": str(LATER.step),
        "SEED": str(SEED),
        "GLOBAL_BATCH": str(config.global_batch),
        "SHUFFLE_WINDOW": str(config.shuffle_window),
        "IMAGES_PER_ROW": str(config.images_per_row),
        "TEXTS_PER_ROW": str(config.texts_per_row),
    }
    output = execute("add_a_data_set_mid_run.md", variables)
    before, _, first = output.partition(f"step {LATER.step}: ")
    assert '"late:' not in before, output
    assert '"late:' in first, output
    steps += walk(config, 3, steps[-1].state, LAST_STEP - len(steps))
    check(config, [step.parts for step in steps], steps[-1].state)
    undisturbed = walk(config, 1, None, LAST_STEP)
    equal = [s.ids() for s in steps] == [s.ids() for s in undisturbed]
    assert any(i.startswith("late:") for s in steps for i in s.ids())
    spent = time.monotonic() - began
    return Row("runbook: a data set added mid-run", 1, 1, 0, equal, spent)


def damage_shards(uri: str) -> None:
    """Delete one shard, truncate one, flip a bit in one, and add an unknown object."""
    store = open_store(uri)
    keys = [s.key for s in Manifest.load(uri).shards]
    store.delete(keys[0])
    store.put(keys[1], store.get(keys[1])[:-10])
    data = bytearray(store.get(keys[2]))
    data[len(data) // 2] ^= 1
    store.put(keys[2], bytes(data))
    store.put("shards/stranger.arrow", b"stranger")
