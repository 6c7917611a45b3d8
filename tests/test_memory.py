"""Peak memory of stretches of code, within one another too."""

from __future__ import annotations

import numpy as np
import pytest

from fxpress.passes import memory
from fxpress.passes.memory import peak_memory


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="only Linux resets the mark")
def test_an_outer_block_sees_what_was_before_an_inner_one():
    with peak_memory() as outer:
        large = np.ones(25_000_000)  # 200 MB
        del large
        with peak_memory() as inner:
            small = np.ones(1_250_000)
            del small
        with peak_memory():
            pass
    assert outer.megabytes > inner.megabytes + 150
