"""Peak memory of a stretch of code, as the operating system saw it."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Peak resident memory in MB (10^6 bytes), filled in when the `with` block ends."""

    megabytes: float = 0.0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak resident set within the block; on systems other than Linux, the peak of the process so far."""
    peak = Peak()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # resets the kernel's high-water mark, see proc(5)
    try:
        yield peak
    finally:
        peak.megabytes = round(_high_water() / 1e6, 1)


def _high_water() -> float:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
