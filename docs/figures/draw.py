"""Draws the documentation's figures, each for light and for dark pages: `make figures`.

What a figure shows is measured by this script.
"""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import optaccum

FOLDER = pathlib.Path(__file__).parent
# Okabe and Ito's palette, told apart by every kind of colour vision; lighter on dark pages.
THEMES = {
    "light": {
        "ink": "#24292f",
        "faint": "#6e7781",
        "first": "#0072B2",
        "second": "#D55E00",
        "fill": "#0072B214",
    },
    "dark": {
        "ink": "#e6edf3",
        "faint": "#8b949e",
        "first": "#56B4E9",
        "second": "#E69F00",
        "fill": "#56B4E91f",
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


def box(
    axes: Axes, x: float, y: float, w: float, h: float, title: str, text: str, colors: dict[str, str]
) -> None:
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(
            (x, y), w, h, shape, facecolor=colors["fill"], edgecolor=colors["first"], linewidth=1.6
        )
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
    """The window of micro-steps as a state machine."""
    axes = figure.subplots()
    axes.set(xlim=(0, 10.3), ylim=(0, 4.5), aspect="equal")
    axes.axis("off")
    box(axes, 0.2, 1.9, 2.2, 1.3, "closed", "micro_step = 0\nsums are leftovers", colors)
    box(axes, 6.1, 1.9, 2.2, 1.3, "open", "0 < micro_step < k\nsums S and W", colors)
    box(axes, 2.65, 0.1, 3.2, 1.05, "emit", "inner runs once on S / W", colors)

    def label(x, y, text, **kwargs):
        axes.text(x, y, text, ha="center", va="center", fontsize=10, linespacing=1.45, **kwargs)

    ink = colors["ink"]
    arrow(axes, (1.3, 3.2), (7.2, 3.2), -0.24, ink)
    label(4.25, 4.2, "the first micro-step overwrites:  S ← w g,  W ← w")
    arrow(axes, (8.3, 2.9), (8.3, 2.2), -1.9, ink)
    label(9.6, 2.55, "S ← S + w g\nW ← W + w")
    arrow(axes, (7.2, 1.9), (5.85, 0.6), -0.3, ink)
    label(7.95, 0.85, "the k-th micro-step,\nor flush")
    arrow(axes, (2.65, 0.6), (1.3, 1.9), -0.3, ink)
    label(0.95, 0.85, "has_updated,\ngradient_step + 1")
    arrow(axes, (6.1, 2.55), (2.4, 2.55), 0.0, colors["second"])
    label(4.25, 2.83, "the k-th micro-step, but W = 0:", color=colors["second"])
    label(4.25, 2.27, "nothing runs, nothing counts", color=colors["second"])


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


def parameter_copies(step: Callable[..., object], *args: object, donate: tuple[int, ...] = ()) -> float:
    """Temp memory of a compiled step whose first argument is the parameters, in copies of these."""
    program = jax.jit(step, donate_argnums=donate).lower(*args).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0]))
    return program.memory_analysis().temp_size_in_bytes / size


def measure_overview() -> dict[str, dict[str, float]]:
    """Temp memory in copies of the parameters: of a streaming step, and of a gradient in micro-batches."""
    layers, width, batch_size, length, n = 8, 256, 16, 128, 8
    params = {
        "up": jax.ShapeDtypeStruct((layers, width, 4 * width), "float32"),
        "down": jax.ShapeDtypeStruct((layers, 4 * width, width), "float32"),
    }
    batch = jax.ShapeDtypeStruct((batch_size, length, width), "float32")
    loss_fn = loss_of(remat=True)
    multi_steps = optax.MultiSteps(optax.adamw(1e-3), n)
    accumulating = optaccum.accumulate(optax.adamw(1e-3), n)

    def two_calls(tx):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return parameter_copies(step, params, jax.eval_shape(tx.init, params), params, donate=(0, 1))

    def in_place(params, state, grads):
        return optaccum.apply_gradients(accumulating, grads, state, params)

    state = jax.eval_shape(accumulating.init, params)
    microbatch = optax.microbatching.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=1,
        microbatch_size=batch_size // n,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    return {
        "Streaming, AdamW": {
            "optax.MultiSteps": two_calls(multi_steps),
            "optaccum, update": two_calls(accumulating),
            "optaccum, apply_gradients": parameter_copies(in_place, params, state, params, donate=(0, 1)),
        },
        "Scanned, 8 micro-batches": {
            "the whole batch at once": parameter_copies(jax.value_and_grad(loss_fn), params, batch),
            "optax microbatch": parameter_copies(microbatch, params, batch),
            "optaccum": parameter_copies(optaccum.value_and_grad(loss_fn, num_microbatches=n), params, batch),
        },
    }


def overview(measured: dict[str, dict[str, float]]) -> Callable[[Figure, dict[str, str]], None]:
    def draw(figure, colors):
        for axes, (title, bars) in zip(figure.subplots(1, 2), measured.items(), strict=True):
            bar_colors = [colors["first"] if "optaccum" in name else colors["faint"] for name in bars]
            drawn = axes.barh(list(bars), list(bars.values()), color=bar_colors, height=0.6)
            axes.bar_label(drawn, fmt="%.1f", padding=5)
            axes.set_title(title, fontsize=11, loc="left")
            axes.set_xlim(0, 5.6)
            axes.invert_yaxis()
            axes.set_xticks([])
            axes.tick_params(left=False)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
        figure.supxlabel("temp memory of the compiled program, in copies of the parameters", fontsize=11)

    return draw


def main() -> dict[bool, dict[int, float]]:
    """Draws all figures; returns what was measured."""
    save(window, "window", (9, 4))
    measured = measure_memory()
    print(f"micro-batches   alone   with jax.checkpoint   (MB of temp memory; JAX {jax.__version__})")
    for n in measured[False]:
        print(f"{n:13} {measured[False][n]:7.1f} {measured[True][n]:21.1f}")
    save(memory(measured), "memory", (7, 3.8))
    copies = measure_overview()
    for title, bars in copies.items():
        print(title, *(f"  {name:26} {value:.2f} parameter copies" for name, value in bars.items()), sep="\n")
    save(overview(copies), "overview", (9.5, 2.6))
    return measured


if __name__ == "__main__":
    main()
