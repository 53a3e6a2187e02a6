"""Fixtures that several test folders share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mdm.storage.server import S3Server
from mdm.utils.precision import describe, resolve


def pytest_report_header() -> str:
    """Print the precision in which training and generation are tested on this machine."""
    return f"precision auto: {describe(resolve('auto'))}"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let the jobs that tests start receive SIGINT, which a shell ignores for background jobs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: test tensors are tiny, and more threads only wait for busy cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, for the whole session."""
    with S3Server(tmp_path_factory.mktemp("s3"), bucket="test") as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An S3 prefix for this test alone; the environment variables point to its server."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://test/{abs(hash(request.node.nodeid))}"


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for objects: once a local folder, once a prefix on a real S3 server."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")
