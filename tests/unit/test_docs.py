"""README, docs and runbooks quote what is there: links, commands, flags, targets, names."""

import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from docs.generate import flag_names, jobs

ROOT = Path(__file__).parents[2]
GENERATED = ("docs/reference/api/", "docs/how-to/runbooks/")
PAGES = sorted(
    path
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "runbooks").glob("*.md"),
    )
    if not str(path.relative_to(ROOT)).startswith((*GENERATED, "docs/_build"))
    and path.name not in ("commands.md", "configuration.md")
)
SECTIONS = "(model|objective|data|train|guard)"  # of the configuration
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
# Flags of launchers, and of other programs, in lines that also start a job of ours.
LAUNCHERS = {
    "deepspeed": {"num_accelerators"},
    "torchrun": {"nproc_per_node"},
    "sbatch": {"nodes"},
    "ray": {"address"},
}


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def flags() -> dict[str, set[str]]:
    """Path of each job -> the names of its flags."""
    return {path: flag_names(cls) for path, cls in jobs().items()}


def blocks(text: str) -> list[str]:
    """The command lines of all fenced blocks, continued lines joined."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    lines = [block for name, block in found if name in ("", "bash", "slurm", "kubernetes")]
    return [line for block in lines for line in block.replace("\\\n", " ").splitlines()]


def commands(line: str) -> list[tuple[str, list[str]]]:
    """(path of a job, names of the flags after it) of one command line, hyphens as underscores."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a line of a here-document or of a message
        return []
    found: list[tuple[str, list[str]]] = []
    launcher = ""
    for word in words:
        name = Path(word).name
        module = word.replace(".", "/") + ".py"
        if word.endswith(".py") and "/" in word:
            found.append((word, []))
        elif re.fullmatch(r"(pipelines|examples)\.[\w.]+", word):
            found.append((module, []))
        elif name in LAUNCHERS:
            launcher = name
        elif word.startswith("--") and len(word) > 2:
            flag = word[2:].partition("=")[0].replace("-", "_")
            if found and flag not in LAUNCHERS.get(launcher, ()):
                found[-1][1].append(flag)
    if "infra/slurm/pretrain.sbatch" in words:
        after = words[words.index("infra/slurm/pretrain.sbatch") :]
        names = [w[2:].replace("-", "_") for w in after if w.startswith("--")]
        found.append(("pipelines/pretrain.py", names))
    return found


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_to_files_and_headings_that_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        relative = str(linked.relative_to(ROOT))
        if relative.startswith("docs/how-to/runbooks/"):  # generated from these
            linked = ROOT / "runbooks" / linked.name
        elif relative.startswith(GENERATED) or linked.name in ("commands.md", "configuration.md"):
            continue
        assert linked.exists(), f"{page(path)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, f"{page(path)} links to {target}; there is {slugs}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_quoted_commands_and_flags_exist(path, flags):
    text = path.read_text()
    for line in blocks(text):
        for job, names in commands(line):
            assert job in flags, f"{page(path)} runs {job}, which is no job"
            for name in names:
                assert name in flags[job], f"{page(path)} gives {job} an unknown flag --{name}"
    for job in re.findall(r"`(?:python )?((?:pipelines|examples)/[\w/]+\.py)", text):
        assert (ROOT / job).is_file(), f"{page(path)} names {job}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), f"{page(path)} starts {module}"


def spans(path: Path) -> list[str]:
    """What a page has in backticks, outside fenced blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_flags_in_running_text_are_flags_of_a_job(path, flags):
    known = {"help"}.union(*flags.values(), *LAUNCHERS.values())
    for span in spans(path):
        for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", span):
            assert name.replace("-", "_") in known, f"{page(path)} names --{name}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_fields_and_dotted_names_in_running_text_exist(path, flags):
    fields = flags["pipelines/pretrain.py"]
    for span in spans(path):
        if span != "model.safetensors" and re.fullmatch(SECTIONS + r"\.[a-z0-9_]+", span):
            assert span in fields, f"{page(path)} names the field {span}"
        if re.fullmatch(r"mdm(\.\w+)+", span):
            assert pkgutil.resolve_name(span), f"{page(path)} names {span}"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_make_targets_and_data_files_exist(path):
    text = path.read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert target in MAKE, f"{page(path)} says make {target}"
    for file in re.findall(r"`((?:deepspeed_configs|infra|tests|\.github)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), f"{page(path)} names {file}"
