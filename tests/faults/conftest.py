"""The encode job of these tests, and its output when nothing goes wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.encode_job import Job


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed")
    code, summary, stderr = job.run(str(out))
    assert code == 0, stderr
    return out, summary
