"""The collector rests while large packages are imported, and never longer."""

from __future__ import annotations

import gc

import pytest

from torchspec.imports import heavy_imports


def test_the_collector_rests_inside_and_runs_again_however_the_block_ends() -> None:
    with heavy_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), heavy_imports():
        raise ImportError("no such library")
    assert gc.isenabled()


def test_who_has_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with heavy_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
