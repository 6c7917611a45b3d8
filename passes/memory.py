"""Peak memory of a stretch of code, as the operating system saw it; and giving back what is free."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(eq=False)
class Peak:
    """Peak resident memory in MB (10^6 bytes), filled in when the `with` block ends."""

    megabytes: float = 0.0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak resident set within the block; where the system cannot reset its mark (only Linux can), that of
    the process so far.

    Blocks may lie within one another: the system knows one mark for all, so that it is noted before it is reset.
    """
    peak = Peak()
    _note()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # resets the kernel's high-water mark, see proc(5)
    _open.append(peak)
    try:
        yield peak
    finally:
        _note()
        _open.remove(peak)


_open: list[Peak] = []


def _note() -> None:
    """Tell the blocks that are open what the mark is."""
    mark = round(_high_water() / 1e6, 1)
    for peak in _open:
        peak.megabytes = max(peak.megabytes, mark)


def _high_water() -> float:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def return_memory() -> None:
    """Give memory that the process has freed back to the operating system, where its C library can do that.

    glibc otherwise keeps it for later: a hundred MB and more after large weights were moved about.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    return None
