"""Draws the documentation's figures, each for light and for dark pages: `make figures`.

What a figure shows is measured by this script, or read from the benchmark's results.
"""

import itertools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import optaccum

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parent.parent
# Okabe and Ito's palette, told apart by every kind of colour vision; lighter on dark pages.
THEMES = {
    "light": {
        "ink": "#24292f",
        "faint": "#6e7781",
        "first": "#0072B2",
        "second": "#D55E00",
        "fill": "#0072B214",
        "paper": "#ffffff",
    },
    "dark": {
        "ink": "#e6edf3",
        "faint": "#8b949e",
        "first": "#56B4E9",
        "second": "#E69F00",
        "fill": "#56B4E91f",
        "paper": "#0d1117",
    },
}


def save(draw: Callable[[Figure, dict[str, str]], None], name: str, size: tuple[float, float]) -> None:
    """Draws in both themes, on no background, without a date: the same figure gives the same file."""
    for theme, colors in THEMES.items():
        style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["ink"])
        style |= {"axes.edgecolor": colors["faint"], "font.size": 11, "svg.hashsalt": "optaccum"}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, colors)
            figure.savefig(FOLDER / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})


def box(axes: Axes, x: float, y: float, w: float, h: float, title: str, text: str, colors: dict[str, str]) -> None:
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, shape, facecolor=colors["fill"], edgecolor=colors["first"], linewidth=1.6)
    )
    axes.text(x + w / 2, y + h - 0.3, title, ha="center", va="center", weight="bold")
    axes.text(x + w / 2, y + (h - 0.45) / 2, text, ha="center", va="center", fontsize=10, linespacing=1.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float, color: str) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=14, color=color, linewidth=1.4
        )
    )


def window(figure: Figure, colors: dict[str, str]) -> None:
    """The window of micro-steps as a state machine, and the three ways in which one ends."""
    axes = figure.subplots()
    axes.set(xlim=(0, 10.6), ylim=(-2.6, 4.5), aspect="equal")
    axes.axis("off")
    box(axes, 0.05, 1.9, 2.4, 1.3, "closed", "micro_step = 0\nsums are leftovers", colors)
    box(axes, 6.1, 1.9, 2.3, 1.3, "open", "micro_step > 0\nsums S and W", colors)
    box(axes, 2.65, 0.1, 3.2, 1.05, "emit", "inner runs once on S / W", colors)

    def label(x, y, text, **kwargs):
        axes.text(x, y, text, ha="center", va="center", fontsize=10, linespacing=1.45, **kwargs)

    ink = colors["ink"]
    arrow(axes, (1.3, 3.2), (7.2, 3.2), -0.24, ink)
    label(4.25, 4.2, "the first micro-step overwrites:  S ← w g,  W ← w")
    arrow(axes, (8.4, 2.9), (8.4, 2.2), -1.9, ink)
    label(9.85, 2.55, "S ← S + w g\nW ← W + w")
    arrow(axes, (7.2, 1.9), (5.85, 0.6), -0.3, ink)
    label(7.95, 0.85, "the last micro-step,\nor flush")
    arrow(axes, (2.65, 0.6), (1.3, 1.9), -0.3, ink)
    label(0.9, 0.38, "has_updated,\ngradient_step + 1")
    arrow(axes, (6.1, 2.55), (2.45, 2.55), 0.0, colors["second"])
    label(4.25, 2.83, "the last micro-step, but W = 0:", color=colors["second"])
    label(4.25, 2.27, "nothing runs, nothing counts", color=colors["second"])

    by_count = [[("1", 0.8), ("2", 0.8), ("3", 0.8)]] * 2 + [[("1", 0.8)]]
    by_weight = [[(str(w), 0.31 * w) for w in weights] for weights in ([3, 2, 4], [6, 2], [1])]
    by_flag = [[("", 0.8)] * n + [("True", 0.8)] for n in (1, 3)] + [[("", 0.8)]]
    windows(axes, -0.8, "count:  accumulate(inner, 3)", by_count, colors)
    windows(axes, -1.6, "weight:  until_weight(8)", by_weight, colors)
    windows(axes, -2.4, "flag:  accumulate(inner, None)", by_flag, colors)


def windows(axes: Axes, y: float, name: str, rows: list[list[tuple[str, float]]], colors: dict[str, str]) -> None:
    """Windows side by side, (text, width) of each micro-step; filled is the one that ends its window."""
    axes.text(0.2, y + 0.24, name, ha="left", va="center", fontsize=10)
    x = 3.9
    for i, row in enumerate(rows):
        for j, (text, width) in enumerate(row):
            ends = i < len(rows) - 1 and j == len(row) - 1  # the last window is still open
            face = colors["first"] if ends else colors["fill"]
            axes.add_patch(Rectangle((x, y), width, 0.48, facecolor=face, edgecolor=colors["first"]))
            color = colors["paper"] if ends else colors["ink"]
            axes.text(x + width / 2, y + 0.22, text, ha="center", va="center", fontsize=9, color=color)
            x += width
        x += 0.2


BATCH, LENGTH, WIDTH, LAYERS = 32, 64, 64, 8


def loss_of(remat: bool) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
    """A stack of scanned residual layers, with or without rematerialisation."""

    def layer(x, p):
        return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"], None

    def loss_fn(params, batch):
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, batch, params)
        return jnp.mean(x**2)

    return loss_fn


def temp_bytes(remat: bool, num_microbatches: int) -> int:
    params = {
        "up": jax.ShapeDtypeStruct((LAYERS, WIDTH, 4 * WIDTH), "float32"),
        "down": jax.ShapeDtypeStruct((LAYERS, 4 * WIDTH, WIDTH), "float32"),
    }
    batch = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), "float32")
    grad_fn = optaccum.value_and_grad(loss_of(remat), num_microbatches=num_microbatches)
    return jax.jit(grad_fn).lower(params, batch).compile().memory_analysis().temp_size_in_bytes


def measure_memory() -> dict[bool, dict[int, float]]:
    """Temp memory in MB: without and with remat, by the number of micro-batches."""
    return {remat: {n: temp_bytes(remat, n) / 1e6 for n in (1, 2, 4, 8, 16, 32)} for remat in (False, True)}


def memory(measured: dict[bool, dict[int, float]]) -> Callable[[Figure, dict[str, str]], None]:
    def draw(figure, colors):
        axes = figure.subplots()
        gradient = 4 * LAYERS * 2 * 4 * WIDTH**2 / 1e6
        for remat, color, marker in ((False, colors["first"], "o"), (True, colors["second"], "s")):
            numbers, megabytes = zip(*measured[remat].items(), strict=True)
            axes.loglog(numbers, megabytes, color=color, marker=marker, linewidth=2)
            name = "with jax.checkpoint" if remat else "micro-batches alone"
            axes.annotate(name, (numbers[1], megabytes[1]), (10, 8), textcoords="offset points", color=color)
        axes.axhline(gradient, color=colors["faint"], linestyle="--")
        axes.annotate(
            "size of the parameters", (1, gradient), (0, 4), textcoords="offset points", color=colors["faint"]
        )
        axes.set(xlabel="micro-batches", ylabel="temp memory (MB)", xticks=numbers, xticklabels=numbers)
        axes.minorticks_off()
        axes.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
        axes.spines[["top", "right"]].set_visible(False)

    return draw


def read_table(text: str, title: str) -> tuple[list[str], dict[str, list[float]]]:
    """A table of numbers, by its first heading: the other headings, and the rows by name."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(str.strip, lines[first:])]
    return rows[0][1:], {row[0]: [float(cell) for cell in row[1:]] for row in rows[2:]}


PANELS = {
    # Title -> (table, end of the columns' names, what the bars are called).
    "Streaming, AdamW: passes over memory in a window of 8": (
        "AdamW, streaming",
        "window of 8",
        {"optax.MultiSteps": "optax.MultiSteps", "apply_gradients": "optaccum, apply_gradients"},
    ),
    "Scanned layers, gradients: temp memory": (
        "scanned layers, gradients",
        "temp",
        {
            "one micro-batch alone": "one micro-batch alone",
            "optax microbatch": "optax microbatch",
            "optaccum": "optaccum",
        },
    ),
}


def read_overview() -> dict[str, dict[str, dict[str, float]]]:
    """By panel, bar and device, what the accelerators' own compilers say; in copies of the parameters."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text().partition("\n## As compiled")[2]
    return {
        panel: {
            name: {
                column.partition(":")[0]: number
                for column, number in zip(columns, rows[row], strict=True)
                if column.endswith(column_end)
            }
            for row, name in names.items()
        }
        for panel, (title, column_end, names) in PANELS.items()
        for columns, rows in [read_table(text, title)]
    }


def overview(read: dict[str, dict[str, dict[str, float]]]) -> Callable[[Figure, dict[str, str]], None]:
    """Bars in pairs, TPU above H100; the library's in colour."""

    def draw(figure, colors):
        parts = figure.subfigures(2, 1, height_ratios=[2, 3])
        for part, (title, bars) in zip(parts, read.items(), strict=True):
            part.suptitle(title, x=0.02, ha="left", fontsize=11)
            axes = part.subplots()
            for place, (name, numbers) in enumerate(bars.items()):
                color = colors["first"] if "optaccum" in name else colors["faint"]
                for offset, (device, number) in zip((-0.2, 0.2), numbers.items(), strict=True):
                    drawn = axes.barh(place + offset, number, height=0.36, color=color, alpha=1 if offset < 0 else 0.6)
                    decimals = ".2f" if number < 10 else ".0f"
                    axes.bar_label(drawn, [f"{number:{decimals}}  {device}"], padding=5, fontsize=9)
            axes.set_yticks(range(len(bars)), list(bars))
            axes.set_xlim(0, 1.45 * max(max(numbers.values()) for numbers in bars.values()))
            axes.invert_yaxis()
            axes.set_xticks([])
            axes.tick_params(left=False)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
        parts[-1].supxlabel("in copies of the parameters, as compiled for TPU v5e and H100", fontsize=10)

    return draw


def read_sharding() -> dict[str, list[float]]:
    """By layout: kept, held by formula and as compiled for TPU v5e and H100, sent likewise; bytes a parameter."""
    page = (ROOT / "docs" / "across_devices.md").read_text()
    return read_table(page, "k = 8, D = 8")[1]


def sharding(layouts: dict[str, list[float]]) -> Callable[[Figure, dict[str, str]], None]:
    """Bytes sent against bytes held: a disc where the formulas say, marks where the compilers end up."""

    def draw(figure, colors):
        axes = figure.subplots()
        for name, (kept, formula, *held, sent_by_formula, tpu_sent, gpu_sent) in layouts.items():
            if name == "window, float32":  # beside ZeRO-1: the page's table has it
                continue
            places = [(kept + more, y) for more, y in zip(held, (tpu_sent, gpu_sent), strict=True)]
            for marker, (x, y) in zip("^s", places, strict=True):
                line = [kept + formula, x], [sent_by_formula, y]
                axes.plot(*line, color=colors["second"], linewidth=0.8, alpha=0.6)
                axes.plot(x, y, marker, markersize=5, color=colors["second"], fillstyle="none")
            axes.plot(kept + formula, sent_by_formula, "o", markersize=8, color=colors["first"])
            above = name in ("replicated, as JAX places it", "layer by layer")
            at = min(places, key=lambda place: (-place[1], -place[0])) if above else max(places)
            axes.annotate(
                name,
                at,
                (10, 8) if above else (9, -4),
                textcoords="offset points",
                ha="right" if at[0] > 20 else "left" if not above else "center",
                fontsize=10,
            )
        for marker, color, fill, label in (
            ("o", "first", "full", "by formula"),
            ("^", "second", "none", "compiled for TPU v5e"),
            ("s", "second", "none", "compiled for H100"),
        ):
            axes.plot([], [], marker, color=colors[color], fillstyle=fill, label=label)
        axes.legend(frameon=False, loc="upper right", fontsize=9)
        axes.set(yscale="log", xlim=(0, 26), ylim=(3.5, 110))
        axes.set_yticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        axes.minorticks_off()
        axes.set_xlabel("held, parameters and Adam's state included (bytes a parameter)")
        axes.set_ylabel("sent in a window of 8 (bytes a parameter)")
        axes.spines[["top", "right"]].set_visible(False)

    return draw


def main() -> dict[bool, dict[int, float]]:
    """Draws all figures; returns what was measured."""
    save(window, "window", (6.8, 4.7))
    measured = measure_memory()
    print(f"micro-batches   alone   with jax.checkpoint   (MB of temp memory; JAX {jax.__version__})")
    for n in measured[False]:
        print(f"{n:13} {measured[False][n]:7.1f} {measured[True][n]:21.1f}")
    save(memory(measured), "memory", (6.2, 3.6))
    save(overview(read_overview()), "overview", (6.2, 3.5))
    save(sharding(read_sharding()), "sharding", (6.2, 4.2))
    return measured


if __name__ == "__main__":
    main()
