"""The runner and the runbooks themselves: what they say must be true."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills import __main__ as runner
from tests.drills import runbook
from tests.drills.drill import Row, Setting


def good(setting: Setting) -> Iterator[Row]:
    yield Row("kill", setting.rounds, setting.rounds, 0, True, 1.5)


def bad(setting: Setting) -> Iterator[Row]:
    yield Row("flip", 3, 3, 0, False, 0.0)
    raise RuntimeError("broke off")


@pytest.mark.parametrize(("only", "code", "rows"), [("good", 0, 1), ("bad,good", 1, 3)])
def test_the_report_adds_up_and_a_broken_drill_fails(
    only: str, code: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "DRILLS", (good, bad))
    assert runner.main(["--only", only, "--rounds", "4", "--out", str(tmp_path)]) == code
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["rows"]) == rows
    assert report["injected"] == (4 if rows == 1 else 8)
    assert report["survived"] == (4 if rows == 1 else 7)
    assert (report["lost"], report["bitwise_equal"]) == (0, rows == 1)


def test_an_unknown_drill_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--only", "nothing"])
    assert "no drill nothing; there are encode_network" in capsys.readouterr().err


@pytest.mark.parametrize("page", sorted(p.name for p in runbook.RUNBOOKS.glob("*.md")))
def test_every_page_has_its_sections(page: str) -> None:
    runbook.blocks(page)


def test_blocks_run_in_order_and_one_that_fails_fails_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runbook, "RUNBOOKS", tmp_path)
    text = "**Symptom.** **Check.** **Do.** **It worked when** **Lost:**\n"
    page = tmp_path / "page.md"
    page.write_text(f"{text}```bash\necho $NAME > {tmp_path}/a\n```\n```\nnot run\n```\n")
    runbook.execute("page.md", {"NAME": "value"})
    assert (tmp_path / "a").read_text() == "value\n"
    page.write_text(f"{text}```bash\nfalse\ntrue\n```\n")
    with pytest.raises(runbook.RunbookError, match="block 1 ended with 1"):
        runbook.execute("page.md", {})
    page.write_text("**Do.**")
    with pytest.raises(runbook.RunbookError, match="lacks: Symptom, Check, It worked when, Lost"):
        runbook.blocks("page.md")
