"""How jobs begin and end, as processes in unusual but real environments."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mdm.storage import open_store
from pipelines import checkpoints, encode, explain, export, train_tokenizer, verify
from tests.data_sets import write_tokenizer, write_ultrachat
from tests.helpers import ROOT
from tests.unit.pipelines.test_verify import publish_quarantine, records

PIPELINES = ROOT / "pipelines"
IN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(job: str, *flags: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(PIPELINES / f"{job}.py"), *flags],
        env={k: v for k, v in os.environ.items() if k != "LANG"}
        | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("env", "encoding"),
    [({"PYTHONIOENCODING": "latin-1"}, "latin-1"), (IN_C, "utf-8"), ({}, "utf-8")],
    ids=["latin-1", "C", "as it is"],
)
def test_characters_that_a_terminal_cannot_show_are_replaced(
    env: dict[str, str], encoding: str, tmp_path: Path
) -> None:
    at = tmp_path / "é 漢"
    publish_quarantine(str(at), records("some", 3))
    out, err = start("verify", "--data", str(at), "--quarantine", **env).communicate()
    assert err == b""
    rows = [json.loads(line) for line in out.decode(encoding).splitlines()]
    shown = "漢".encode(encoding, "replace").decode(encoding)
    assert [row["id"] for row in rows] == [f"some/train/{shown} {i}" for i in range(3)]


def test_a_job_interrupted_during_its_imports_ends_silently(tmp_path: Path) -> None:
    job = start("verify", "--data", str(tmp_path))
    maps = Path(f"/proc/{job.pid}/maps")
    wait_until(lambda: "pyarrow" in maps.read_text())
    job.send_signal(signal.SIGINT)
    out, err = job.communicate()
    assert (job.returncode, out, err) == (130, b"", b"")


def test_a_job_interrupted_at_work_ends_with_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")  # its reader blocks
    job = start("verify", "--data", str(tmp_path))
    writer = os.open(tmp_path / "manifest.json", os.O_WRONLY)  # returns once the job reads
    job.send_signal(signal.SIGINT)
    out, err = job.communicate()
    os.close(writer)
    assert (job.returncode, out, err) == (130, b"", b"\nverify: interrupted\n")


@pytest.mark.parametrize("ending", ["time.sleep(60)", "weakref.finalize(main, time.sleep, 60)"])
def test_a_job_interrupted_twice_ends_at_once(ending: str) -> None:
    script = f"""
import signal, sys, time, weakref
from mdm.launch import job as start
start._begin()
@start.job("test")
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        {ending}
sys.exit(main())
"""
    command = [sys.executable, "-c", script]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout is not None
    for line in (b"ready\n", b"ending\n"):
        assert job.stdout.readline() == line
        job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=50)
    assert job.returncode == 130
    assert b"Traceback" not in err


def test_a_closed_pipe_ends_a_job_silently(tmp_path: Path) -> None:
    publish_quarantine(str(tmp_path), records("some", 30))
    with start("verify", "--data", str(tmp_path), "--quarantine") as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == b""
        assert job.wait() == 1


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        (train_tokenizer, ["--datasets=ultrachat={raw}", "--out={bad}", "--vocab_size=20"]),
        (export, ["--checkpoint={bad}/step-00000001", "--out={bad}"]),
        (verify, ["--data={bad}"]),
        (explain, ["--data={bad}", "--sources=a:1", "--step=0"]),
        (
            encode,
            [
                *("--dataset=ultrachat", "--root={raw}", "--split=train"),
                *("--out={bad}", "--tokenizer={model}"),
            ],
        ),
        (checkpoints, ["prune", "--at={bad}"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("bad", ["/proc/nowhere", "{file}/below", "/proc/self/mem"])
def test_a_folder_that_cannot_be_used_ends_a_job_with_one_line(
    job, flags, bad, tmp_path, monkeypatch, capsys
) -> None:
    raw = write_ultrachat(tmp_path / "raw", [["hello one", "and two"]] * 30)
    model = write_tokenizer(tmp_path / "tokenizer.model")
    given = [f.format(raw=raw, model=model, bad=bad.format(file=model)) for f in flags]
    monkeypatch.setattr(sys, "argv", [job.__name__, *given])
    try:
        code = job.main()
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if job in (verify, checkpoints):  # a set that is not there: BAD; no checkpoints: none to prune
        assert code in (0, 1, 2)
        return
    assert code == 2
    name = job.__name__.rpartition(".")[2]
    assert captured.err.replace("\r", "\n").splitlines()[-1].startswith(f"{name}: ")


def test_a_user_without_a_name_or_a_home_gets_both() -> None:
    drop = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    drop += [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps")]
    if subprocess.run([*drop, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not become another one")
    script = """
import os, sys
from mdm.launch import job as start
start._begin()
import getpass, pathlib
home = pathlib.Path.home()
(home / "file").touch()
print(getpass.getuser(), home)
"""
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}
    for more in ({}, {"HOME": "/nonexistent"}):
        done = subprocess.run(
            [*drop, sys.executable, "-c", script],
            env=env | more | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        name, home = done.stdout.split()
        assert name == "uid-12345"
        assert not Path(home).exists()  # removed at its end


@pytest.mark.slow
def test_encoding_works_without_a_home_and_with_a_tmpdir_that_is_long_and_not_ascii(
    tmp_path: Path,
) -> None:
    temporary = tmp_path / ("a b é" + "x" * 70)
    temporary.mkdir()
    raw = write_ultrachat(tmp_path / "raw", [["hello one", f"and two {n}"] for n in range(3)])
    model = write_tokenizer(tmp_path / "tokenizer.model")
    out = tmp_path / "out #1, é"
    before = set(Path("/tmp").glob("mdm-*"))
    job = start(
        "encode",
        *("--dataset=ultrachat", f"--root={raw}", "--split=train", f"--tokenizer={model}"),
        *(f"--out={out.as_uri()}", "--no_near_duplicates"),
        **(
            {"TMPDIR": str(temporary), "HOME": "/nonexistent", "PYTHONIOENCODING": "latin-1"} | IN_C
        ),
    )
    printed, err = job.communicate(timeout=300)
    assert job.returncode == 0, err.decode(errors="replace")
    assert json.loads(printed)["examples"] == 3
    assert open_store(str(out)).exists("manifest.json")
    assert not [p.name for p in temporary.iterdir() if p.name.startswith("mdm-")]
    assert set(Path("/tmp").glob("mdm-*")) <= before
    shutil.rmtree(temporary)
