"""The table of mutations is kept: each still has a place in the package and tests to catch it."""

import pathlib

import pytest
from mutations import MUTATIONS

import optaccum

SOURCES = [path.read_text() for path in pathlib.Path(optaccum.__file__).parent.rglob("*.py")]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.breaks for mutation in MUTATIONS])
def test_a_mutation_has_one_place_and_its_tests(mutation):
    assert sum(source.count(mutation.old) for source in SOURCES) == 1
    files = [word for word in mutation.tests.split() if word.endswith(".py")]
    assert files
    assert all((pathlib.Path(__file__).parent / name).exists() for name in files)
