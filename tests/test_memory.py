"""Peak memory of stretches of code, within one another too."""

from __future__ import annotations

import mmap

import pytest

from fxpress.passes import memory
from fxpress.passes.memory import peak_memory


def occupy(megabytes: int) -> None:
    """Take that much memory from the system and give it back, whatever free memory the C library keeps."""
    with mmap.mmap(-1, megabytes * 1_000_000) as pages:
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1


def mark_is_reset() -> bool:
    """Whether this system's mark goes down when asked: some sandboxes have the file, and it does nothing."""
    occupy(200)
    before = memory._high_water()
    try:
        memory._CLEAR.write_text("5")
    except OSError:
        return False
    return memory._high_water() < before - 100e6


def test_a_block_sees_its_own_peak():
    with peak_memory() as small:
        occupy(1)
    with peak_memory() as large:
        occupy(int(small.megabytes) + 200)
    assert large.megabytes >= small.megabytes + 150


def test_an_outer_block_sees_what_was_before_an_inner_one():
    if not mark_is_reset():
        pytest.skip("this system does not reset the mark of a process's peak memory")
    with peak_memory() as outer:
        occupy(200)
        with peak_memory() as inner:
            occupy(10)
        with peak_memory():
            pass
    assert outer.megabytes > inner.megabytes + 150
