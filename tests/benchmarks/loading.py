"""What the benchmarks of the loader share: the peers' packages, data sets, and runs in turn."""

import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.timing import Result
from tests.helpers import ROOT

HERE = ROOT / "tests" / "benchmarks"
PEERS = ROOT / "runs" / "bench" / "peers"  # the peers' own environment
DATA = ROOT / "runs" / "bench" / "loader"
ROUNDS = 3
OURS = frozenset(("ours", "ours, one window", "memcpy", "plain Arrow IPC"))
FIGURES = {
    "samples_per_second": "{:8.0f} samples/s",
    "cpu_us_per_sample": "{:6.1f} us CPU a sample",
    "first_batch_s": "first batch {:.3f} s",
    "resume_s": "resume {:.3f} s",
    "peak_rss_mib": "{:5.0f} MiB",
}

Figures = dict[str, float | None]


def peers_python() -> Path:
    """The interpreter of the peers' environment, which is made unless it is there."""
    python, wanted = PEERS / "bin" / "python", HERE / "loader_peers.txt"
    mark = PEERS / "requirements.txt"
    if not mark.exists() or mark.read_text() != wanted.read_text():
        print(f"  installing the peers into {PEERS.relative_to(ROOT)}", flush=True)
        venv.create(PEERS, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "--progress-bar", "off"]
        subprocess.run([*install, "-r", str(wanted)], check=True)
        mark.write_text(wanted.read_text())
    return python


def job(contestant: str, *args: str, env: dict[str, str] | None = None) -> str:
    """The last line that `loader_job.py` prints; RuntimeError with its end if it fails."""
    mine = contestant in OURS or contestant == "arrow"
    done = subprocess.run(
        [sys.executable if mine else str(peers_python()), str(HERE / "loader_job.py"), *args],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"{contestant} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return next((x for x in reversed(done.stdout.splitlines()) if x.startswith("{")), "")


def written(form: str) -> Path:
    """The folder of the samples in a format, written unless it is there."""
    folder, mark = DATA / form, DATA / f"{form}.done"
    if not mark.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        job(form, "write", form, str(folder))
        mark.touch()
    return folder


def in_turn(places: dict[str, str], env: dict[str, str] | None = None) -> dict[str, Figures]:
    """Medians of the figures of each contestant over rounds in which each has its turn.

    `places` says where each finds its data set.
    """
    found: dict[str, list[Figures]] = {name: [] for name in places}
    for _ in range(ROUNDS):
        for name, place in places.items():
            scratch = str(DATA / "scratch")
            found[name].append(json.loads(job(name, "read", name, place, scratch, env=env)))
    return {name: _medians(rounds) for name, rounds in found.items()}


def _medians(rounds: Sequence[Figures]) -> Figures:
    def median(key: str) -> float | None:
        values = [x for r in rounds if (x := r[key]) is not None]
        return statistics.median(values) if values else None

    return {key: median(key) for key in rounds[0]}


def result(name: str, found: dict[str, Figures], floors: Sequence[str], setting: str) -> Result:
    """Ours beside the peers in samples a second; CPU and the rest below `more`.

    `cpu_ratio` is the least CPU time a sample of the peers over ours.
    """
    for who, figures in found.items():
        texts = (text.format(figures[key]) for key, text in FIGURES.items() if figures[key])
        print(f"  {who:>20}: " + ", ".join(texts), flush=True)

    def of(who: str, key: str) -> float:
        value = found[who][key]
        assert value is not None
        return value

    peers = [who for who in found if who not in OURS]
    least_cpu = min(of(who, "cpu_us_per_sample") for who in peers)
    load = os.getloadavg()[0]
    more = {
        "cpu_ratio": least_cpu / of("ours", "cpu_us_per_sample"),
        "load_average": load,
        "contestants": found,
    }
    print(f"  cpu_ratio {more['cpu_ratio']:.2f}, load average {load:.1f}", flush=True)
    return Result(
        name,
        "samples/s",
        of("ours", "samples_per_second"),
        {who: of(who, "samples_per_second") for who in peers},
        setting,
        max((of(who, "samples_per_second") for who in floors), default=None),
        lower_is_better=False,
        more=more,
    )
