"""The encode job killed, refused and cut off from its store: same manifest, or nothing at all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mdm.data.manifest import MANIFEST, Manifest
from mdm.data.storage import Store, open_store
from mdm.data.verify import verify
from pipelines.s3_server import S3Server
from tests.data_sets import write_autoencoder, write_imagenet, write_tokenizer

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


class Job:
    """`pipelines/encode.py` on 600 small pictures in about ten groups."""

    def __init__(self, folder: Path) -> None:
        self.raw = write_imagenet(folder / "raw", 150)
        (self.raw / "train" / "n00000000" / "n00000000_7.JPEG").write_bytes(b"broken")
        self.tokenizer = write_tokenizer(folder / "tokenizer.model")
        self.autoencoder = write_autoencoder(folder / "autoencoder")

    def start(self, out: str, *more: str) -> subprocess.Popen[str]:
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
        return subprocess.Popen(
            [*command, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def run(self, out: str, *more: str) -> tuple[int, dict[str, Any], str]:
        process = self.start(out, *more)
        stdout, stderr = process.communicate(timeout=240)
        return process.returncode, json.loads(stdout or "{}"), stderr


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed")
    code, summary, stderr = job.run(str(out))
    assert code == 0, stderr
    return out, summary


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def receipts(store: Store) -> int:
    return sum("/group/" in key for key in store.listing("work/"))


def check_whole(uri: str, manifest_sha256: str) -> None:
    manifest = Manifest.load(uri)
    assert manifest.sha256 == manifest_sha256
    assert all(not v.problems for v in verify(manifest))
    named = {MANIFEST, f"{MANIFEST}.sha256", "card.json", *(s.key for s in manifest.shards)}
    assert set(open_store(uri).listing()) == named  # no orphan, no receipt


def test_an_undisturbed_job_publishes_and_a_second_one_has_nothing_to_do(
    job: Job, undisturbed: tuple[Path, dict[str, Any]]
) -> None:
    out, summary = undisturbed
    check_whole(str(out), summary["manifest_sha256"])
    assert (summary["records"], summary["examples"], summary["quarantined"]) == (600, 599, 1)
    assert summary["shards"] > 5
    began = time.monotonic()
    code, again, stderr = job.run(str(out))
    assert (code, again["manifest_sha256"]) == (0, summary["manifest_sha256"])
    assert "already encoded" in stderr
    assert time.monotonic() - began < 60
    code, _, stderr = job.run(str(out), "--text_length", "9")
    assert code == 2
    assert summary["recipe_hash"] in stderr
    assert stderr.count("\n") == 1
    check_whole(str(out), summary["manifest_sha256"])


def test_a_killed_job_goes_on_to_the_same_manifest(
    job: Job, undisturbed: tuple[Path, dict[str, Any]], s3: str
) -> None:
    store = open_store(s3)
    process = job.start(s3)
    try:
        wait_for(lambda: receipts(store) > 0 or process.poll() is not None)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert MANIFEST not in store.listing()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive  # Ray's processes do not outlive their driver
    # What another recipe left behind before it was killed, too.
    store.put("shards/stale.arrow", b"stale")
    store.put("work/0123/group/000000.json", b"{}")
    code, summary, stderr = job.run(s3)
    assert code == 0, stderr
    assert summary["resumed_groups"] > 0
    assert summary["manifest_sha256"] == undisturbed[1]["manifest_sha256"]
    check_whole(s3, summary["manifest_sha256"])


def test_a_store_that_goes_away_is_a_clear_error_and_nothing_is_published(
    job: Job,
    undisturbed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with S3Server(tmp_path, bucket="test") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        uri = "s3://test/x"
        process = job.start(uri)
        wait_for(lambda: receipts(open_store(uri)) > 0 or process.poll() is not None)
        server.kill()
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 2
        last = stderr.strip().splitlines()[-1]
        assert server.endpoint in last
        assert "attempts" in last
        assert "Traceback" not in stderr
        assert server.env["AWS_SECRET_ACCESS_KEY"] not in stderr
        server.start()
        assert MANIFEST not in open_store(uri).listing()
        code, _, stderr = job.run(uri)
        assert code == 0, stderr
        check_whole(uri, undisturbed[1]["manifest_sha256"])


def test_too_many_bad_records_stop_the_job(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, stderr = job.run(str(out), "--max_bad_share", "0.001")
    assert code == 2
    assert "1 of 600 records are bad" in stderr
    assert "not a picture" in stderr
    assert not (out / MANIFEST).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "imagenot"), "unknown dataset 'imagenot'"),
        (("--root", "/nowhere"), "/nowhere"),
        (("--tokenizer", "/nowhere.model"), "tokenizer /nowhere.model"),
        (("--autoencoder", "/nowhere"), "autoencoder /nowhere"),
        (("--splt", "train"), "did you mean '--split'"),
        (("--out", "gs://x"), "gs://x"),
    ],
)
def test_a_mistake_is_one_line(
    job: Job, tmp_path: Path, flags: tuple[str, str], message: str
) -> None:
    code, _, stderr = job.run(str(tmp_path / "out"), *flags)
    assert code == 2
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
