"""What a supervisor reads of its ranks, whatever state their files are in."""

import json

import pytest

from mdm.train.heartbeat import Ended, read_beats, read_ends

REPORT = {"rank": 1, "code": 75, "reason": "saved", "blamed": [0]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(50),
        b'{"rank": 0',
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({**REPORT, "code": "1"}).encode(),
    ],
)
def test_a_damaged_end_report_is_skipped(tmp_path, caplog, data):
    (tmp_path / "rank-00000.json").write_bytes(data)
    (tmp_path / "rank-00001.json").write_text(json.dumps(REPORT))
    assert read_ends(tmp_path) == [Ended(1, 75, "saved", (0,))]
    assert "rank-00000.json is damaged" in caplog.text


def test_a_heartbeat_file_that_is_being_created_is_ignored(tmp_path):
    (tmp_path / "rank-00000").write_bytes(b"")
    (tmp_path / "rank-00001").write_bytes(bytes(24) + b"\xff" * 16)
    assert list(read_beats(tmp_path)) == [1]
