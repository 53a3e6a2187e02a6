"""A small real encode job for tests to disturb, and checks of its output."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdm.data.manifest import Manifest
from mdm.data.schema import RecordBatch, ShardInfo
from mdm.preprocess.verify import verify
from mdm.storage import Store, open_store
from tests.data_sets import write_autoencoder, write_imagenet, write_tokenizer

ROOT = Path(__file__).parents[2]


class Job:
    """`pipelines/encode.py` on 600 small images, one of them broken, in about ten groups."""

    def __init__(self, folder: Path) -> None:
        self.raw = write_imagenet(folder / "raw", 150)
        (self.raw / "train" / "n00000000" / "n00000000_7.JPEG").write_bytes(b"broken")
        self.tokenizer = write_tokenizer(folder / "tokenizer.model")
        self.autoencoder = write_autoencoder(folder / "autoencoder")

    def command(self, out: str) -> list[str]:
        flags = {
            "dataset": "imagenet",
            "root": self.raw,
            "split": "train",
            "tokenizer": self.tokenizer,
            "autoencoder": self.autoencoder,
            "out": out,
            "unit_bytes": 20_000,
            "shard_rows": 50,
            "batch_rows": 16,
            "encode_batch": 8,
            "encoder_threads": 1,
        }
        command = [sys.executable, str(ROOT / "pipelines" / "encode.py")]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        return command

    def start(
        self, out: str, *flags: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command(out), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        )

    def run(
        self, out: str, *flags: str, env: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], str]:
        """Run the job to its end; returns exit code, summary and stderr."""
        return result_of(self.start(out, *flags, env=env))


def result_of(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Wait for a job; returns its exit code, summary and stderr."""
    stdout, stderr = process.communicate(timeout=1200)
    # If the job fails, Ray may have printed to stdout as well.
    summary = {} if process.returncode else json.loads(stdout.strip().splitlines()[-1])
    return process.returncode, summary, stderr


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count_receipts(store: Store) -> int:
    return sum("/group/" in key for key in store.listing("work/"))


def check_complete(uri: str, manifest_sha256: str) -> None:
    """Check that the output has this manifest and nothing else: no orphan, survey or duplicate."""
    manifest = Manifest.load(uri)
    assert manifest.sha256 == manifest_sha256
    assert all(not v.problems for v in verify(manifest))
    receipts = f"work/{manifest.recipe_hash[:16]}/group/"
    keys = {k for k in open_store(uri).listing() if not k.startswith(receipts)}
    assert keys == {*manifest.objects(), "card.html"}
    ids = [i for s in manifest.shards for i in _ids(uri, manifest, s)]
    assert len(set(ids)) == len(ids) == manifest.rows


def _ids(uri: str, manifest: Manifest, shard: ShardInfo) -> list[str]:
    data = open_store(uri).get(shard.key)
    parts = [data[b.offset : b.offset + b.length] for b in shard.batches]
    return [i for part in parts for i in RecordBatch(part, manifest.schema).ids]


def error_line(stderr: str) -> str:
    """The last line of stderr, of a job that failed with an error message; no traceback."""
    assert "Traceback" not in stderr, stderr
    return stderr.strip().replace("\r", "\n").splitlines()[-1]
