"""The documentation runs as it is shown: docstrings, and the python blocks of README.md and docs/."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import optaccum

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_ELSEWHERE = {"losses.md"}  # test_losses.py, which takes its functions
BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def _docstrings() -> list[doctest.DocTest]:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(optaccum.__path__, f"{optaccum.__name__}.")
    ]
    found = [test for module in [optaccum, *modules] for test in doctest.DocTestFinder().find(module)]
    return [test for test in found if test.examples]


def _run(test: doctest.DocTest) -> None:
    output: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append, clear_globs=False)
    assert not output, "".join(output)


@pytest.mark.parametrize("docstring", _docstrings(), ids=lambda test: test.name)
def test_docstring(docstring):
    _run(docstring)


def _run_page(text: str, filename: str) -> int:
    """Run a page's python blocks in order, in one namespace; returns how many there were."""
    namespace: dict[str, object] = {"__name__": filename}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        first_line = text.count("\n", 0, block.start("code"))
        indent = block["indent"]
        code = re.sub(f"^{indent}", "", block["code"], flags=re.MULTILINE)
        if ">>>" in code:
            parsed = doctest.DocTestParser().get_doctest(code, {}, filename, filename, first_line)
            parsed.globs = namespace  # itself, for the blocks that follow; given above, it is copied
            _run(parsed)
        else:
            exec(compile("\n" * first_line + code, filename, "exec"), namespace)
    return len(blocks)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RUN_ELSEWHERE], ids=lambda page: page.name)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # both read when it is first imported
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    count = _run_page(page.read_text(), str(page))
    assert count or page != PAGES[0], "README.md shows no python"


def test_a_block_that_fails_is_seen():
    with pytest.raises(ZeroDivisionError) as info:
        _run_page("text\n\n```python\nx = 1\n```\n\n```python\nx / 0\n```\n", "page.md")
    assert info.traceback[-1].lineno == 7
    with pytest.raises(AssertionError, match="Expected"):
        _run_page("```python\n>>> 1 + 1\n3\n```\n", "page.md")
