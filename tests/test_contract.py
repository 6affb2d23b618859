"""What programs outside this repository rely on: the names, what an import costs, and documentation."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import optaccum
import optaccum.linen
import optaccum.nnx

PACKAGE = pathlib.Path(optaccum.__file__).parent

STREAMING = [
    "AccumulateState",
    "accumulate",
    "apply_gradients",
    "by_weight",
    "flush",
    "from_multi_steps",
    "has_updated",
    "until_weight",
    "value_and_update",
    "weight_total",
]
SCANNING = [
    "Info",
    "Last",
    "Max",
    "Min",
    "Stack",
    "Sum",
    "WeightedMean",
    "chunked",
    "grad",
    "microbatched",
    "value_and_grad",
]
INSTRUMENTS = ["count_collectives", "noise_scale", "plan_microbatches", "verify"]
PUBLIC = sorted(STREAMING + SCANNING + INSTRUMENTS)
RETURNED = [
    "CollectiveCounts",
    "MicrobatchPlan",
    "VerifyReport",
]  # types that a user meets, and may want to name


def _sources() -> list[pathlib.Path]:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert sources
    return sources


def _exports() -> list[str]:
    return sorted(
        name for name, value in vars(optaccum).items() if not name.startswith("_") and not inspect.ismodule(value)
    )


def test_these_names_are_public_and_no_others():
    assert _exports() == sorted(PUBLIC + RETURNED)


def test_is_typed():
    assert (PACKAGE / "py.typed").is_file()


IMPORT = """
import sys
import jax, optax
before = {name.partition(".")[0] for name in sys.modules}
import optaccum
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
"""


def test_import_brings_in_nothing_but_jax_and_optax():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["optaccum"]


def _imported(source: pathlib.Path) -> set[str]:
    """The dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("source", _sources(), ids=lambda path: path.name)
def test_uses_only_what_jax_makes_public(source):
    assert not [name for name in _imported(source) if "_src" in name.split(".")]
    assert "._src" not in source.read_text()


FOLDERS = ["_streaming", "_scanning", "_instruments"]
MAY_IMPORT = {
    "_streaming": {"_streaming"},
    "_scanning": {"_scanning"},
    "_instruments": {"_instruments", "_scanning"},
}


def _folders_imported(source: pathlib.Path) -> set[str]:
    parts = [name.split(".") for name in _imported(source)]
    return {part[1] for part in parts if part[0] == "optaccum" and part[1:2] and part[1] in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_no_other_but_where_it_may(folder):
    sources = list((PACKAGE / folder).glob("*.py"))
    imported = set().union(*map(_folders_imported, sources))
    assert folder in imported  # they are seen
    assert imported <= MAY_IMPORT[folder]


def test_the_shared_rooms_know_no_folder():
    rooms = [source for source in PACKAGE.glob("_*.py") if source.name != "__init__.py"]
    assert len(rooms) > 3
    assert not set().union(*map(_folders_imported, rooms))


def _functions() -> list[str]:
    return [name for name in _exports() if inspect.isfunction(getattr(optaccum, name))]


def test_two_files_know_flax():
    knowing = {source.name for source in _sources() for name in _imported(source) if name.split(".")[0] == "flax"}
    assert knowing == {"nnx.py", "linen.py"}


FLAX = [
    (optaccum.nnx, "apply_gradients"),
    (optaccum.nnx, "value_and_grad"),
    (optaccum.linen, "TrainState"),
]


@pytest.mark.parametrize(("module", "name"), FLAX, ids=lambda x: getattr(x, "__name__", x))
def test_names_for_flax_are_documented(module, name):
    public = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    assert sorted(key for key in public if key[0] != "_") == sorted(key for m, key in FLAX if m is module)
    assert "Example:" in inspect.getdoc(getattr(module, name))


@pytest.mark.parametrize("name", _exports())
def test_public_names_are_documented(name):
    docstring = inspect.getdoc(getattr(optaccum, name))
    assert docstring
    if name in _functions():
        for section in ["Args:", "Returns:", "Example"]:
            assert section in docstring


@pytest.mark.parametrize("name", _functions())
def test_public_functions_are_annotated(name):
    signature = inspect.signature(getattr(optaccum, name))
    assert signature.return_annotation is not signature.empty
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare
