"""Executes a runbook page: its ```bash blocks in order (not the ```sh blocks). All must succeed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "runbooks"
_BASH_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)

# A page is about something that went wrong, or about a task.
INCIDENT = ("Symptom", "Confirm", "What to do", "Verify", "What is lost", "Prevent")
TASK = ("When to use this page", "Before you start", "What to do", "Verify", "Notes")


class RunbookError(AssertionError):
    """A page with the wrong sections, or with a command that failed."""


def read_page(page: str) -> str:
    """The text of a page; RunbookError unless its sections are `INCIDENT` or `TASK`."""
    text = (RUNBOOKS / page).read_text()
    sections = tuple(_HEADING.findall(_FENCED_BLOCK.sub("", text)))
    if sections not in (INCIDENT, TASK):
        raise RunbookError(
            f"{page} has the sections {', '.join(sections) or 'none'}; an incident has "
            f"{', '.join(INCIDENT)}; a task has {', '.join(TASK)}"
        )
    return text


def inline_code(page: str) -> list[str]:
    """The code spans in the prose of a page, with line breaks as spaces."""
    prose = _FENCED_BLOCK.sub("", read_page(page))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def bash_blocks(page: str) -> list[str]:
    """The commands of a page that are executed, one string a block."""
    return _BASH_BLOCK.findall(read_page(page))


def execute(page: str, variables: dict[str, str], timeout: float = 900) -> str:
    """Run a page's commands with its variables set, as an operator would; returns the output."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    output = ""
    for number, block in enumerate(bash_blocks(page), start=1):
        finished = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        output += finished.stdout
        if finished.returncode:
            raise RunbookError(
                f"{page}: block {number} exited with {finished.returncode}: "
                f"{finished.stdout[-1500:]}"
            )
    return output
