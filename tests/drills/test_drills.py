"""The drill runner, and the runbooks: sections, links and flags. Drills execute the commands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generate import flag_names, jobs
from tests.drills import __main__ as runner
from tests.drills import runbook
from tests.drills.drill import Row, Setting

PAGES = sorted(p.name for p in runbook.RUNBOOKS.glob("*.md"))


def passing_drill(setting: Setting) -> Iterator[Row]:
    yield Row("kill", setting.rounds, setting.rounds, 0, True, 1.5)


def raising_drill(setting: Setting) -> Iterator[Row]:
    yield Row("flip", 3, 3, 0, False, 0.0)
    raise RuntimeError("broke off")


@pytest.mark.parametrize(
    ("only", "code", "rows"), [("passing_drill", 0, 1), ("raising_drill,passing_drill", 1, 3)]
)
def test_the_report_sums_the_rows_and_a_drill_that_raises_fails(
    only: str, code: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "DRILLS", (passing_drill, raising_drill))
    assert runner.main(["--only", only, "--rounds", "4", "--out", str(tmp_path)]) == code
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["rows"]) == rows
    assert report["injected"] == (4 if rows == 1 else 8)
    assert report["survived"] == (4 if rows == 1 else 7)
    assert (report["lost"], report["bitwise_equal"]) == (0, rows == 1)


def test_an_unknown_drill_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--only", "nothing"])
    assert "no drill nothing; there are encode_network" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_a_runbook_has_the_sections_of_an_incident_or_a_task(page: str) -> None:
    runbook.read_page(page)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_runbook_lead_to_pages(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", runbook.read_page(page)):
        assert (runbook.RUNBOOKS / target).is_file(), target


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Name of each job of `pipelines` -> its flags."""
    return {
        Path(path).stem: {f"--{name}" for name in flag_names(cls)}
        for path, cls in jobs().items()
        if path.startswith("pipelines/")
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_runbook_has_flags_that_its_job_knows(
    page: str, flags: dict[str, set[str]]
) -> None:
    commands = runbook.read_page(page).replace("\\\n", " ").splitlines()
    for command in commands:
        command = command.replace("infra/slurm/pretrain.sbatch", "pipelines/pretrain.py")
        for job, arguments in re.findall(r"pipelines/(\w+)\.py(.*?)(?= -- |$)", command):
            unknown = set(re.findall(r"(?<= )--[\w.-]+", arguments)) - flags[job]
            assert not unknown, f"{job}.py has no flag {', '.join(unknown)}"


def test_every_flag_named_in_a_runbook_belongs_to_some_job(flags: dict[str, set[str]]) -> None:
    known = set().union(*flags.values())
    for page in PAGES:
        for code in runbook.inline_code(page):
            names = re.findall(r"^--[\w.]+|(?<= )--[\w.]+", code)
            assert known.issuperset(names), f"{page}: {code}"


def test_blocks_run_in_order_and_a_failing_block_fails_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runbook, "RUNBOOKS", tmp_path)
    headings = "".join(f"## {section}\n" for section in runbook.TASK)
    page = tmp_path / "page.md"
    page.write_text(f"{headings}```bash\necho $NAME > {tmp_path}/a\n```\n```\nnot run\n```\n")
    runbook.execute("page.md", {"NAME": "value"})
    assert (tmp_path / "a").read_text() == "value\n"
    page.write_text(f"{headings}```bash\nfalse\ntrue\n```\n")
    with pytest.raises(runbook.RunbookError, match="block 1 exited with 1"):
        runbook.execute("page.md", {})
    page.write_text("## What to do\n")
    with pytest.raises(runbook.RunbookError, match="has the sections What to do; an incident has"):
        runbook.bash_blocks("page.md")
