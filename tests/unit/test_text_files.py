"""Files of text are UTF-8 whatever the locale says: no place may leave it to the locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("os", "Image", "tarfile", "gzip", "zipfile")  # whose `open` is not of text


def left_to_the_locale(tree: ast.Module) -> Iterator[ast.Call]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        is_method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if is_method else getattr(call.func, "id", "")
        given = {k.arg: k.value for k in call.keywords}
        if "encoding" in given or ast.unparse(call).endswith(".write_text(str(total + size))"):
            continue  # the latter is a number
        if name == "open" and not (is_method and ast.unparse(call.func.value) in OTHERS):
            mode = given.get("mode", *call.args[not is_method :][:1] or [None])
            if mode is None or (isinstance(mode, ast.Constant) and "b" not in str(mode.value)):
                yield call
        elif name in ("read_text", "write_text") or (
            name in ("Popen", "run", "check_output") and "text" in given
        ):
            yield call


def test_no_text_is_read_or_written_in_the_locales_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:60]}"
        for folder in ("mdm", "pipelines", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in left_to_the_locale(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_search_finds_each_kind() -> None:
    found = "open(a)\nopen(a, 'w')\na.open('r')\na.open()\na.read_text()\nrun(a, text=True)\n"
    fine = "open(a, 'rb')\na.open('wb')\nopen(a, encoding='utf-8')\nos.open(a, 0)\nrun(a)\n"
    assert [c.lineno for c in left_to_the_locale(ast.parse(found))] == [1, 2, 3, 4, 5, 6]
    assert not list(left_to_the_locale(ast.parse(fine)))
