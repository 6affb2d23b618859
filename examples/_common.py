"""What the programs share: their common arguments, a progress bar, checkpoints, a figure's style."""

import argparse
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from matplotlib.figure import Figure
from tqdm import tqdm

PyTree = Any

# Okabe and Ito's palette, told apart by every kind of colour vision.
GREY, BLUE, SKY, VERMILION, ORANGE, GREEN = "#999999", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73"

DEFAULT = "(default: %(default)s)"


def positive_int(text: str) -> int:
    """An argument's type: a whole number, 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more; got {text}")
    return number


def make_parser(doc: str | None, *, figure: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every program has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help=f"of data and parameters {DEFAULT}")
    parser.add_argument("--figure", type=pathlib.Path, default=figure, help=f"picture to draw {DEFAULT}")
    parser.add_argument(
        "--checkpoints",
        type=epath.Path,  # a folder, or gs://bucket/folder
        metavar="FOLDER",
        help="save checkpoints there, and go on from the newest one in it (default: none)",
    )
    parser.add_argument(
        "--checkpoint-every", type=positive_int, default=25, metavar="CALLS", help=f"how often {DEFAULT}"
    )
    return parser


def progress_bar(description: str, total: int, *, initial: int = 0, unit: str = "example") -> tqdm:
    """A bar that counts examples, and so shows examples per second; silent where there is no terminal."""
    return tqdm(total=total, initial=initial, desc=description, unit=f" {unit}s", disable=None)


def advance(bar: tqdm, num_examples: int, **shown: float) -> None:
    """Move the bar on, with numbers such as the loss beside it, and the device's memory where it tells."""
    stats = jax.local_devices()[0].memory_stats()
    memory = {"memory": f"{stats['bytes_in_use'] / 2**20:,.0f} MiB"} if stats else {}
    bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()} | memory, refresh=False)
    bar.update(num_examples)


def open_checkpoints(folder: epath.Path | None) -> ocp.CheckpointManager | None:
    """The two newest checkpoints in a folder; None for no folder.

    A checkpoint gets its name only when all of it is written: whatever kills the program, the newest is
    whole.
    It is written before the next step runs, which will overwrite the arrays (donation).
    """
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    absolute = folder if folder.is_absolute() else folder.absolute()  # gs:// is absolute
    return ocp.CheckpointManager(absolute, options=options)


def save(manager: ocp.CheckpointManager | None, step: int, state: PyTree, record: dict[str, Any]) -> None:
    """Save the arrays in `state` and the plain numbers and texts in `record`."""
    if manager is not None and step not in manager.all_steps():
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        manager.save(step, args=items, force=True)


def restore(
    manager: ocp.CheckpointManager | None, state: PyTree, record: dict[str, Any]
) -> tuple[int, PyTree, dict[str, Any]]:
    """The newest checkpoint's step, state and record; step 0 and those given where there is none.

    One that cannot be read (the disk was full, a file cut short) is set aside, and the one before it counts.
    Exits with a clear message where none can be read, or where its settings are not `record["settings"]`.
    """
    if manager is None or not manager.all_steps():
        return 0, state, record
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            saved = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            _check_settings(manager, saved["settings"], record["settings"])
            items = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))
            return step, items["state"], saved
        except Exception as error:  # whatever the file system, Orbax or its readers raise
            _set_aside(manager, step, error)
    raise SystemExit(f"error: none of the checkpoints in {manager.directory} can be read.")


def _check_settings(manager: ocp.CheckpointManager, then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key} {then.get(key)!r}, now {now[key]!r}" for key in now if now[key] != then.get(key)]
    if changed:
        raise SystemExit(
            f"error: {manager.directory} holds a run with other settings: {'; '.join(changed)}. "
            "Take them back to go on with it, or give --checkpoints another folder."
        )


def _set_aside(manager: ocp.CheckpointManager, step: int, error: Exception) -> None:
    """Rename a checkpoint, so that its step can be saved again."""
    aside = manager.directory / f"unreadable-{step}"
    tqdm.write(f"Checkpoint {step} cannot be read; it is now {aside}.\n  {str(error).strip().splitlines()[0]}")
    if jax.process_index() == 0:
        (manager.directory / str(step)).rename(aside)
    manager.reload()


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Write the picture, without frames around its axes."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"The picture: {path}")
