"""`python -m benchmarks`: everything, into benchmarks/RESULTS.md and two plots beside it.

`--only streaming sums` measures some sections, and prints them without writing; `--tiny` is the smoke test's.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import jax
from tqdm import tqdm

from benchmarks import (
    collectives,
    compiled,
    machine,
    processes,
    scanning,
    sizes as all_sizes,
    streaming,
    sums,
)
from benchmarks.report import Section, find_section, section_markdown
from benchmarks.sizes import Sizes

INTRODUCTION = """# Benchmark

`make bench` writes this file. Times are medians of interleaved runs; a ratio is the median over rounds of the
ratio within a round. Targets are those that the design aims at, met or not."""
PLOTS = """![Streaming: time and memory against k and parameters](streaming.png)

![Scanning: time and memory against k](scanning.png)"""


def _sections(sizes: Sizes, tiny: bool) -> dict[str, Callable[[], Section]]:
    return {
        "streaming": functools.partial(streaming.run, sizes),
        "scanning": functools.partial(scanning.run, sizes),
        "collectives": functools.partial(collectives.run, tiny),
        "processes": functools.partial(processes.run, tiny),
        "sums": functools.partial(sums.run, sizes),
    }


def main(args: list[str] | None = None) -> dict[str, Section]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="print these, write nothing")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, in seconds")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args(args)
    sizes = all_sizes.CPU if jax.default_backend() == "cpu" else all_sizes.GPU
    sizes = all_sizes.TINY if options.tiny else sizes
    chosen = _sections(sizes, options.tiny)
    if unknown := set(options.only or ()) - set(chosen):
        parser.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(chosen)}")
    chosen = {name: run for name, run in chosen.items() if not options.only or name in options.only}
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, run in (progress := tqdm(chosen.items(), total=len(chosen) + 1, unit="section")):
        progress.set_description(name)
        results[name] = run()
    parts = [INTRODUCTION, machine.describe(), *map(section_markdown, results.values())]
    if not options.only:
        _draw(sizes, options.output)
        parts.insert(2, PLOTS)
        results = options.output / "RESULTS.md"
        if results.exists() and (kept := find_section(results.read_text(), compiled.TITLE)):
            parts.append(kept)  # `make bench-compiled` writes that one
        results.write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    return results


def _draw(sizes: Sizes, folder: pathlib.Path) -> None:
    from benchmarks import plots

    plots.draw_streaming(streaming.sweep(sizes), folder / "streaming.png")
    plots.draw_scanning(scanning.sweep(sizes), folder / "scanning.png")


if __name__ == "__main__":
    main()
