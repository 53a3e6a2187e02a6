"""The loaders of other libraries; each is imported where it is used: they have their own Python."""

import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_contestant import NUMBERS, SEED, STEPS, Batches, Contestant, collate
from benchmarks.loader_samples import BATCH, CHANNELS, LENGTH, SAMPLES, TOKENS, samples


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
