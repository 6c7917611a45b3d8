"""Random numbers by place: what is drawn at a step depends on the seed and the step, not on what was drawn before.

So a resumed run needs no saved generator states, and no other code's use of the global generators can change a run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_for(*place: object) -> int:
    """A seed in [0, 2^63) for a place, such as (seed, "order", epoch)."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "big") >> 1


def generator_for(*place: object) -> torch.Generator:
    """A generator on the CPU that starts at the seed of a place."""
    return torch.Generator().manual_seed(seed_for(*place))


def seed_all(*place: object) -> None:
    """Seed the global generators of torch (on all devices), numpy and Python for a place."""
    seed = seed_for(*place)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # without a GPU manual_seed keeps a note of each seed, with its stack: memory grew by the step
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give the global generators back as they were."""
    numbers, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)
