"""Hooks for mkdocs: formulas as MathML, and the benchmark's results in their page.

Browsers draw MathML without a script, a font or the network.
Pages and docstrings may write a formula as `$$ ... $$` or within a line as `$ ... $` (as git hosts do),
or as Sphinx does, in a `.. math::` block and :math:`...`. Sphinx's roles for names become code.
"""

import pathlib
import re

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_DISPLAY = re.compile(r"\$\$(?P<dollars>.+?)\$\$", re.DOTALL)
_BLOCK = re.compile(r"^\.\. math::(?P<block>.*(?:\n(?: +.*| *(?=\n +)))*)", re.MULTILINE)
_INLINE = (re.compile(r":math:`([^`]+)`"), re.compile(r"(?<![\w$])\$(?![\s(])([^$\n`]+?)(?<!\s)\$(?![\w$])"))
_ROLE = re.compile(r":(?:class|func|meth|attr):`~?([^`]+)`")


class _Formulas(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = "\n".join(lines)
        for pattern in (_BLOCK, _DISPLAY):
            text = pattern.sub(lambda match: f"\n\n{self._stash(match[1], 'block')}\n\n", text)
        for pattern in _INLINE:
            text = pattern.sub(lambda match: self._stash(match[1], "inline"), text)
        return _ROLE.sub(r"`\1`", text).split("\n")

    def _stash(self, latex: str, display: str) -> str:
        formula = convert(" ".join(latex.split()), display=display)
        return self.md.htmlStash.store(f'<div class="formula">{formula}</div>' if display == "block" else formula)


class _FormulasExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Formulas(md), "formulas", priority=24)  # fenced code is stashed at 25


def on_config(config):
    """Adds the extension for pages and docstrings alike."""
    config.markdown_extensions.append(_FormulasExtension())
    return config


def on_files(files, *, config):
    """Adds the pictures that `make bench` drew."""
    for path in (pathlib.Path(config.config_file_path).parent / "benchmarks").glob("*.png"):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, *, page, config, **_):
    """Appends what `make bench` wrote, if it has been run, to the page that says how to read it."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    if heading := re.search(r"^#+[^#\s].*", prose, re.MULTILINE):  # the #12 of a link, at the start of a line
        raise PluginError(f"{page.file.src_uri}: this line would become a heading: {heading[0]}")
    results = pathlib.Path(config.config_file_path).parent / "benchmarks" / "RESULTS.md"
    if page.file.src_uri != "benchmarks.md" or not results.is_file():
        return markdown
    text = re.sub(r"(!\[[^\]]*\]\()", r"\1figures/", results.read_text())
    return f"{markdown}\n{re.sub(r'^#', '##', text, flags=re.MULTILINE)}"
