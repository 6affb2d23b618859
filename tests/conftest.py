"""Eight simulated devices, and the comparisons that every test file shares."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)


def _of_compilers(config: pytest.Config) -> bool:
    """Whether tests/compilers (`make compilers`), which wants more than is here, is named."""
    return any("compilers" in pathlib.PurePath(arg).parts for arg in config.args)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "compilers" and not _of_compilers(config) else None


def pytest_configure(config: pytest.Config) -> None:
    """How programs are compiled for CPUs, here and in the processes that tests start."""
    as_for_users = os.environ.get("OPTACCUM_OPTIMIZED")  # `make test-all` sets it
    if as_for_users or jax.config.jax_platforms != "cpu" or _of_compilers(config):
        return
    # Code that is made in a third of the time; buffers and collectives, settled before code is made, stay.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    # On a busy machine eight devices may be long in meeting.
    flags = [
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if jax.__version_info__ < (0, 11):  # later versions have no such flag, and end where they meet one
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> str:
    """Compiles each program once; the folder, also for a process that a test starts and waits for.

    Not for one that runs meanwhile: JAX would read what is half written.
    """
    folder = str(tmp_path_factory.mktemp("compiled"))
    if not _of_compilers(pytestconfig):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        compilation_cache.reset_cache()  # collecting the tests has compiled too
    return folder


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """The same structure, one leaf or more, equal shapes, dtypes and values; NaN is never equal."""
    for name, a, b in _pairs(actual, expected):
        wrong = a != b  # of NaN too
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} differ\n{a}\n{b}"


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """As `assert_trees_equal`, with values equal up to `atol + rtol * |expected|`."""
    for name, a, b in _pairs(actual, expected):
        wrong = a != b
        if jnp.issubdtype(a.dtype, jnp.inexact):
            wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
            a, b = a.astype(wide), b.astype(wide)
            with np.errstate(invalid="ignore"):
                wrong &= ~(np.abs(a - b) <= atol + rtol * np.where(np.isfinite(b), np.abs(b), 0.0))
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} differ beyond {rtol=}, {atol=}\n{a}\n{b}"


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_structure = jax.tree_util.tree_flatten_with_path(expected)
    assert structure == expected_structure, f"{structure}\nis not\n{expected_structure}"
    assert leaves, "there is nothing to compare: the trees have no leaves"
    for (path, a), (_, b) in zip(leaves, expected_leaves, strict=True):
        name = jax.tree_util.keystr(path) or "the only leaf"
        a, b = _as_numpy(a), _as_numpy(b)
        assert a.shape == b.shape, f"{name}: shape {a.shape} is not {b.shape}"
        assert a.dtype == b.dtype, f"{name}: dtype {a.dtype} is not {b.dtype}"
        yield name, a, b


def _as_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)
