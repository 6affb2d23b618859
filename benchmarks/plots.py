"""Time and memory against the number of micro-batches, and against parameters."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers tell them apart without colour.
STYLES = {
    "optax.MultiSteps": ("#D55E00", "s"),
    "optax microbatch": ("#D55E00", "s"),
    "update + apply_updates": ("#56B4E9", "^"),
    "hand-written pair": ("#4D4D4D", "D"),
    "hand-written scan": ("#4D4D4D", "D"),
    "apply_gradients": ("#0072B2", "o"),
    "optaccum": ("#0072B2", "o"),
}


def draw_streaming(sweep: dict[str, Any], path: pathlib.Path) -> None:
    """Milliseconds of a window, and temporary memory, against k and against parameters."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    middle = f"{sweep['middle'] / 1e6:.1f} M parameters"
    for column, (key, label) in enumerate(
        {"k": f"micro-steps in a window (k), {middle}", "parameters": "parameters (millions), k = 8"}.items()
    ):
        scale = 1 if key == "k" else 1e-6
        _draw(axes[0, column], sweep[key], sweep["names"], 1, scale, 1e3)
        _draw(axes[1, column], sweep[key], sweep["names"], 2, scale, 1)
        axes[0, column].autoscale(axis="y")  # from 0, where a logarithm has none
        axes[0, column].set_yscale("log")
        axes[0, column].autoscale(axis="y")
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("time of a window (ms)")
    axes[1, 0].set_ylabel("temporary memory (MiB)")
    _finish(figure, axes[0, 0], "Streaming: a window of k gradients and one AdamW update", path)


def draw_scanning(sweep: dict[str, Any], path: pathlib.Path) -> None:
    """Milliseconds of a whole batch's gradient, and temporary memory, against k."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    _draw(axes[0], sweep["k"], sweep["names"], 1, 1, 1e3)
    _draw(axes[1], sweep["k"], sweep["names"], 2, 1, 1)
    axes[1].axhline(sweep["parameters"], color="#4D4D4D", linewidth=1, linestyle=":")
    axes[1].annotate("the parameters", (sweep["k"][-1][0], sweep["parameters"]), ha="right", va="bottom")
    axes[0].set_ylabel("time of a whole batch's gradient (ms)")
    axes[1].set_ylabel("temporary memory (MiB)")
    for ax in axes:
        ax.set_xlabel("micro-batches (k)")
    _finish(figure, axes[0], "Scanning: a transformer with scanned, rematerialised layers", path)


def _draw(ax: Any, points: list[Any], names: tuple[str, ...], field: int, x_scale: float, y_scale: float) -> None:
    xs = [point[0] * x_scale for point in points]
    for name, width in zip(names, range(len(names), 0, -1), strict=True):
        color, marker = STYLES[name]
        ys = [point[field][name] * y_scale for point in points]
        # From wide to narrow, so that each shows under the one above it.
        ax.plot(
            xs,
            ys,
            color=color,
            marker=marker,
            markersize=4 + 2 * width,
            linewidth=0.6 + 1.2 * width,
            label=name,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(xs, [f"{x:.3g}" for x in xs])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, first: Any, title: str, path: pathlib.Path) -> None:
    """One legend below the title; an opaque background, for pages light and dark."""
    figure.suptitle(title, fontsize=13)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
