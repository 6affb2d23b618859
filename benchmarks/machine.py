"""What the figures were measured on."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

import jax

import optaccum

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch")


def describe() -> str:
    """Machine, versions and date, as Markdown."""
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", one {device.device_kind}"
    versions = [f"Python {platform.python_version()}", f"optaccum {optaccum.__version__}"]
    versions += filter(None, map(_version, PACKAGES))
    lines = [
        f"- Machine: {_processor()}, {_num_cores()} cores, {_memory()}{accelerator}; {platform.system()}",
        f"- Versions: {', '.join(versions)}",
        f"- Date: {datetime.date.today().isoformat()}",
    ]
    return "\n".join(lines)


def _processor() -> str:
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _version(package: str) -> str | None:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None
