"""The job `verify.py`: here its list of the quarantine; what it checks is tested with `mdm`."""

import dataclasses
import json
import sys

import pytest

from mdm.data.manifest import Quarantined, publish
from mdm.data.manifest_parts import quarantine_parts
from mdm.storage import open_store
from pipelines import verify as job
from tests.data_sets import planned


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify.py", *args])
        try:
            code = job.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def records(name: str, count: int) -> list[Quarantined]:
    reason = 'damaged image: "é" \\ \n in 2 lines'
    return [
        Quarantined(f"{name}/train/漢 {i}", reason, f"a.json@{i}, {i}.png") for i in range(count)
    ]


def publish_quarantine(uri: str, found: list[Quarantined]) -> None:
    """A data set whose shards are not there: who lists its quarantine reads none of them."""
    manifest = dataclasses.replace(planned([20]), quarantine=quarantine_parts(found, size=4))
    publish(open_store(uri), manifest)


def test_the_quarantine_is_listed_as_a_line_of_json_a_record(uri, run):
    sets = {f"{uri}/one": records("one", 10), f"{uri}/two": [], f"{uri}/three": records("three", 1)}
    for at, found in sets.items():
        publish_quarantine(at, found)
    code, out, err = run(*(f"--data={at}" for at in sets), "--quarantine")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [dataclasses.asdict(record) for found in sets.values() for record in found]
    assert list(rows[0]) == ["id", "reason", "origin"]
    assert "漢" in out  # for people: not escaped
    assert run("--data", f"{uri}/two", "--quarantine") == (0, "", "")
    # Without the flag the same data set is re-read, and its shard is missing.
    code, out, _ = run("--data", f"{uri}/two")
    assert code == 1
    assert "to repair: verify.py --discard" in out


def test_what_is_no_data_set_is_one_line(tmp_path, run):
    code, out, err = run("--data", str(tmp_path), "--quarantine")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("verify: ")
    assert "holds no encoded data set" in err
    code, out, err = run("--data", str(tmp_path), "--quarantine", "--discard")
    assert (code, out) == (2, "")
    assert "give either --discard or --quarantine" in err
