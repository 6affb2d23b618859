"""A program that is stopped in the middle, for the tests of how it goes on."""

import types
from collections.abc import Sequence

import pytest


def run_stopped(program: types.ModuleType, call: int, arguments: Sequence[str]) -> None:
    """Runs it up to the checkpoint after `call`, which is not written."""

    def save_or_stop(manager, step, *rest, save=program.save):
        if step == call:
            raise KeyboardInterrupt
        save(manager, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "save", save_or_stop)
        with pytest.raises(KeyboardInterrupt):
            program.main(arguments)
