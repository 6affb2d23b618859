"""Tables and targets as Markdown."""

import re
from typing import NamedTuple


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Target(NamedTuple):
    """What was aimed at, and what came out."""

    text: str
    measured: float
    limit: float
    at_most: bool = True  # else at least

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


class Section(NamedTuple):
    title: str
    text: str
    tables: list[Table]
    targets: list[Target]


def to_markdown(table: Table) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.header, *table.rows)]
    rule = "|".join(["---", *["---:"] * (len(table.header) - 1)])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def targets_table(targets: list[Target]) -> Table:
    rows = []
    for target in targets:
        limit = f"{'≤' if target.at_most else '≥'} {target.limit:g}"
        rows.append((target.text, limit, f"{target.measured:.3g}", "met" if target.met else "**not met**"))
    return Table(("target", "limit", "measured", ""), rows)


def section_markdown(section: Section) -> str:
    parts = [f"## {section.title}", section.text, *map(to_markdown, section.tables)]
    if section.targets:
        parts.append(to_markdown(targets_table(section.targets)))
    return "\n\n".join(parts)


def find_section(results: str, title: str) -> str:
    """The section with this title, as Markdown; empty where there is none."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", results, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def replace_section(results: str, section: str) -> str:
    """The results with this section in the place of the one of its title, or at the end."""
    old = find_section(results, section.partition("\n")[0].removeprefix("## "))
    return results.replace(old, section) if old else f"{results.rstrip()}\n\n{section}\n"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"


def times(x: float) -> str:
    return f"{x:.3g}×"
