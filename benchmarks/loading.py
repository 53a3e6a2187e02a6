"""Shared by the loader benchmarks: the peers' packages, the data sets, and the runs in turn."""

import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.timing import Result
from tests.helpers import ROOT

JOB = Path(__file__).with_name("loader_job.py")
REQUIREMENTS = Path(__file__).with_name("loader_peers.txt")
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
    """The interpreter of the peers' environment, which is created if it is missing."""
    python = PEERS / "bin" / "python"
    mark = PEERS / "requirements.txt"
    if not mark.exists() or mark.read_text() != REQUIREMENTS.read_text():
        print(f"  installing the peers into {PEERS.relative_to(ROOT)}", flush=True)
        venv.create(PEERS, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "--progress-bar", "off"]
        subprocess.run([*install, "-r", str(REQUIREMENTS)], check=True)
        mark.write_text(REQUIREMENTS.read_text())
    return python


def job(contestant: str, *args: str, env: dict[str, str] | None = None) -> str:
    """The last JSON line that `loader_job.py` prints; RuntimeError with its stderr if it fails."""
    is_ours = contestant in OURS or contestant == "arrow"
    process = subprocess.run(
        [sys.executable if is_ours else str(peers_python()), str(JOB), *args],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    if process.returncode:
        raise RuntimeError(
            f"{contestant} ended with {process.returncode}:\n{process.stderr[-2000:]}"
        )
    return next((x for x in reversed(process.stdout.splitlines()) if x.startswith("{")), "")


def data_folder(form: str) -> Path:
    """The folder with the samples in one format; it is written if it is missing."""
    folder, mark = DATA / form, DATA / f"{form}.done"
    if not mark.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        job(form, "write", form, str(folder))
        mark.touch()
    return folder


def in_turn(places: dict[str, str], env: dict[str, str] | None = None) -> dict[str, Figures]:
    """The median figures of each contestant over several rounds; in a round, each runs once.

    `places` gives the folder or URI of the data set, by contestant.
    """
    rounds: dict[str, list[Figures]] = {name: [] for name in places}
    for _ in range(ROUNDS):
        for name, place in places.items():
            scratch = str(DATA / "scratch")
            rounds[name].append(json.loads(job(name, "read", name, place, scratch, env=env)))
    return {name: _medians(figures) for name, figures in rounds.items()}


def _medians(rounds: Sequence[Figures]) -> Figures:
    def median(key: str) -> float | None:
        values = [x for r in rounds if (x := r[key]) is not None]
        return statistics.median(values) if values else None

    return {key: median(key) for key in rounds[0]}


def result(name: str, figures: dict[str, Figures], floors: Sequence[str], setting: str) -> Result:
    """Compare ours with the peers in samples per second; CPU time and the rest are in `more`.

    `cpu_ratio` is the lowest CPU time per sample among the peers, divided by ours.
    """
    for contestant, values in figures.items():
        texts = (text.format(values[key]) for key, text in FIGURES.items() if values[key])
        print(f"  {contestant:>20}: " + ", ".join(texts), flush=True)

    def figure(contestant: str, key: str) -> float:
        value = figures[contestant][key]
        assert value is not None
        return value

    peers = [contestant for contestant in figures if contestant not in OURS]
    least_cpu = min(figure(peer, "cpu_us_per_sample") for peer in peers)
    load = os.getloadavg()[0]
    more = {
        "cpu_ratio": least_cpu / figure("ours", "cpu_us_per_sample"),
        "load_average": load,
        "contestants": figures,
    }
    print(f"  cpu_ratio {more['cpu_ratio']:.2f}, load average {load:.1f}", flush=True)
    return Result(
        name,
        "samples/s",
        figure("ours", "samples_per_second"),
        {peer: figure(peer, "samples_per_second") for peer in peers},
        setting,
        max((figure(floor, "samples_per_second") for floor in floors), default=None),
        lower_is_better=False,
        more=more,
    )
