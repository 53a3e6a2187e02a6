"""The README's tree names every module with the first sentence of its docstring."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(p for top in ("mdm", "pipelines") for p in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_tree_says_what_the_module_says(path):
    said = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    sentence = said.replace("\n", " ").rstrip(".:")
    name = f"{path.parent.relative_to(ROOT)}/" if path.stem == "__init__" else f"  {path.name}"
    line = f"{name:<28}{sentence}"
    assert line in (ROOT / "README.md").read_text().splitlines(), f"the README lacks: {line}"
