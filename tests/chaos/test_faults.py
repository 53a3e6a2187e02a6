"""Storage, loader and encode job through a network, a clock and a disk that are not as they should.

`make drill` has the long half of these.
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
from tests.chaos.encode_job import ROOT, Job, check_whole, one_line
from tests.chaos.faults import environment, wrong_clock
from tests.chaos.proxy import KINDS, FaultProxy
from tests.drills.data import damage_shards, load, same, write_mixture
from tests.drills.drill import Setting

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
QUICK = StoreOptions(attempts=10, backoff=0.01, backoff_cap=0.05, read_timeout=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_storage_gives_the_right_bytes_or_none(kind: str, s3: str) -> None:
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
    # Nothing but its reader can check a range: record batches carry a hash for that.
    assert wrong_ranges == 0 or kind == "flip"


def test_loading_through_a_spoilt_network_gives_the_same_batches(s3: str, tmp_path: Path) -> None:
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    config, setting = write_mixture(s3), Setting(tmp_path, 1, 0)
    expected = list(load(config, setting, 25))
    with (
        FaultProxy(port, 0.3, ["503", "reset", "truncate", "flip"], seed=1) as proxy,
        environment({"AWS_ENDPOINT_URL": proxy.endpoint}),
    ):
        found = list(load(config, setting, 25))
        assert sum(proxy.injected.values()) > 0
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_encoding_through_a_spoilt_network_gives_the_same_manifest(
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
    check_whole(s3, summary["manifest_sha256"])


def test_a_wrong_clock_is_named(job: Job, s3: str, tmp_path: Path) -> None:
    code, _, stderr = job.run(s3, env=wrong_clock(tmp_path, 1200))
    assert code == 2
    assert "RequestTimeTooSkewed" in one_line(stderr)
    assert "its clock says" in one_line(stderr)


def verified(out: Path, *flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, verify.__file__, "--data", str(out), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert not done.stderr.count("Traceback"), done.stderr
    return done.returncode, done.stdout


def test_damage_is_named_and_encoding_again_writes_back_what_is_lost(
    job: Job, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    keys = [s.key for s in Manifest.load(str(out)).shards]
    damage_shards(str(out))
    (out / "card.json").unlink()
    (out / "notes.txt").write_text("hello")
    code, said = verified(out, "--discard", "true")
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
        assert problem in " ".join(said.split()) or any(
            problem.removeprefix("BAD ") in line and line.strip().startswith("BAD")
            for line in said.splitlines()
        ), (problem, said)
    kept = {k: (out / k).stat().st_mtime_ns for k in keys[3:]}
    code, summary, stderr = job.run(str(out))
    assert code == 0, stderr
    assert "lacks 4 objects" in stderr
    assert summary["resumed_groups"] > 0
    check_whole(str(out), undisturbed[1]["manifest_sha256"])
    assert kept == {k: (out / k).stat().st_mtime_ns for k in keys[3:]}


def test_an_altered_manifest_is_named_with_both_hashes(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    path = out / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"vocab_size":', b'"vocab_size": '))
    code, said = verified(out)
    assert code == 1
    assert undisturbed[1]["manifest_sha256"] in said
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said
    path.unlink()
    code, said = verified(out)
    assert code == 1
    assert "manifest.json is missing" in said


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = f"""
from mdm.storage import StoreError, open_store
store = open_store({str(tmp_path)!r})
store.put("small", b"x" * 1000)
try:
    store.put("large", b"x" * 100_000)
except StoreError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.stdout.strip() == f"cannot write {tmp_path}/large: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
