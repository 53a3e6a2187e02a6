"""One contestant of the loader benchmarks, in a process of its own.

    python loader_job.py write FORMAT TO                # write its data set with its own writer
    python loader_job.py read CONTESTANT FROM SCRATCH   # read it; prints one line of JSON

It runs under the project's Python and under that of the peers, so packages are imported where they
are used.
"""

import gc
import json
import os
import resource
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_samples import (
    BATCH,
    CHANNELS,
    CLASSES,
    LENGTH,
    SAMPLES,
    TOKENS,
    VOCABULARY,
    Check,
    samples,
)

PASSES = 1  # that are timed, after one that is checked and gives the time of the first batch
SEED = 7
STEPS = SAMPLES // BATCH  # full batches; the rest of a pass is a shorter one
NUMBERS = TOKENS * CHANNELS

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # ids [B, LENGTH], latents [B, N, C]


class Contestant:
    """A loader: `open(pass)` yields the batches of a pass, `resume()` those of its second half."""

    # Builds everything and yields the batches of a pass; every pass starts with an empty cache.
    open: Callable[[int], Batches]
    resume: Callable[[], Batches] | None = None
    close: Callable[[], None] = staticmethod(lambda: None)


def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The collate function of every peer: padded ids, stacked latents, and the classes."""
    tokens = np.zeros((len(rows), LENGTH), np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row["tokens"])] = row["tokens"]
    latents = np.stack([row["latents"] for row in rows]).reshape(len(rows), TOKENS, CHANNELS)
    torch.tensor([int(row["class_id"]) for row in rows])
    return torch.from_numpy(tokens), torch.from_numpy(latents)


# ---- ours


def write_ours(to: str) -> None:
    from mdm.data.manifest import CARD, Manifest, canonical, publish
    from mdm.data.manifest_parts import quarantine_parts, shard_parts
    from mdm.data.schema import Samples, sample_schema, write_shard
    from mdm.preprocess.encode import Flags
    from mdm.storage import open_store

    fields: dict[str, Any] = Flags.__dataclass_fields__
    batch_rows, shard_rows = (int(fields[f].default) for f in ("batch_rows", "shard_rows"))
    store, schema, shards = open_store(to), sample_schema((16, 16), CHANNELS), []
    all_samples = list(samples())
    for start in range(0, SAMPLES, shard_rows):
        rows = all_samples[start : start + shard_rows]
        examples = Samples(
            [f"record-{number}" for number, *_ in rows],
            [f"file-{number}" for number, *_ in rows],
            np.array([label for *_, label in rows], np.int32),
            [text for _, _, text, _ in rows],
            np.zeros(len(rows), np.uint16),
            np.stack([latent.reshape(-1) for _, latent, _, _ in rows]),
        )
        data, info = write_shard(examples, schema, batch_rows)
        store.put(info.key, data)
        shards.append(info)
    store.put(CARD, canonical({}))
    publish(
        store,
        Manifest(
            dataset="bench",
            split="train",
            recipe_hash="bench",
            tokenizer_sha256="bench",
            autoencoder_sha256="bench",
            image_grid=(16, 16),
            latent_dim=CHANNELS,
            vocab_size=VOCABULARY,
            class_names=tuple(map(str, range(CLASSES))),
            batch_rows=batch_rows,
            shards=shard_parts(shards, batch_rows),
            quarantine=quarantine_parts(),
            counts={"examples": SAMPLES, "quarantined": 0},
            card_sha256="bench",
        ),
    )


class Ours(Contestant):
    """Also computes ids, noise keys, epochs, prompts and the order digest; verifies every byte."""

    def __init__(self, at: str, scratch: Path, window: int = 0) -> None:
        import mdm.data.loader
        from mdm.config import DataConfig

        assert mdm.data.loader  # import it now, so that it is not part of the first batch
        self.at = at
        self.window = window or DataConfig().shuffle_window
        self.loader: Any = None
        self.middle: dict[str, Any] = {}  # the loader's state in the middle of a pass

    def _loader(self) -> Any:
        from mdm.data.loader import Loader
        from mdm.data.manifest import Manifest
        from mdm.data.mixture import Mixture, Source

        self.close()
        source = Source("bench", Manifest.load(self.at))
        mixture = Mixture((source,), global_batch=BATCH, shuffle_window=self.window)
        self.loader = Loader(mixture, SEED, caption_length=LENGTH, dialogue_length=LENGTH)
        return self.loader

    def _batches(self, rows: int) -> Batches:
        while rows > 0:
            batch = next(self.loader)
            if self.loader.step == STEPS // 2:
                self.middle = self.loader.state_dict()
            # A step may span two epochs; samples of the second one are not counted.
            yield batch.tokens[:rows], batch.latents[:rows]
            rows -= BATCH

    def open(self, number: int) -> Batches:
        self._loader()
        return self._batches(SAMPLES)

    def resume(self) -> Batches:
        loader = self._loader()
        loader.load_state_dict(self.middle)
        return self._batches(BATCH)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


# ---- floors


class Memcpy(Contestant):
    """Copies rows of an array in memory into a batch."""

    def __init__(self, at: str, scratch: Path) -> None:
        all_samples = list(samples())
        self.latents = np.stack([latent for _, latent, _, _ in all_samples])
        self.tokens = np.zeros((SAMPLES, LENGTH), np.int64)
        for number, _, text, _ in all_samples:
            self.tokens[number, : len(text)] = text

    def open(self, number: int) -> Batches:
        order = np.random.default_rng(number).permutation(SAMPLES)
        for start in range(0, SAMPLES, BATCH):
            rows = order[start : start + BATCH]
            yield (
                torch.from_numpy(self.tokens[rows]),
                torch.from_numpy(self.latents[rows].view(np.int16)),
            )


class PlainIpc(Contestant):
    """Record batches in random order, rows shuffled over four of them; xxh3 checked."""

    def __init__(self, at: str, scratch: Path) -> None:
        from mdm.data.manifest import Manifest

        self.manifest = Manifest.load(at)

    def open(self, number: int) -> Batches:
        import xxhash

        from mdm.data.schema import RecordBatch

        store, random = self.manifest.store(), np.random.default_rng(number)
        places = list(self.manifest.batches())
        order = random.permutation(len(places))
        pending: list[dict[str, Any]] = []
        for start in range(0, len(order), 4):
            window = []
            for at in order[start : start + 4]:
                shard, _, info = places[at]
                data = store.read_range(self.manifest.shards[shard].key, info.offset, info.length)
                if xxhash.xxh3_64_hexdigest(data) != info.xxh3:
                    raise RuntimeError("damaged")
                rows = RecordBatch(data, self.manifest.schema)
                assert rows.latents is not None
                latents = rows.latents.view(np.int16)
                window += [
                    {"tokens": rows.text(i), "latents": latents[i], "class_id": rows.class_ids[i]}
                    for i in range(len(rows))
                ]
            pending += [window[i] for i in random.permutation(len(window))]
            while len(pending) >= BATCH:
                yield collate(pending[:BATCH])
                del pending[:BATCH]
        if pending:
            yield collate(pending)


# ---- peers


def _plain() -> Iterator[dict[str, Any]]:
    for _, latent, text, label in samples():
        yield {"latents": latent, "tokens": text, "class_id": label}


def write_huggingface(to: str) -> None:
    _huggingface(flat=True).save_to_disk(to)


def write_huggingface_parquet(to: str) -> None:
    data = _huggingface(flat=True)
    for number in range(4):
        part = data.shard(4, number, contiguous=True)
        part.to_parquet(f"{to}/{number}.parquet", batch_size=1000)


def _huggingface(*, flat: bool) -> Any:
    from datasets import Dataset, Features, Sequence, Value

    features = Features(
        latents=Sequence(Value("uint16"), length=NUMBERS),
        tokens=Sequence(Value("uint16")),
        class_id=Value("int32"),
    )
    rows = list(_plain())
    columns = {
        "latents": [row["latents"].reshape(-1) for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "class_id": [row["class_id"] for row in rows],
    }
    return Dataset.from_dict(columns, features=features)


def _from_arrow(table: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch from an Arrow table, column by column: faster than the formats numpy and torch."""
    rows = len(table)
    latents = table["latents"].combine_chunks()
    bits = np.frombuffer(
        latents.values.buffers()[1], np.int16, rows * NUMBERS, 2 * latents.offset * NUMBERS
    )
    tokens = np.zeros((rows, LENGTH), np.int64)
    for place, text in zip(tokens, table["tokens"].combine_chunks(), strict=True):
        values = text.values.to_numpy()
        place[: len(values)] = values
    torch.from_numpy(table["class_id"].to_numpy())
    return torch.from_numpy(tokens), torch.from_numpy(bits.reshape(rows, TOKENS, CHANNELS).copy())


class HuggingFace(Contestant):
    """Memory-mapped Arrow files, whole batches by index, in the format `arrow`."""

    def __init__(self, at: str, scratch: Path) -> None:
        import datasets

        assert datasets
        self.at = at

    def open(self, number: int, start: int = 0) -> Batches:
        from datasets import load_from_disk

        data = load_from_disk(self.at).with_format("arrow")
        order = np.random.default_rng(number).permutation(SAMPLES)
        for at in range(start, SAMPLES, BATCH):
            yield _from_arrow(data[order[at : at + BATCH]])

    def resume(self) -> Batches:
        return self.open(0, STEPS // 2 * BATCH)


class HuggingFaceParquet(Contestant):
    """Streamed Parquet files, shuffled in a buffer of 1,000 rows."""

    def __init__(self, at: str, scratch: Path) -> None:
        import datasets

        assert datasets
        self.at = at
        self.state: Any = None

    def _data(self, number: int) -> Any:
        from datasets import load_dataset

        files = [f"{self.at}/{n}.parquet" for n in range(4)]
        remote = {"endpoint_url": os.environ.get("AWS_ENDPOINT_URL")}
        options = {"storage_options": remote} if self.at.startswith("s3:") else {}
        data = load_dataset("parquet", data_files=files, split="train", streaming=True, **options)
        return data.shuffle(seed=number, buffer_size=1000).with_format("numpy")

    def open(self, number: int) -> Batches:
        data = self._data(number)
        rows: list[dict[str, Any]] = []
        for step, batch in enumerate(data.iter(batch_size=BATCH)):
            if step == STEPS // 2:
                self.state = data.state_dict()
            rows = [
                {k: batch[k][i] for k in ("tokens", "latents", "class_id")}
                for i in range(len(batch["class_id"]))
            ]
            for row in rows:
                row["latents"] = row["latents"].astype(np.int16)
            yield collate(rows)


def write_litdata(to: str) -> None:
    import litdata

    rows = list(_plain())
    global _litdata_row  # it is pickled by its name

    def _litdata_row(index: int) -> dict[str, Any]:
        # Flat arrays are stored without a header, which is LitData's fastest format.
        row = rows[index]
        return {
            "latents": row["latents"].reshape(-1).view(np.int16),
            "tokens": row["tokens"].astype(np.int32),
            "class_id": row["class_id"],
        }

    litdata.optimize(
        fn=_litdata_row,  # type: ignore[name-defined]
        inputs=list(range(SAMPLES)),
        output_dir=to,
        chunk_bytes="64MB",
        num_workers=1,
        start_method="fork",
    )


class LitData(Contestant):
    """StreamingDataset and its loader, in this process."""

    def __init__(self, at: str, scratch: Path) -> None:
        import litdata

        assert litdata
        self.at, self.scratch = at, scratch
        self.loader: Any = None
        self.state: Any = None

    def _loader(self, number: int, cache: str) -> Any:
        import litdata
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # for a server on this machine
        options: dict[str, Any] = {}
        if self.at.startswith("s3:"):
            options = {"cache_dir": str(self.scratch / cache), "max_pre_download": 4}
        data = litdata.StreamingDataset(self.at, shuffle=True, seed=SEED + number, **options)
        return litdata.StreamingDataLoader(
            data, batch_size=BATCH, num_workers=0, collate_fn=collate
        )

    def open(self, number: int) -> Batches:
        self.loader = self._loader(number, f"pass-{number}")
        for step, batch in enumerate(self.loader):
            if step == STEPS // 2 and number == 0:
                self.state = self.loader.state_dict()
            yield batch

    def resume(self) -> Batches:
        # The state names the cache folder, so empty it.
        shutil.rmtree(self.scratch / "pass-0", ignore_errors=True)
        loader = self._loader(0, "pass-0")
        loader.load_state_dict(self.state)
        return iter(loader)


def _streaming() -> Any:
    """The package `streaming`; stubs stand in for torchvision, whose PyPI package needs CUDA."""
    import transformers

    assert transformers  # import it before the stubs, since it looks for torchvision as well
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        sys.modules.setdefault(f"torchvision{name}", types.ModuleType(f"torchvision{name}"))
    sys.modules["torchvision.datasets"].__dict__["VisionDataset"] = object
    sys.modules["torchvision.transforms.functional"].__dict__["to_tensor"] = None
    import streaming

    return streaming


def write_mosaicml(to: str) -> None:
    columns = {
        "latents": f"ndarray:uint16:{TOKENS},{CHANNELS}",
        "tokens": "ndarray:uint16",
        "class_id": "int",
    }
    with _streaming().MDSWriter(out=to, columns=columns) as writer:
        for row in _plain():
            writer.write(row)


class MosaicML(Contestant):
    """StreamingDataset and its loader, in this process."""

    def __init__(self, at: str, scratch: Path) -> None:
        _streaming()
        self.at, self.scratch = at, scratch
        self.state: Any = None

    def _loader(self, number: int, cache: str) -> Any:
        streaming = _streaming()
        if self.at.startswith("s3:"):
            os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
            place = {"remote": self.at, "local": str(self.scratch / cache)}
        else:
            place = {"local": self.at}
        data = streaming.StreamingDataset(
            **place,
            shuffle=True,
            shuffle_seed=SEED + number,
            batch_size=BATCH,
            num_canonical_nodes=1,
        )
        return streaming.StreamingDataLoader(
            data, batch_size=BATCH, num_workers=0, collate_fn=_unsigned
        )

    def open(self, number: int) -> Batches:
        loader = self._loader(number, f"pass-{number}")
        for step, batch in enumerate(loader):
            if step == STEPS // 2 and number == 0:
                self.state = loader.state_dict()
            yield batch

    def resume(self) -> Batches:
        loader = self._loader(0, "resume")
        loader.load_state_dict(self.state)
        return iter(loader)


def _unsigned(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    return collate([row | {"latents": row["latents"].view(np.int16)} for row in rows])


def write_webdataset(to: str) -> None:
    import webdataset

    Path(to).mkdir(parents=True)
    with webdataset.ShardWriter(f"{to}/%06d.tar", maxcount=2500, verbose=0) as writer:
        for number, row in enumerate(_plain()):
            writer.write(
                {
                    "__key__": f"{number:08d}",
                    "latents.npy": row["latents"].view(np.int16),
                    "tokens.npy": row["tokens"],
                    "cls": row["class_id"],
                }
            )


class WebDataset(Contestant):
    """Tar files read one after the other, shuffled in a buffer of 1,000 samples."""

    def __init__(self, at: str, scratch: Path) -> None:
        import webdataset

        assert webdataset
        names = [f"{n:06d}.tar" for n in range(8)]
        if at.startswith("s3:"):
            import boto3

            bucket, _, prefix = at.removeprefix("s3://").partition("/")
            client = boto3.client("s3")
            self.urls = [
                "pipe:curl -s '"
                + client.generate_presigned_url(
                    "get_object", Params={"Bucket": bucket, "Key": f"{prefix}/{name}"}
                )
                + "'"
                for name in names
            ]
        else:
            self.urls = [f"{at}/{name}" for name in names]

    def open(self, number: int) -> Batches:
        import webdataset

        data = (
            webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), seed=number)
            .shuffle(1000)
            .decode()
        )
        rows = []
        for row in data:
            latents, tokens = row["latents.npy"], row["tokens.npy"]
            rows.append({"latents": latents, "tokens": tokens, "class_id": row["cls"]})
            if len(rows) == BATCH:
                yield collate(rows)
                rows = []
        if rows:
            yield collate(rows)


CONTESTANTS: dict[str, Callable[[str, Path], Contestant]] = {
    "ours": Ours,
    "ours, one window": lambda at, scratch: Ours(at, scratch, window=1 << 20),
    "memcpy": Memcpy,
    "plain Arrow IPC": PlainIpc,
    "HF datasets": HuggingFace,
    "HF datasets, parquet": HuggingFaceParquet,
    "LitData": LitData,
    "MosaicML Streaming": MosaicML,
    "WebDataset": WebDataset,
}
WRITERS: dict[str, Callable[[str], None]] = {
    "arrow": write_ours,
    "huggingface": write_huggingface,
    "parquet": write_huggingface_parquet,
    "litdata": write_litdata,
    "mosaicml": write_mosaicml,
    "webdataset": write_webdataset,
}


# ---- measuring


def cpu_seconds() -> float:
    """CPU seconds of this process and its children, ended and alive."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in _children(os.getpid()):
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # the child has just ended
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int) -> Iterable[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from _children(child)


def peak_mib() -> float:
    """Peak memory of this process, which is where batches are assembled."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(name: str, at: str, scratch: Path) -> dict[str, float | None]:
    """The figures of one contestant."""
    torch.set_num_threads(1)
    contestant = CONTESTANTS[name](at, scratch)
    check, first = Check(), None
    before = peak_mib()
    began = time.perf_counter()
    for tokens, latents in contestant.open(0):
        first = first or time.perf_counter() - began
        two = latents[:, 0, :2]
        bits = two.view(torch.int16) if two.dtype == torch.bfloat16 else two
        check.add(tokens[:, :2].numpy(), bits.numpy())
    check.finish()
    times, cpu = [], []
    for number in range(1, 1 + PASSES):
        gc.collect()
        spent, began = cpu_seconds(), time.perf_counter()
        count = sum(len(tokens) for tokens, _ in contestant.open(number))
        times.append(time.perf_counter() - began)
        cpu.append(cpu_seconds() - spent)
        if count != SAMPLES:
            raise RuntimeError(f"{name}: {count} samples")
    resume = None
    if contestant.resume is not None:
        began = time.perf_counter()
        next(contestant.resume())
        resume = time.perf_counter() - began
    contestant.close()
    return {
        "samples_per_second": SAMPLES / sorted(times)[PASSES // 2],
        "cpu_us_per_sample": 1e6 * sorted(cpu)[PASSES // 2] / SAMPLES,
        "first_batch_s": first,
        "resume_s": resume,
        "peak_rss_mib": peak_mib(),
        "rss_before_mib": before,
    }


def main() -> None:
    mode, name, at = sys.argv[1:4]
    if mode == "write":
        WRITERS[name](at)
        return
    scratch = Path(sys.argv[4])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        print(json.dumps(read(name, at, scratch)), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    # Some peers leave threads running that keep a finished process from exiting.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
