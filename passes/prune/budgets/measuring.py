"""What pruning to a latency budget needs to be told: how long small programs take in the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ....frontend.program import Program


class OpLatencies(Protocol):
    """A clock for the runtime that a model is compiled for. `runtime.latency.MeasuredLatencies` is the real one."""

    @property
    def round_to(self) -> int:
        """The channel count multiple that the runtime's kernels like."""

    def seconds(self, key: str, make: Callable[[], Program]) -> float:
        """The time of the kernels of one small program. `make` builds it; `key` says all that its time depends on."""

    def ratio(self, original: Program, pruned: Program) -> float:
        """Time of `pruned` as a whole, over that of `original`, both in the form in which they will be compiled."""

    def save(self) -> None:
        """Keep what was measured."""

    def tell(self, done: int, total: int) -> None:
        """Show how many of the measurements of a table are done."""
