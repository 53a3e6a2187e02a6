"""The flags of all jobs: each answers `--help`, and none keeps a former name."""

import pytest

from docs.generate import flag_names, jobs
from mdm.presets import PRESETS
from mdm.utils.command_line import parse_cli
from mdm.utils.flags import flag_types
from mdm.utils.saved_config import RENAMED

JOBS = jobs()


def output_of(cls: type, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code of a job with these flags, and what it prints."""
    presets = PRESETS if "preset" in flag_types(cls) else None
    with pytest.raises(SystemExit) as ended:
        parse_cli(cls, argv, presets=presets)
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


@pytest.mark.parametrize("path", JOBS)
def test_help_lists_all_flags(path, capsys):
    code, text = output_of(JOBS[path], ["--help"], capsys)
    assert code == 0
    words = text.replace(",", " ").split()
    assert {f"--{name}" for name in flag_names(JOBS[path])} <= set(words)


@pytest.mark.parametrize(
    ("path", "former"),
    [
        (path, former)
        for path, cls in JOBS.items()
        for former, present in RENAMED.items()
        if present in flag_types(cls)
    ],
)
def test_a_former_flag_of_a_job_ends_with_the_present_one(path, former, capsys):
    argv = ["--preset", "demo"] if "preset" in flag_types(JOBS[path]) else []
    code, text = output_of(JOBS[path], [*argv, f"--{former}", "1"], capsys)
    assert (code, text.count("\n")) == (2, 1)
    assert f"--{former} is now --{RENAMED[former]}" in text


def test_every_former_name_has_a_present_one_in_some_job():
    flags = set().union(*map(flag_types, JOBS.values()))
    assert set(RENAMED.values()) <= flags
    assert not set(RENAMED) & {name for name in flags if "." in name}
