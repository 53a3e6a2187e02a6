"""A real MLflow server on loopback with a SQL backend, which tests kill and restart."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil


class MlflowServer:
    """Keeps runs in `folder`/mlflow.db; serves artifacts from a folder or an S3 prefix."""

    def __init__(self, folder: Path, artifacts: str = "", env: dict[str, str] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._env = folder, env or {}
        self._artifacts = artifacts or str(folder / "artifacts")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and return once it answers."""
        command = [str(Path(sys.executable).parent / "mlflow"), "server"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", self._artifacts, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | quiet | self._env,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 600
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        self.kill()
        raise TimeoutError((self._folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """Send SIGKILL to the server and its children."""
        assert self._process is not None
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(self._process.pid)
            for process in [*server.children(recursive=True), server]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
