"""Job stages with toy commands, which are real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from examples.demo.stages import JobStage, JobStageError, Runner, end_leftovers

ROOT = Path(__file__).parents[3]


def count(folder: Path, name: str, code: int = 0) -> JobStage:
    """A job stage that appends a line to `name`.txt."""
    script = f"open({str(folder / name)!r} + '.txt', 'a').write('x\\n'); raise SystemExit({code})"
    return JobStage(
        name,
        name,
        (sys.executable, "-c", script),
        outputs=(str(folder / f"{name}.txt"),),
        report=folder / f"{name}.report",
    )


def lines(folder: Path, name: str) -> int:
    path = folder / f"{name}.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def changed(stage: JobStage) -> JobStage:
    return JobStage(stage.name, stage.title, stage.command, ("changed",), stage.outputs)


def test_finished_job_stages_are_skipped_and_reports_kept(tmp_path: Path, capsys) -> None:
    runner = Runner(tmp_path / "stages")
    stages = [count(tmp_path, "one"), count(tmp_path, "two")]
    (tmp_path / "two.report").write_text('{"samples_per_second": 7}')
    first = runner.run(stages)
    second = runner.run(stages)
    assert first == second
    assert lines(tmp_path, "one") == lines(tmp_path, "two") == 1
    assert first["two"]["report"] == {"samples_per_second": 7}
    assert first["one"]["seconds"] > 0
    assert 0 < first["one"]["peak_rss_gib"] < 16
    assert capsys.readouterr().out.splitlines()[-1].startswith("= two: already finished")


def test_the_launcher_begins_the_command_and_is_no_part_of_the_result(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "stages")
    script = "import sys; print(sys.argv[1:], file=open(sys.argv[2], 'a'))"
    out = str(tmp_path / "out.txt")

    def stage(ranks: str) -> JobStage:
        return JobStage("one", "one", (out,), launcher=(sys.executable, "-c", script, ranks))

    marker = runner.run([stage("2")])["one"]
    assert marker["command"] == [sys.executable, "-c", script, "2", out]
    runner.run([stage("3")])
    assert Path(out).read_text() == f"['2', {out!r}]\n"


def test_a_changed_job_stage_and_those_after_it_start_over(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "stages")
    one, two, three = (count(tmp_path, n) for n in ("one", "two", "three"))
    runner.run([one, two, three])
    (tmp_path / "one.txt").write_text("x\nkept\n")
    (tmp_path / "three.txt").write_text("x\nstale\n")
    runner.run([one, changed(two), three])
    assert lines(tmp_path, "one") == 2
    assert (tmp_path / "three.txt").read_text() == "x\n"


def test_the_next_run_continues_from_the_job_stage_that_failed(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "stages")
    flag = tmp_path / "flag"
    script = f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    shaky = JobStage("shaky", "shaky", (sys.executable, "-c", script))
    last = count(tmp_path, "last")
    with pytest.raises(JobStageError, match="exit code 3"):
        runner.run([shaky, last])
    assert lines(tmp_path, "last") == 0
    flag.touch()
    done = runner.run([shaky, last])
    assert done["shaky"]["attempts"] == 2
    assert lines(tmp_path, "last") == 1


# Serves until it is ended, and records both in a file.
SERVER = """
import signal, sys, time
account = open(sys.argv[1], "a")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("up", file=account, flush=True)
print("export SERVED=" + account.name, flush=True)
signal.sigwait([signal.SIGTERM])
print("down", file=account)
"""


def test_a_service_is_up_from_the_first_to_the_last_job_stage_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVED", "before")
    account = tmp_path / "account"
    service = ((sys.executable, "-c", SERVER, str(account)), ("SERVED",))
    runner = Runner(tmp_path / "stages", services={"server": service})

    def stage(name: str, needs: tuple[str, ...], expected: str) -> JobStage:
        script = f"import os; assert os.environ['SERVED'] == {expected!r}"
        return JobStage(name, name, (sys.executable, "-c", script), needs=needs)

    served = [stage(name, ("server",), str(account)) for name in ("b", "c")]
    runner.run([stage("a", (), "before")])
    assert not account.exists()
    runner.run([stage("a", (), "before"), *served, stage("d", (), "before")])
    runner.run([stage("a", (), "before"), *served])
    assert account.read_text() == "up\ndown\n"


def test_a_service_that_does_not_start_fails_its_job_stage(tmp_path: Path) -> None:
    service = ((sys.executable, "-c", "print('export OTHER=1')"), ("SERVED",))
    runner = Runner(tmp_path / "stages", services={"server": service})
    with pytest.raises(JobStageError, match="did not start"):
        runner.run([JobStage("a", "a", (sys.executable, "-c", ""), needs=("server",))])


# A job stage whose grandchild leaves its session, as launchers' and daemons' children do.
ESCAPING = """
import os, subprocess, sys, time
kept = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"],
                        start_new_session=True)
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {kept.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""
DRIVER = """
import signal, sys
from pathlib import Path
from examples.demo.stages import JobStage, Runner
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell makes it ignored
folder, script, pids, seconds = sys.argv[1:]
Runner(Path(folder)).run([JobStage("s", "s", (sys.executable, "-c", script, pids, seconds))])
"""


def start(tmp_path: Path, seconds: str) -> "tuple[subprocess.Popen[bytes], list[int]]":
    pids = tmp_path / "pids"
    arguments = [str(tmp_path / "stages"), ESCAPING, str(pids), seconds]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return driver, [int(p) for p in pids.read_text().split()]


def gone(pids: list[int], within: float = 20.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        alive = [
            p
            for p in pids
            if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
        ]
        if not alive:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.chaos
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_killed_driver(tmp_path: Path, signum: signal.Signals) -> None:
    driver, pids = start(tmp_path, "120")
    assert not gone(pids, within=0.2)
    driver.send_signal(signum)
    assert gone(pids)
    driver.wait(timeout=20)
    attempt = json.loads((tmp_path / "stages" / "s.attempt.json").read_text())
    assert attempt["attempts"] == 1
    assert not (tmp_path / "stages" / "s.json").exists()


@pytest.mark.chaos
def test_processes_left_running_by_a_finished_job_stage_are_ended(tmp_path: Path) -> None:
    driver, pids = start(tmp_path, "0.2")
    assert driver.wait(timeout=30) == 0
    assert gone(pids)
    assert (tmp_path / "stages" / "s.json").exists()


@pytest.mark.chaos
def test_leftovers_are_ended_only_if_they_are_the_recorded_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours, other = subprocess.Popen(command), subprocess.Popen(command)
    try:
        seen = [psutil.Process(p.pid) for p in (ours, other)]
        record = [
            {"pid": seen[0].pid, "started": seen[0].create_time(), "command": command},
            {"pid": seen[1].pid, "started": seen[1].create_time() - 100, "command": command},
            {"pid": seen[1].pid, "started": seen[1].create_time(), "command": ["else"]},
        ]
        (tmp_path / "s.attempt.json").write_text(json.dumps({"processes": record}))
        assert end_leftovers(tmp_path) == 1
        assert gone([ours.pid])
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


@pytest.mark.parametrize("data", [b"", bytes(200), b'{"fingerprint": "', b"\xff", b"[]", b"{}"])
@pytest.mark.parametrize("damaged", ["marker", "attempt"])
def test_a_damaged_record_costs_no_outputs(
    tmp_path: Path, caplog, capsys, damaged: str, data: bytes
) -> None:
    runner = Runner(tmp_path / "stages")
    stage = count(tmp_path, "one")
    runner.run([stage])
    marker, attempt = tmp_path / "stages" / "one.json", tmp_path / "stages" / "one.attempt.json"
    if damaged == "attempt":
        marker.unlink()
    path = marker if damaged == "marker" else attempt
    path.write_bytes(data)
    end_leftovers(tmp_path / "stages")
    done = runner.run([stage])
    assert lines(tmp_path, "one") == 2  # the second attempt kept the output of the first
    assert runner.run([stage]) == done
    assert "its record is damaged" in capsys.readouterr().out.splitlines()[2]
    assert f"{path} is damaged" in caplog.text
