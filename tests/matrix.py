"""The whole suite in every environment that is claimed: `make test-all`.

    python tests/matrix.py [CELL ...] [-- PYTEST_ARGUMENTS]

Cells:

    lowest     the lowest versions that pyproject.toml declares, on the lowest Python found
    newest     the newest versions, on each Python from 3.12 on
    wheel      a wheel, built here and installed elsewhere, with the tests and no checkout beside them
    smoke      (only when named, and alone) the wheel with the dependencies that are here, and a few tests

A Python that is neither on PATH nor with pyenv is left out, and said to be. Environments are made anew, in
build/matrix.
"""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
BUILD = ROOT / "build" / "matrix"
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
CELLS = ("lowest", "newest", "wheel")
SMOKE_TESTS = ("tests/streaming/test_state.py", "tests/scanning/test_split.py")
# What these look at is the checkout: its documentation, its release files, its benchmarks.
OF_THE_CHECKOUT = ("test_benchmarks.py", "test_docs.py", "test_losses.py", "test_release.py")


def find_python(version: str) -> str | None:
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        asked = [str(candidate), "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2], sep='.')"]
        answer = subprocess.run(asked, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return str(candidate)
    return None


def make_environment(name: str, python: str, *install: str) -> pathlib.Path:
    """A new environment with what `uv pip install` is given; its Python."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    new = folder / "bin" / "python"
    subprocess.run([str(new), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "uv"], check=True)
    uv = [str(new), "-m", "uv", "pip", "install", "--quiet", "--python", str(new), *install]
    subprocess.run(uv, check=True, cwd=ROOT)
    return new


def run_tests(python: pathlib.Path, folder: pathlib.Path, arguments: list[str], pythonpath: str = "") -> bool:
    show = "from importlib.metadata import version as v; print('jax', v('jax'), 'optax', v('optax'))"
    subprocess.run([str(python), "-c", show], check=True)
    env = os.environ | {"PYTHONPATH": pythonpath, "OPTACCUM_OPTIMIZED": "1"}  # compiled as it is for users
    workers = ["-n", os.environ.get("WORKERS", "2"), "--dist", "worksteal"]
    # -P: the folder it starts in is not where packages are looked for
    command = [str(python), "-P", "-m", "pytest", *workers, *arguments]
    return subprocess.run(command, cwd=folder, env=env).returncode == 0


def lowest(python: str, arguments: list[str]) -> bool:
    new = make_environment("lowest", python, "--resolution", "lowest-direct", "-e", ".[test]")
    return run_tests(new, ROOT, arguments)


def newest(python: str, arguments: list[str]) -> bool:
    name = f"newest-{pathlib.Path(python).resolve().name}"
    return run_tests(make_environment(name, python, "--upgrade", "-e", ".[test]"), ROOT, arguments)


def build_wheel(python: str) -> pathlib.Path:
    folder = BUILD / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["-qq", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    subprocess.run([python, "-m", "pip", "wheel", *options, "."], check=True, cwd=ROOT)
    (path,) = folder.glob("optaccum-*.whl")
    return path


def copy_tests() -> pathlib.Path:
    """A folder with the tests, the examples that they run, and no package."""
    folder = BUILD / "elsewhere"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", *OF_THE_CHECKOUT))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check_import(python: str | pathlib.Path, expected: pathlib.Path, pythonpath: str = "") -> None:
    """Raises unless it is the package in `expected` that is tested."""
    command = [str(python), "-P", "-c", "import optaccum; print(optaccum.__file__)"]
    env = os.environ | {"PYTHONPATH": pythonpath}
    file = subprocess.run(command, cwd=BUILD, env=env, check=True, capture_output=True, text=True).stdout.strip()
    if not pathlib.Path(file).is_relative_to(expected):
        raise SystemExit(f"expected to test the package in {expected}; it is {file}")


def wheel(python: str, arguments: list[str]) -> bool:
    new = make_environment("wheel", python, f"optaccum[test] @ {build_wheel(python).as_uri()}")
    check_import(new, BUILD / "wheel")
    return run_tests(new, copy_tests(), arguments)


def smoke(arguments: list[str]) -> bool:
    """The wheel in the environment that runs this, whose dependencies it takes; no new one."""
    target = BUILD / "smoke"
    shutil.rmtree(target, ignore_errors=True)
    options = ["-qq", "--disable-pip-version-check", "--no-deps", "--target", str(target)]
    path = build_wheel(sys.executable)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(path)], check=True)
    check_import(sys.executable, target, str(target))
    return run_tests(pathlib.Path(sys.executable), copy_tests(), arguments or [*SMOKE_TESTS], str(target))


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    cells, arguments = argv[:cut] or list(CELLS), argv[cut + 1 :]
    if cells == ["smoke"]:
        return 0 if smoke(arguments) else 1
    if unknown := set(cells) - set(CELLS):
        raise SystemExit(f"cells are {', '.join(CELLS)}; got {', '.join(sorted(unknown))}")
    pythons = {version: find_python(version) for version in VERSIONS}
    for version in (version for version, python in pythons.items() if python is None):
        print(f"left out: Python {version}, which is not here")
    found = [version for version, python in pythons.items() if python is not None]
    runs = [(cell, version) for cell in cells for version in (found[:1] if cell != "newest" else found)]
    runs = [(cell, version) for cell, version in runs if cell != "newest" or version != "3.11"]
    failed = []
    for cell, version in runs:
        print(f"== {cell}, Python {version}", flush=True)
        python = pythons[version]
        assert python is not None
        try:
            passed = {"lowest": lowest, "newest": newest, "wheel": wheel}[cell](python, arguments)
        except subprocess.CalledProcessError as error:
            print(error)
            passed = False
        if not passed:
            failed.append(f"{cell} on Python {version}")
    print(f"failed: {', '.join(failed)}" if failed else f"all passed: {len(runs)} of {len(runs)}")
    return 1 if failed or not runs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
