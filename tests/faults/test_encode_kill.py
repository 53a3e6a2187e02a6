"""Kill the encode job or its store: it publishes the same manifest, or nothing."""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from mdm.data.manifest import MANIFEST
from mdm.preprocess.encode import check_bad
from mdm.storage import open_store
from mdm.storage.lease import LEASE
from mdm.storage.server import S3Server
from pipelines import encode
from tests.faults.encode_job import Job, check_complete, count_receipts, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def test_a_job_publishes_and_running_it_again_changes_nothing(
    job: Job, undisturbed: tuple[Path, dict[str, Any]]
) -> None:
    out, summary = undisturbed
    check_complete(str(out), summary["manifest_sha256"])
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
    check_complete(str(out), summary["manifest_sha256"])


def test_a_job_that_is_killed_and_then_loses_its_store_publishes_the_same_manifest(
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

        # Kill the driver.
        process = job.start(uri)
        try:
            wait_for(lambda: count_receipts(store) > 0 or process.poll() is not None)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert MANIFEST not in store.listing()
        # Its workers end with it. (Ray's two agents keep looking for their head for a while.)
        workers = [p for p in children if "Agent" not in p.name() and "agent" not in p.name()]
        assert workers
        assert not psutil.wait_procs(workers, timeout=60)[1]

        # Kill the store.
        before = count_receipts(store)
        process = job.start(uri)
        wait_for(lambda: count_receipts(store) > before or process.poll() is not None)
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

        # Objects left by another recipe are removed as well.
        store.put("shards/stale.arrow", b"stale")
        store.put("work/0123/group/000000.json", b"{}")
        code, summary, stderr = job.run(uri)
        assert code == 0, stderr
        assert summary["resumed_groups"] > before > 0
        assert summary["manifest_sha256"] == undisturbed[1]["manifest_sha256"]
        check_complete(uri, summary["manifest_sha256"])


def test_if_two_jobs_share_an_output_the_second_exits_and_names_the_first(
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
    check_complete(str(tmp_path / "out"), undisturbed[1]["manifest_sha256"])


def test_too_many_bad_records_stop_the_job() -> None:
    check_bad(Counter(damaged=5), 10, 0.5)
    with pytest.raises(ValueError, match=r"6 of 10 records are bad.*0\.5.*damaged; gone"):
        check_bad(Counter(damaged=5, gone=1), 10, 0.5)


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
def test_a_wrong_flag_ends_the_job_with_one_line(
    job: Job,
    tmp_path: Path,
    flags: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [*job.command(str(tmp_path / "out"))[1:], *flags])
    with pytest.raises(SystemExit) as exit_info:
        encode.main()
    assert exit_info.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
