"""A small real encode job to be killed, cut off and refused, and what its output must be."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdm.data.manifest import Manifest
from mdm.data.schema import Rows, ShardInfo
from mdm.preprocess.publish import receipts_of
from mdm.preprocess.verify import verify
from mdm.storage import Store, open_store
from tests.data_sets import write_autoencoder, write_imagenet, write_tokenizer

ROOT = Path(__file__).parents[2]


class Job:
    """`pipelines/encode.py` on 600 small pictures, one of them broken, in about ten groups."""

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
        self, out: str, *more: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command(out), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        )

    def run(
        self, out: str, *more: str, env: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], str]:
        """Exit code, summary, what it said on stderr."""
        return ended(self.start(out, *more, env=env))


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and stderr of a job that is waited for."""
    stdout, stderr = process.communicate(timeout=1200)
    # Of a job that was broken, Ray may have said something on its way out.
    summary = {} if process.returncode else json.loads(stdout.strip().splitlines()[-1])
    return process.returncode, summary, stderr


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def receipts(store: Store) -> int:
    return sum("/group/" in key for key in store.listing("work/"))


def check_whole(uri: str, manifest_sha256: str) -> None:
    """Those bytes and nothing else: no orphan, no survey, no example twice."""
    manifest = Manifest.load(uri)
    assert manifest.sha256 == manifest_sha256
    assert all(not v.problems for v in verify(manifest))
    kept = {k for k in open_store(uri).listing() if not k.startswith(receipts_of(manifest))}
    assert kept == {*manifest.objects(), "card.html"}
    ids = [i for s in manifest.shards for i in _ids(uri, manifest, s)]
    assert len(set(ids)) == len(ids) == manifest.rows


def _ids(uri: str, manifest: Manifest, shard: ShardInfo) -> list[str]:
    data = open_store(uri).get(shard.key)
    parts = [data[b.offset : b.offset + b.length] for b in shard.batches]
    return [i for part in parts for i in Rows(part, manifest.schema).ids]


def one_line(stderr: str) -> str:
    """The last line of a job that ended in an error for people."""
    assert "Traceback" not in stderr, stderr
    return stderr.strip().replace("\r", "\n").splitlines()[-1]
