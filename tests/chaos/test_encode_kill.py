"""The encode job killed, refused and cut off from its store: same manifest, or nothing at all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mdm.data.lease import LEASE
from mdm.data.manifest import MANIFEST, Manifest
from mdm.data.storage import Store, open_store
from mdm.data.verify import verify
from pipelines import encode
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

    def start(self, out: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command(out), *more],
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
    named = {*manifest.objects(), "card.html"}
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


def test_a_job_killed_then_cut_off_from_its_store_ends_in_the_same_manifest(
    job: Job,
    undisturbed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with S3Server(tmp_path, bucket="test") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        uri = "s3://test/x"
        store = open_store(uri)

        # The driver is killed.
        process = job.start(uri)
        try:
            wait_for(lambda: receipts(store) > 0 or process.poll() is not None)
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert MANIFEST not in store.listing()
        # What works for it ends with it. (Ray's two agents look for their head a while longer.)
        workers = [p for p in family if "Agent" not in p.name() and "agent" not in p.name()]
        assert workers
        assert not psutil.wait_procs(workers, timeout=60)[1]

        # The store goes away.
        before = receipts(store)
        process = job.start(uri)
        wait_for(lambda: receipts(store) > before or process.poll() is not None)
        server.kill()
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 2
        last = stderr.strip().splitlines()[-1]
        assert server.endpoint in last
        assert "attempts" in last
        assert "Traceback" not in stderr
        assert server.env["AWS_SECRET_ACCESS_KEY"] not in stderr
        server.start()
        assert MANIFEST not in store.listing()

        # What another recipe left behind goes as well.
        store.put("shards/stale.arrow", b"stale")
        store.put("work/0123/group/000000.json", b"{}")
        code, summary, stderr = job.run(uri)
        assert code == 0, stderr
        assert summary["resumed_groups"] > before > 0
        assert summary["manifest_sha256"] == undisturbed[1]["manifest_sha256"]
        check_whole(uri, summary["manifest_sha256"])


def test_of_two_jobs_on_one_output_one_wins_and_the_other_says_so(
    job: Job, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first = job.start(str(tmp_path / "out"))
    wait_for(lambda: (tmp_path / "out" / LEASE).exists() or first.poll() is not None)
    code, _, stderr = job.run(str(tmp_path / "out"))
    assert code == 1
    assert f"being written by another job (process {first.pid} on " in stderr
    assert stderr.count("\n") == 1
    code, _, stderr = job.run(str(tmp_path / "out"), "--text_length", "9")  # another recipe
    assert code == 1
    stdout, stderr = first.communicate(timeout=240)
    assert first.returncode == 0, stderr
    assert json.loads(stdout)["manifest_sha256"] == undisturbed[1]["manifest_sha256"]
    check_whole(str(tmp_path / "out"), undisturbed[1]["manifest_sha256"])


def test_too_many_bad_records_stop_the_job() -> None:
    encode.check_bad(Counter(damaged=5), 10, 0.5)
    with pytest.raises(
        encode.TooManyBadError, match=r"6 of 10 records are bad.*0\.5.*damaged; gone"
    ):
        encode.check_bad(Counter(damaged=5, gone=1), 10, 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "imagenot"), "unknown dataset 'imagenot'"),
        (("--root", "/nowhere"), "/nowhere"),
        (("--tokenizer", "/nowhere.model"), "tokenizer /nowhere.model"),
        (("--autoencoder", "/nowhere"), "autoencoder /nowhere"),
        (("--splt", "train"), "did you mean '--split'"),
        (("--out", "gs://x"), "gs://x"),
        (("--max_bad_share", "2"), "max_bad_share is 2.0"),
    ],
)
def test_a_mistake_is_one_line(
    job: Job,
    tmp_path: Path,
    flags: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [*job.command(str(tmp_path / "out"))[1:], *flags])
    with pytest.raises(SystemExit) as ended:
        encode.main()
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
