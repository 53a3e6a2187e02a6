"""The encode job under `ray job submit`, on a Ray cluster started for the test."""

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdm.data.manifest import Manifest
from mdm.preprocess.verify import verify
from tests.data_sets import write_autoencoder, write_imagenet, write_tokenizer
from tests.helpers import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def cluster(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of the job server of a head node; it requires a token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    port, dashboard = free_ports(2)
    # Ray's sockets are in its folder, and a socket's path is limited to 107 bytes.
    folder = Path("/tmp") / f"mdm-ray-{os.getpid()}"
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += ["--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder}"]
    log = tmp_path_factory.mktemp("ray") / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--disable-usage-stats"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        ) as head,
    ):
        address = f"http://127.0.0.1:{dashboard}"
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and head.poll() is None:
                try:
                    urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
                    break
                except urllib.error.HTTPError:
                    break  # it is up, and asks for the token
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"Ray did not start: {log.read_text()[-2000:]}")
            yield address
        finally:
            head.send_signal(signal.SIGTERM)  # with --block, its processes end with it
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_a_submitted_job_writes_the_same_manifest_as_a_local_job(
    cluster: str, tmp_path: Path
) -> None:
    raw = write_imagenet(tmp_path / "raw", 12)
    flags = f"--dataset imagenet --root {raw} --split train --shard_rows 16 --batch_rows 4"
    flags += f" --tokenizer {write_tokenizer(tmp_path / 'tokenizer.model')} --encode_batch 8"
    flags += f" --autoencoder {write_autoencoder(tmp_path / 'autoencoder')} --unit_bytes 4000"
    command = [sys.executable, "-m", "pipelines.encode", *shlex.split(flags)]
    environment = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    submit = [RAY, "job", "submit", "--address", cluster]
    submit += ["--runtime-env-json", json.dumps({"env_vars": environment})]
    submitted = subprocess.run(
        [*submit, "--", *command, "--out", str(tmp_path / "submitted")],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    assert "succeeded" in submitted.stdout + submitted.stderr

    subprocess.run(
        [*command, "--out", str(tmp_path / "local")],
        check=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment,
        timeout=580,
    )
    remote_manifest, local_manifest = (
        Manifest.load(str(tmp_path / name)) for name in ("submitted", "local")
    )
    assert remote_manifest.sha256 == local_manifest.sha256
    assert remote_manifest.rows == 48
    assert all(not v.problems for v in verify(remote_manifest))
