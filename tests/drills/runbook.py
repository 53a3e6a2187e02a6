"""Runbook pages are executed: their ```bash blocks in order, each of which must succeed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "runbooks"
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTIONS = ("Symptom", "Check", "Do", "It worked when", "Lost")


class RunbookError(AssertionError):
    """A page that lacks a section, or a command of which failed."""


def blocks(page: str) -> list[str]:
    """The command blocks of a page; RunbookError where a section is missing."""
    text = (RUNBOOKS / page).read_text()
    missing = [s for s in _SECTIONS if f"**{s}" not in text]
    if missing:
        raise RunbookError(f"{page} lacks: {', '.join(missing)}")
    return _BLOCK.findall(text)


def execute(page: str, variables: dict[str, str], timeout: float = 900) -> str:
    """Run the page as a person would who has set its variables; what it printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    said = ""
    for number, block in enumerate(blocks(page), start=1):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        said += done.stdout
        if done.returncode:
            raise RunbookError(
                f"{page}: block {number} ended with {done.returncode}: {done.stdout[-1500:]}"
            )
    return said
