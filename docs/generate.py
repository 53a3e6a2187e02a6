"""Pages that are generated from the code: command lines, configuration, API, runbooks.

They are written into the source folder before Sphinx reads it, and git ignores them.
"""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mdm.utils.flags import flag_types, negative

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = "mdm"
JOB_FOLDERS = ("pipelines", "examples")


def jobs() -> dict[str, Any]:
    """Path -> dataclass of flags of every job: what its module passes to `parse_cli`."""
    classes = {}
    with mock.patch.dict(os.environ):  # a job may set its process up when it is imported
        for folder in JOB_FOLDERS:
            for path in sorted((ROOT / folder).rglob("*.py")):
                source = path.read_text(encoding="utf-8")
                parsed = re.search(r"parse_cli\((\w+)", source)
                if parsed and '__name__ == "__main__"' in source:
                    place = path.relative_to(ROOT)
                    module = importlib.import_module(".".join(place.with_suffix("").parts))
                    classes[str(place)] = getattr(module, parsed[1])
    return classes


def flag_names(cls: Any) -> set[str]:
    """All spellings of a job's flags, without their hyphens."""
    types = flag_types(cls)
    return {*types, *(negative(name) for name, kind in types.items() if kind is bool)}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a job."""

    name: str
    kind: str
    default: str
    help: str

    @property
    def spelling(self) -> str:
        """How it is written, a boolean in both ways."""
        both = self.kind == "nothing"
        return f"`--{self.name}`, `--{negative(self.name)}`" if both else f"`--{self.name}`"


def flags_of(cls: Any, prefix: str = "") -> Iterator[Flag]:
    """The leaf fields of a dataclass, nested ones joined by dots."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from flags_of(kind, f"{prefix}{field.name}.")
            continue
        yield Flag(
            prefix + field.name,
            _kind(kind),
            _default(field),
            field.metadata.get("help", ""),
        )


def _kind(kind: Any) -> str:
    if kind == tuple[str, ...]:
        return "text, repeated"
    if typing.get_origin(kind) is tuple:
        return "list"
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    return {"str": "text", "int": "integer", "float": "number", "bool": "nothing"}.get(
        getattr(kind, "__name__", ""), "text"
    )


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    return show(field.default)


def show(value: Any) -> str:
    """A value as a cell of a table."""
    if value in ("", ()) or value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(show(item) for item in value)
    if dataclasses.is_dataclass(value):
        name, *rest = dataclasses.astuple(value)  # type: ignore[arg-type]
        return f"`{name}:{rest[0]:g}`" if isinstance(rest[0], float) else f"`{value}`"
    return f"`{value}`"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([_cell(text) for text in row] for row in rows)]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _cell(text: str) -> str:
    """`text` with nothing that Markdown would take for markup, but code and links."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|").replace("\n", " "))
    parts[::2] = [re.sub(r"[<*$]", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def flag_table(flags: list[Flag]) -> list[str]:
    """Flags with their meaning."""
    rows = [[f.spelling, f.help, f.default, f.kind] for f in flags]
    return table(["flag", "meaning", "default", "takes"], rows)


def commands_page() -> str:
    """`reference/commands.md`: every job's docstring and flags."""
    config = importlib.import_module(f"{PACKAGE}.config").Config
    shared = {f.name for f in flags_of(config)}
    lines = [
        "# Command lines",
        "",
        "This page is generated from the typed dataclasses that also make each job's `--help`.",
        "Hyphens may stand for underscores. A boolean flag takes no value: `--plan` turns it on,",
        "`--no_plan` off. A flag that takes several folders or files is repeated, since their",
        "names may contain commas. Where a flag takes a folder, it also takes its `file://` URI.",
        "[Exit codes](exit_codes.md) are the same for all jobs.",
        "",
    ]
    for path, cls in jobs().items():
        own = [f for f in flags_of(cls) if not (issubclass(cls, config) and f.name in shared)]
        dotted = path.removesuffix(".py").replace("/", ".")
        lines += [f"## {path}", "", "```{eval-rst}", f".. automodule:: {dotted}"]
        lines += ["   :no-index:", "```", ""]  # its docstring alone
        if issubclass(cls, config):
            lines += ["Every field of the [configuration](configuration.md) is a flag, and:", ""]
        lines += flag_table(own) if own else ["It has no flags of its own.", ""]
    return "\n".join(lines)


def configuration_page() -> str:
    """`reference/configuration.md`: every field, and what the presets change."""
    config = importlib.import_module(f"{PACKAGE}.config").Config
    presets = importlib.import_module(f"{PACKAGE}.presets").PRESETS
    lines = [
        "# Configuration",
        "",
        "A run is one frozen dataclass, {py:class}`mdm.config.Config`. Each field is a flag of",
        "`pipelines/pretrain.py` and of `pipelines/rehearse.py`; checks across fields run before",
        "anything else, and a message names both values and the way out. `--preset` picks the",
        "starting values, of which [the last section](#what-each-preset-changes) lists those",
        "that differ from the defaults. [Presets](presets.md) says what each is for.",
        "",
    ]
    sections: dict[str, list[Flag]] = {}
    for flag in flags_of(config):
        sections.setdefault(flag.name.partition(".")[0] if "." in flag.name else "", []).append(
            flag
        )
    hints = typing.get_type_hints(config)
    for name, flags in sections.items():
        cls = hints[name] if name else config
        lines += [f"## {name or 'The run'}", "", inspect.getdoc(cls) or "", *flag_table(flags)]
    values = {name: dict(_values(preset)) for name, preset in presets.items()}
    base = dict(_values(config()))
    changed = [key for key in base if any(v[key] != base[key] for v in values.values())]
    rows = [
        [f"`{key}`", show(base[key])]
        + [show(v[key]) if v[key] != base[key] else "" for v in values.values()]
        for key in changed
    ]
    lines += ["## What each preset changes", "", "An empty cell is the default."]
    lines += table(["field", "default", *(f"`{name}`" for name in values)], rows)
    renamed = importlib.import_module(f"{PACKAGE}.utils.saved_config").RENAMED
    lines += ["## Former names", "", "Files that contain a former key are read; a former flag is"]
    lines += ["refused with the present one."]
    lines += table(["former", "present"], [[f"`{a}`", f"`{b}`"] for a, b in renamed.items()])
    return "\n".join(lines)


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def api_pages() -> dict[str, str]:
    """A page for each package, with all its modules, and an index with a line for each page."""
    pages, rows = {}, []
    for init in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        modules = sorted(p for p in init.parent.glob("*.py") if p != init)
        lines = [f"# {package}", "", *_automodule(package)]
        for path in modules:
            dotted = f"{package}.{path.stem}"
            lines += [f"## {dotted}", "", *_automodule(dotted)]
        pages[f"{package}.md"] = "\n".join(lines)
        rows.append([f"[{package}]({package}.md)", first_sentence(init)])
    index = [
        "# API",
        "",
        "A page for each package; `[source]` beside a name leads to its lines.",
        *table(["package", "what it holds"], rows),
        "```{toctree}",
        ":hidden:",
        "",
        *pages,
        "```",
        "",
    ]
    return {"index.md": "\n".join(index), **pages}


def _automodule(dotted: str) -> list[str]:
    options = ("members", "undoc-members", "show-inheritance", "ignore-module-all")
    lines = ["```{eval-rst}", f".. automodule:: {dotted}", *(f"   :{o}:" for o in options)]
    return [*lines, "```", ""]


def runbook_pages() -> dict[str, str]:
    """A page that includes each runbook."""
    return {
        path.name: f"```{{include}} ../../../runbooks/{path.name}\n```\n"
        for path in sorted((ROOT / "runbooks").glob("*.md"))
    }


def write(app: Any = None) -> None:
    """Write all generated pages; pages of what is gone are removed."""
    folders = {
        "reference/api": api_pages(),
        "how-to/runbooks": runbook_pages(),
    }
    pages = {
        "reference/commands.md": commands_page(),
        "reference/configuration.md": configuration_page(),
    }
    for folder, contents in folders.items():
        place = DOCS / folder
        place.mkdir(parents=True, exist_ok=True)
        for path in place.iterdir():
            if path.name not in contents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        pages |= {f"{folder}/{name}": text for name, text in contents.items()}
    for name, text in pages.items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Write the pages before Sphinx looks for its sources."""
    from pygments.lexers.shell import BashLexer

    app.connect("builder-inited", write)
    for name in ("slurm", "kubernetes"):  # shell blocks of the runbooks that name where they run
        app.add_lexer(name, BashLexer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
