"""`make drill`: inject real faults into real jobs, print a table, write `runs/drill/report.json`.

The exit code is 1 unless every fault was survived without loss.
`python -m tests.drills --only encode_kills --rounds 3` runs one drill, with fewer kills.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.config import doc
from mdm.utils.command_line import fail, parse_cli
from tests.drills import data, hostile_records, training, training_pages
from tests.drills.drill import Drill, Row, Setting
from tests.drills.two_trainings import two_trainings

DRILLS: tuple[Drill, ...] = (
    data.encode_network,
    data.loader_network,
    data.loader_kills,
    data.encode_kills,
    data.disk_full,
    data.cache_full,
    data.clock_skew,
    data.two_jobs,
    data.runbooks,
    hostile_records.hostile_records,
    training.training_signals,
    training.training_numbers,
    training.training_damage,
    training.training_store,
    training.tracking_away,
    two_trainings,
    training_pages.training_runbooks,
)


@dataclass(frozen=True)
class Flags:
    """Flags of the drills."""

    only: str = doc("", "names of drills, separated by commas; empty: all")
    rounds: int = doc(30, "random kills in each drill that kills processes")
    seed: int = doc(0, "seed of everything random")
    out: str = doc("runs/drill", "folder of report.json")


def select_drills(only: str) -> list[Drill]:
    """The drills with these names, or all drills; ValueError for an unknown name."""
    by_name = {d.__name__: d for d in DRILLS}
    unknown = [name for name in only.split(",") if name and name not in by_name]
    if unknown:
        raise ValueError(f"no drill {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in only.split(",") if name] or list(DRILLS)


def table_line(name: str, row: Row) -> str:
    equal = "yes" if row.bitwise_equal else "NO"
    return (
        f"{name:<16} {row.fault:<34} {row.injected:>8} {row.survived:>8} {row.lost:>4} {equal:>7} "
        f"{row.seconds_lost:>9.1f}  {row.note}"
    )


def passed(row: dict[str, Any]) -> bool:
    all_survived: bool = row["survived"] == row["injected"]
    return all_survived and row["bitwise_equal"] and not row["lost"]


def write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    report = {
        "injected": sum(r["injected"] for r in rows),
        "survived": sum(r["survived"] for r in rows),
        "lost": sum(r["lost"] for r in rows),
        "bitwise_equal": all(r["bitwise_equal"] for r in rows),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_cli(Flags, argv, description=__doc__)
    try:
        drills = select_drills(flags.only)
    except ValueError as error:
        fail(f"drill: {error}")
    rows: list[dict[str, Any]] = []
    path = Path(flags.out) / "report.json"
    print(
        f"{'drill':<16} {'fault':<34} {'injected':>8} {'survived':>8} {'lost':>4} {'bitwise':>7} "
        f"{'s lost':>9}"
    )
    for drill in drills:
        name, began = drill.__name__, time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"drill-{name}-") as folder:
            try:
                for row in drill(Setting(Path(folder), flags.rounds, flags.seed)):
                    rows.append({"drill": name, **dataclasses.asdict(row)})
                    print(table_line(name, row), flush=True)
            except Exception as error:  # noqa: BLE001 - the other drills still run
                message = f"{type(error).__name__}: {error}"[:2000]
                row = Row("the drill itself", 1, 0, 0, False, time.monotonic() - began, message)
                rows.append({"drill": name, **dataclasses.asdict(row)})
                print(table_line(name, row), flush=True)
        write_report(path, rows)
    failed = [r for r in rows if not passed(r)]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed; {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
