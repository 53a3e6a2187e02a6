"""Storage, loader and encode job with a faulty network, a wrong clock and a full disk.

`make drill` runs longer versions of these.
"""

import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mdm.data.manifest import MANIFEST, Manifest
from mdm.storage import StoreOptions, open_store
from pipelines import verify
from tests.drills.data import damage_shards, equal_batches, load, write_mixture
from tests.drills.drill import Setting
from tests.faults.encode_job import ROOT, Job, check_complete, error_line
from tests.faults.faults import environment, wrong_clock
from tests.faults.proxy import KINDS, FaultProxy

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
QUICK = StoreOptions(attempts=10, backoff=0.01, backoff_cap=0.05, read_timeout=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_storage_returns_the_right_bytes_through_a_faulty_network(kind: str, s3: str) -> None:
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    wrong_ranges = 0
    with (
        FaultProxy(port, 0.2, [kind], seed=3) as proxy,
        environment({"AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        store = open_store(s3, QUICK)
        for number in range(12):
            data = hashlib.sha256(str(number).encode()).digest() * 100
            store.put(f"a/{number}", data, if_absent=True)
            assert store.get(f"a/{number}") == data
            wrong_ranges += store.read_range(f"a/{number}", 7, 900) != data[7:907]
            assert len(store.listing("a/")) == number + 1
        assert proxy.injected[kind] >= 5
    # The storage layer cannot check a range: readers check the hash of the record batch.
    assert wrong_ranges == 0 or kind == "flip"


def test_loading_through_a_faulty_network_gives_the_same_batches(s3: str, tmp_path: Path) -> None:
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    config, setting = write_mixture(s3), Setting(tmp_path, 1, 0)
    expected = list(load(config, setting, 25))
    with (
        FaultProxy(port, 0.3, ["503", "reset", "truncate", "flip"], seed=1) as proxy,
        environment({"AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        loaded = list(load(config, setting, 25))
        assert sum(proxy.injected.values()) > 0
    assert all(equal_batches(a, b) for a, b in zip(expected, loaded, strict=True))


def test_encoding_through_a_faulty_network_gives_the_same_manifest(
    job: Job, undisturbed: tuple[Path, dict[str, Any]], s3: str
) -> None:
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    faults: Counter[str] = Counter()
    with FaultProxy(port, 0.1, ["503", "reset", "truncate", "flip"], seed=2) as proxy:
        code, summary, stderr = job.run(s3, env={"AWS_ENDPOINT_URL": proxy.endpoint})
        faults = proxy.injected
    assert code == 0, stderr
    assert sum(faults.values()) > 0
    assert summary["manifest_sha256"] == undisturbed[1]["manifest_sha256"]
    check_complete(s3, summary["manifest_sha256"])


def test_an_error_due_to_a_wrong_clock_names_the_clock(job: Job, s3: str, tmp_path: Path) -> None:
    code, _, stderr = job.run(s3, env=wrong_clock(tmp_path, 1200))
    assert code == 2
    assert "RequestTimeTooSkewed" in error_line(stderr)
    assert "its clock says" in error_line(stderr)


def run_verify(out: Path, *flags: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, verify.__file__, "--data", str(out), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" not in process.stderr, process.stderr
    return process.returncode, process.stdout


def test_verify_names_the_damage_and_encoding_again_restores_what_is_missing(
    job: Job, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    keys = [s.key for s in Manifest.load(str(out)).shards]
    damage_shards(str(out))
    (out / "card.json").unlink()
    (out / "notes.txt").write_text("hello")
    code, output = run_verify(out, "--discard")
    assert code == 1
    for problem in (
        f"{out / keys[0]} does not exist",
        f"BAD {keys[1]}",
        f"BAD {keys[2]}",
        "card.json does not exist",
        "shards/stranger.arrow belongs to no data set",
        "notes.txt belongs to no data set",
        ": xxh3 is",
        "now run encode.py with the same flags",
    ):
        assert problem in " ".join(output.split()) or any(
            problem.removeprefix("BAD ") in line and line.strip().startswith("BAD")
            for line in output.splitlines()
        ), (problem, output)
    kept = {k: (out / k).stat().st_mtime_ns for k in keys[3:]}
    code, summary, stderr = job.run(str(out))
    assert code == 0, stderr
    assert "lacks 4 objects" in stderr
    assert summary["resumed_groups"] > 0
    check_complete(str(out), undisturbed[1]["manifest_sha256"])
    assert kept == {k: (out / k).stat().st_mtime_ns for k in keys[3:]}


def test_verify_reports_an_altered_manifest_with_both_hashes(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    path = out / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"vocab_size":', b'"vocab_size": '))
    code, output = run_verify(out)
    assert code == 1
    assert undisturbed[1]["manifest_sha256"] in output
    assert hashlib.sha256(path.read_bytes()).hexdigest() in output
    path.unlink()
    code, output = run_verify(out)
    assert code == 1
    assert "manifest.json is missing" in output


def test_a_full_disk_leaves_no_partial_object(tmp_path: Path) -> None:
    script = f"""
from mdm.storage import StoreError, open_store
store = open_store({str(tmp_path)!r})
store.put("small", b"x" * 1000)
try:
    store.put("large", b"x" * 100_000)
except StoreError as error:
    print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert process.stdout.strip() == f"cannot write {tmp_path}/large: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
