"""What a stranger meets first: the README, the links, the figures, and what a release holds."""

import importlib.util
import pathlib
import re
import tomllib

import pytest

import optaccum

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?:\]\(|srcset=\"|src=\")([^)\s\"]+)")
MAX_WORDS, MAX_LINES = 420, 15  # of prose in the README, of code in one of its blocks


def _num_words(text: str) -> int:
    """Words of prose: code, links' targets and markup left out."""
    prose = re.sub(r"<[^>]+>|\]\([^)]*\)", " ", FENCE.sub("", text))
    return len(re.findall(r"\w[\w'.-]*", prose))


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(page: pathlib.Path, text: str) -> list[str]:
    """Relative links that lead to no file, or to no heading in it (names of the API are mkdocs' to check)."""
    broken = []
    for link in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        to_heading = target.suffix == ".md" and anchor and not anchor.startswith("optaccum.")
        if not target.is_file() or (to_heading and anchor not in _anchors(target.read_text())):
            broken.append(link)
    return broken


def test_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert 50 < _num_words(readme) <= MAX_WORDS
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    assert max(len(block.splitlines()) for block in blocks) <= MAX_LINES


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_readme_names_what_a_fresh_machine_runs(command):
    readme, targets = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    assert command in "".join(FENCE.findall(readme))
    assert re.search(rf"^{command.removeprefix('make ')}:", targets, re.MULTILINE)


def test_words_are_counted():
    assert _num_words("# A title\n\nfour <b>words</b> [and](a/link)\n\n```python\nno = 1\n```\n\n## One") == 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not _broken_links(page, page.read_text())


def test_a_broken_link_is_seen():
    page = ROOT / "README.md"
    text = "[x](no/such.md) [y](LICENSE) [z](docs/concepts.md#no-such-heading) [web](https://example.org/x)"
    assert _broken_links(page, text) == ["no/such.md", "docs/concepts.md#no-such-heading"]


def test_pages_name_no_machine():
    # Split, so that this file does not name what it looks for.
    names = ["/" + "work/", "/" + "root/", "TO" + "DO", "FIX" + "ME"]
    assert not [(page.name, name) for page in PAGES for name in names if name in page.read_text()]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    absent = [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in navigation]
    assert not absent, f"add {absent} to nav in mkdocs.yml"


def test_figures_are_small_and_drawn_for_both_themes():
    figures = {path.name for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert figures
    for name in figures:
        assert (ROOT / "docs" / "figures" / name).stat().st_size < 200_000
        assert {name.replace("-dark", "-light"), name.replace("-light", "-dark")} <= figures


def test_figures_are_drawn(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "figures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    draw.save(draw.window, "window", (9, 4))
    first = (tmp_path / "window-light.svg").read_bytes()
    draw.save(draw.window, "window", (9, 4))
    assert first == (tmp_path / "window-light.svg").read_bytes()
    assert first != (tmp_path / "window-dark.svg").read_bytes()


def test_one_version_everywhere():
    version = optaccum.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "optaccum/__init__.py"


def test_a_wheel_holds_the_package_and_nothing_else():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["optaccum"]
    files = [path for path in (ROOT / "optaccum").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.suffix for path in files} == {".py", ".typed"}
    assert not [path.name for path in files if "test" in path.name]


def test_a_source_release_holds_what_its_tests_need():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for name in ("optaccum", "tests", "examples", "docs", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml"):
        assert f"/{name}" in included
        assert (ROOT / name).exists()
