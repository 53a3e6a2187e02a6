"""Small trainings in one process, each in a folder whose bookkeeping was damaged in one way.

`damage_job.py FOLDER`: FOLDER/base is trained whole; FOLDER/KIND is a copy of it, damaged and
started again; what was logged goes to FOLDER/KIND.log and the exit codes to FOLDER/codes.json.
"""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from mdm.train.engine import start_ranks, stop_ranks
from mdm.train.loop import train
from tests.helpers import MemoryLoader, SmallLoss, small_config
from tests.unit.checkpoint.damage import KINDS, NAMES, damaged

STEPS = 4


def start(run_dir: Path, **settings: Any) -> int:
    """Train to the end; what is logged goes beside the folder."""
    config = small_config(run_dir, steps=STEPS, checkpoint_every=STEPS // 2, snapshots=1)
    log, handler = logging.getLogger("mdm"), logging.FileHandler(f"{run_dir}.log")
    log.addHandler(handler)
    world = start_ranks(1)
    try:
        return train(config, world, SmallLoss, MemoryLoader, **settings)
    finally:
        log.removeHandler(handler)
        handler.close()


def main() -> None:
    folder = Path(sys.argv[1])
    codes = {"untracked": start(folder / "untracked", track=False)}
    assert "mlflow" not in sys.modules
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # importing it raises
    codes["uninstalled"] = start(folder / "uninstalled")
    del sys.modules["mlflow"]

    codes["base"] = start(folder / "base")
    for kind in KINDS:
        run_dir = folder / kind
        shutil.copytree(folder / "base", run_dir)
        for name in NAMES:
            path = run_dir / name
            data = damaged(path.read_bytes(), kind, lines=name.endswith(".jsonl"))
            if data is None:
                path.unlink()
                path.mkdir()
            else:
                path.write_bytes(data)
        codes[kind] = start(run_dir)

    exported = folder / "exported"
    shutil.copytree(folder / "base", exported)
    shutil.rmtree(exported / "export")
    codes["exported"] = start(exported)
    with (exported / "export" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    codes["exported"] += start(exported)
    (folder / "codes.json").write_text(json.dumps(codes))
    stop_ranks()


if __name__ == "__main__":
    main()
